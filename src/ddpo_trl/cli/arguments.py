"""The parser of all commands: TRL's, with a short help and suggestions for unknown flags."""

import argparse
import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any

import yaml
from trl import TrlParser

from ddpo_trl.cli.errors import UsageError, one_line, usage_errors, without_debug
from ddpo_trl.settings import out_of_bounds, wrong_types
from ddpo_trl.suggestions import did_you_mean


class Gather(argparse.Action):
    """Collect the values of a repeated flag, `--reward a --reward b`. They replace those of the file."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *option_string: Any
    ) -> None:
        before = vars(namespace).get(self.dest, self.default)
        vars(namespace)[self.dest] = values if before is self.default else [*before, *values]


class CommandParser(TrlParser):
    """
    Parse the command's own dataclass, further ones, and the YAML file of `--config`.

    Args:
        shown (`Collection[str]`, *optional*):
            Fields of the further dataclasses that `--help` shows. `--help-all` shows all of them.
        launcher_flags (`Collection[str]`, *optional*):
            Flags that are meant for another program.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        prog: str,
        description: str,
        example: str = "",
        shown: Collection[str] = (),
        launcher_flags: Collection[str] = (),
    ):
        self.flags: dict[str, argparse.Action] = {}
        self.file_settings: dict[str, Any] = {}
        self.launcher_flags = launcher_flags
        super().__init__(
            list(dataclass_types),
            prog=prog,
            usage=f"{prog} {example}".rstrip(),
            description=description,
            formatter_class=argparse.HelpFormatter,
            allow_abbrev=False,
        )
        own = [field.name for dataclass_type in dataclass_types[:1] for field in dataclasses.fields(dataclass_type)]
        visible = {"help", *own, *shown}
        self.hidden = [action for action in self.flags.values() if action.dest not in visible]
        if dataclass_types:
            help = "YAML file with values of these flags. Flags on the command line override it."
            self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=help)
        if len(dataclass_types) > 1:
            self.add_argument("--help-all", action="help", help="show every flag and exit")

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument. Of `--a_b` and `--a-b`, both of which are accepted, help and errors show the first."""
        shown = [name for name in names if underscored(name) == name or underscored(name) not in names]
        if "type" in options and "choices" not in options:
            options.setdefault("metavar", "VALUE")
        default = options.get("default")
        if default not in (None, "", argparse.SUPPRESS) and default is not False:
            options["help"] = f"{options.get('help') or ''} (default: %(default)s)"
        action: argparse.Action = super().add_argument(*shown, **options)
        self.flags |= dict.fromkeys(action.option_strings, action)
        return action

    def error(self, message: str) -> Any:
        """Raise a [`~ddpo_trl.cli.errors.UsageError`], where argparse would exit."""
        raise UsageError(message)

    def parse(self, argv: Sequence[str]) -> tuple[tuple[Any, ...], list[str]]:
        """
        Parse a command line.

        Returns:
            `tuple`: An instance of each dataclass, and a namespace of further arguments if the parser has any; and
            the words for the launcher.

        Raises:
            [`~ddpo_trl.cli.errors.UsageError`]: If an argument is invalid or unknown.
        """
        words = self._words(argv)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if flag not in self.flags and underscored(flag) not in self.launcher_flags:
                self._refuse(f"unknown argument {flag}", flag)
        if "--help-all" not in words:
            for action in self.hidden:
                action.help = argparse.SUPPRESS
        if "--config" in words and not os.path.isfile(path := (*words, "")[words.index("--config") + 1]):
            raise UsageError(f"--config is {path!r}, which is not a file.")
        try:
            with usage_errors():
                *parsed, unknown = self.parse_args_and_config(words, return_remaining_strings=True)
                for problem in (*wrong_types(parsed[0]), *out_of_bounds(parsed[0])) if self.dataclass_types else ():
                    raise ValueError(problem)
        except yaml.YAMLError as error:
            raise UsageError(f"The file of --config is not valid YAML: {one_line(error)}") from error
        if unknown and not unknown[0].startswith("--"):
            raise UsageError(f"unexpected argument {unknown[0]!r}")
        return tuple(parsed), unknown

    def set_defaults_with_config(self, **settings: Any) -> Any:
        """Take the settings of the file of `--config`, which TRL's parser has read."""
        known = {action.dest for action in self.flags.values()}
        for name in settings:
            if name not in known and f"--{name}" not in self.launcher_flags:
                self._refuse(f"{name!r} in the file of --config is not a setting", f"--{name}")
        self.file_settings = settings
        return super().set_defaults_with_config(**settings)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the settings of the file and of the command line. The parser can't be used afterwards."""
        for action in self.flags.values():
            action.default, action.required = argparse.SUPPRESS, False
        flags = vars(self.parse_known_args(self._words(argv))[0])
        flags.pop("config", None)
        return {**self.file_settings, **flags}

    def _refuse(self, problem: str, flag: str) -> None:
        raise UsageError(f"{problem}.{did_you_mean(flag, [*self.flags, *self.launcher_flags])}")

    def _words(self, argv: Sequence[str]) -> list[str]:
        """Flags with underscores, and `--config=FILE` as the two words that TRL's parser expects."""
        words: list[str] = []
        for word in without_debug(argv):
            flag, equals, value = word.partition("=")
            if underscored(flag) in self.flags:
                flag = underscored(flag)
            words += [flag, value] if flag == "--config" and equals else [f"{flag}{equals}{value}"]
        return words


def underscored(flag: str) -> str:
    """Return `--a_b` for `--a-b`."""
    return f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag
