"""The parser of all commands: TRL's, with help that fits a screen and suggestions for what is mistyped."""

import argparse
import dataclasses
import os
import shutil
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import yaml
from trl import TrlParser

from ddpo_trl.cli.errors import UsageError, debug_position, usage_errors
from ddpo_trl.suggestions import did_you_mean


# What stands for a value in the help, by the name of the function that reads it.
METAVARS = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "[BOOL]", "dict": "JSON"}

# Help of fields of `TrainingArguments`, whose own takes several lines.
BRIEFLY = {
    "bf16": "Mixed precision: sample and train in bfloat16.",
    "eval_strategy": "epoch: evaluate after each round.",
    "output_dir": "Where everything is saved.",
    "push_to_hub": "Push what is saved to the Hub.",
    "report_to": "Trackers: tensorboard, wandb, trackio.",
    "seed": "All randomness of the run.",
    "use_cpu": "Leave the GPU alone.",
}


class Gather(argparse.Action):
    """For `--reward a --reward b` as well as `--reward a b`. What a file says gives way to the flags."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = vars(namespace).get(self.dest)
        first = given is None or given is self.default
        vars(namespace)[self.dest] = list(values) if first else [*(given or ()), *values]


class HelpAll(argparse.Action):
    """Prints every flag."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        assert isinstance(parser, CommandParser)
        print(parser.format_all(), end="")
        parser.exit()


class FullFormatter(argparse.HelpFormatter):
    """A flag, what it takes, its help and its default."""

    help_position = 36

    def __init__(self, prog: str):
        self.columns = min(shutil.get_terminal_size().columns, 100)
        super().__init__(prog, max_help_position=self.help_position, width=self.columns)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{', '.join(spelled_once(action.option_strings))} {self._value(action)}".rstrip()

    def _value(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ""
        if action.metavar is not None:
            return str(action.metavar)
        if action.choices is not None:
            return "|".join(map(str, action.choices))
        name = "TEXT" if action.type is None else METAVARS.get(action.type.__name__, "VALUE")  # type: ignore[union-attr]
        return f"{name} ..." if action.nargs == "+" else name

    def _get_help_string(self, action: argparse.Action) -> str:
        return f"{' '.join((action.help or '').split())}{self._default(action)}"

    def _default(self, action: argparse.Action) -> str:
        default = action.default
        if not action.option_strings or default is False or default in (None, "", argparse.SUPPRESS):
            return ""
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f" [{shown.replace('%', '%%')}]"


class ScreenFormatter(FullFormatter):
    """One line for each flag: the first sentence of its help, as far as it fits."""

    def _value(self, action: argparse.Action) -> str:
        value = super()._value(action)
        return value if action.choices is None or len(value) <= 12 else "NAME"

    def _get_help_string(self, action: argparse.Action) -> str:
        default = self._default(action)
        text = BRIEFLY.get(action.dest) or " ".join((action.help or "").split()).partition(". ")[0]
        room = self.columns - self.help_position - len(default)
        return textwrap.shorten(text if text.endswith(".") else f"{text}.", room, placeholder=" ...") + default


def spelled_once(flags: Sequence[str]) -> list[str]:
    """Flags without their twins: `--eval_prompts` can be written `--eval-prompts` as well."""
    return [flag for flag in flags if (twin := f"--{flag[2:].replace('-', '_')}") == flag or twin not in flags]


class CommandParser(TrlParser):
    """
    Parses dataclasses and the YAML file of `--config`.

    Args:
        dataclass_types (`Sequence[type]`):
            Each field is a flag.
        prog (`str`):
            The command, such as `"ddpo-trl train"`.
        description (`str`):
            What it does.
        shown (`Mapping[str, Sequence[str]]`, *optional*):
            Fields that `--help` shows, by heading; `--help-all` shows the others too. All of them by default.
        example (`str`, *optional*, defaults to `""`):
            A command line that works.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        prog: str,
        description: str,
        shown: Mapping[str, Sequence[str]] | None = None,
        example: str = "",
    ):
        super().__init__(
            list(dataclass_types),
            prog=prog,
            usage=f"{prog} {example}".rstrip(),
            description=description,
            formatter_class=FullFormatter,
            allow_abbrev=False,
        )
        self.shown = shown
        self.file_settings: dict[str, Any] = {}
        silent = argparse.SUPPRESS
        if dataclass_types:
            help = "A YAML file of these settings; flags go before it."
            self.add_argument("--config", metavar="FILE", default=silent, help=help)
        if shown is not None:
            self.add_argument("--help-all", action=HelpAll, nargs=0, default=silent, help="Every flag there is.")

    # ---- Help ----

    def format_help(self) -> str:
        if self.shown is None:
            return str(super().format_help())
        return self._format_groups(self.shown, ScreenFormatter(self.prog))

    def format_all(self) -> str:
        """The help with every flag, by the class that has the field."""
        groups: dict[str, list[str]] = {}
        for dataclass_type in self.dataclass_types:
            names = [field.name for field in dataclasses.fields(dataclass_type) if field.init]
            for owner in dataclass_type.__mro__:
                groups[owner.__name__] = [name for name in names if name in vars(owner).get("__annotations__", ())]
                names = [name for name in names if name not in groups[owner.__name__]]
        return self._format_groups(
            {name: fields for name, fields in groups.items() if fields}, FullFormatter(self.prog)
        )

    def _format_groups(self, groups: Mapping[str, Sequence[str]], formatter: FullFormatter) -> str:
        actions = {flag.removeprefix("--"): action for flag, action in self._option_string_actions.items()}
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        formatter.start_section("argument")
        formatter.add_arguments([action for action in self._actions if not action.option_strings])
        formatter.end_section()
        for heading, names in {**groups, "more": ["config", "help-all"]}.items():
            formatter.start_section(heading)
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
        head, *sections = formatter.format_help().split(":\n  ")
        return ":\n  ".join([head, *(section.replace("\n\n", "\n") for section in sections)])

    # ---- Parsing ----

    def error(self, message: str) -> Any:
        raise UsageError(message)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """
        Reads a command line.

        Returns:
            An instance of each dataclass, and a namespace of further arguments if the parser has any.

        Raises:
            [`~ddpo_trl.cli.errors.UsageError`]: If something is wrong with it, unknown flags included.
        """
        parsed, unknown = self.parse_known(argv)
        self.refuse(unknown)
        return parsed

    def parse_known(
        self, argv: Sequence[str], known_elsewhere: Callable[[], Collection[str]] = tuple
    ) -> tuple[tuple[Any, ...], list[str]]:
        """
        As [`~CommandParser.parse`], and what it does not know, from the file and from the flags. A flag that is not
        among those `known_elsewhere` either is named before one that is missing: it may be what was meant for it.
        """
        argv = self._without_debug(argv)
        try:
            with usage_errors():
                self._read_file(argv)
                *parsed, from_file, from_flags = self.parse_args_and_config(
                    argv, return_remaining_strings=True, separate_remaining_strings=True
                )
        except UsageError as error:
            if unknown := [word for word in argv if word.startswith("--") and self._is_unknown(word)]:
                try:
                    self.refuse(unknown, known_elsewhere())
                except UsageError as named:
                    raise UsageError(f"{named} Also: {error}") from error
            raise
        return tuple(parsed), [*from_file, *from_flags]

    def _is_unknown(self, word: str) -> bool:
        return word.partition("=")[0] not in self._option_string_actions

    def refuse(self, unknown: Sequence[str], known_elsewhere: Collection[str] = ()) -> None:
        """Raises a `UsageError` for the first unknown flag, and for a value without a flag."""
        flags = spelled_once(list(self._option_string_actions))
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known_elsewhere:
                in_file = flag.removeprefix("--") in self.file_settings
                what = f"{flag[2:]!r} in the file of --config is no setting" if in_file else f"there is no {flag}"
                raise UsageError(f"{what}.{did_you_mean(flag, [*flags, *known_elsewhere])}")
        if unknown and not unknown[0].startswith("--"):
            raise UsageError(f"{unknown[0]!r} is the value of no flag.")

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the settings of the file and the flags, without defaults. The parser can't be used afterwards."""
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
        flags = vars(self.parse_known_args(self._without_debug(argv))[0])
        flags.pop("config", None)
        return {**self.file_settings, **flags}

    def _without_debug(self, argv: Sequence[str]) -> list[str]:
        position = debug_position(argv)
        words = [word for place, word in enumerate(argv) if place != position]
        # TRL's parser knows `--config FILE` only.
        return [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]

    def _read_file(self, argv: Sequence[str]) -> None:
        if "--config" not in argv:
            return
        path = (*argv, "")[argv.index("--config") + 1]
        if not os.path.isfile(path):
            raise ValueError(f"--config is {path!r}, and there is no such file.")
        with open(path) as file:
            try:
                settings = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds no settings; write lines such as `total_episodes: 512`.")
        self.file_settings = settings
