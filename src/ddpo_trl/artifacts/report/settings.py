"""The settings of a run beside the defaults."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ddpo_trl.config import DDPOConfig


# TrainingArguments fills these in by itself: they differ from their defaults in every run.
FILLED_IN = {"accelerator_config", "hub_token", "per_device_eval_batch_size"}

FIELDS = {field.name: field for field in dataclasses.fields(DDPOConfig)}
OWN_NAMES = DDPOConfig.__annotations__


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A line of the table of settings, as text. `chosen` is what differs from the default."""

    name: str
    value: str
    default: str
    help: str
    chosen: bool


def compare(settings: dict[str, Any]) -> list[Setting]:
    """The settings of `ddpo_config.json` beside their defaults: DDPO's own first, then those of TrainingArguments."""
    names = sorted(settings, key=lambda name: name not in OWN_NAMES)
    return [setting(name, settings[name]) for name in names]


def setting(name: str, value: Any) -> Setting:
    """One setting; what this version does not know counts as chosen."""
    if name not in FIELDS:
        return Setting(name=name, value=plain(value), default="unknown", help="", chosen=True)
    default = default_of(FIELDS[name])
    unset = default in (None, "", "none") and not value  # TrainingArguments makes False or [] of some of them
    return Setting(
        name=name,
        value=plain(value),
        default=plain(default),
        help=FIELDS[name].metadata.get("help", "") if name in OWN_NAMES else "",
        chosen=value != default and not unset and name not in FILLED_IN,
    )


def default_of(field: dataclasses.Field) -> Any:
    """As it would come back from a JSON file."""
    factory = field.default_factory
    return json.loads(json.dumps(field.default if factory is dataclasses.MISSING else factory(), default=str))


def plain(value: Any) -> str:
    """As it would be written in a YAML file; a dash for nothing."""
    if value is None or value == "":
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
