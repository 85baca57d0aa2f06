"""Settings of a run compared with the defaults."""

import dataclasses
import json
from typing import Any, NamedTuple

from ddpo_trl.config import DDPOConfig
from ddpo_trl.settings import default_of


# Settings that TrainingArguments fills in, so that they differ from their defaults in every run.
FILLED_IN = {"accelerator_config", "hub_token", "per_device_eval_batch_size"}

FIELDS = {field.name: field for field in dataclasses.fields(DDPOConfig)}
OWN_NAMES = DDPOConfig.__annotations__


class Setting(NamedTuple):
    """Row of the table of settings, as text; `chosen` if it differs from the default."""

    name: str
    value: str
    default: str
    help: str
    chosen: bool


def compare(settings: dict[str, Any]) -> list[Setting]:
    """Return the settings of `ddpo_config.json` with their defaults, DDPO's own first."""
    return [setting(name, settings[name]) for name in sorted(settings, key=lambda name: name not in OWN_NAMES)]


def setting(name: str, value: Any) -> Setting:
    """Return one setting; one that this version does not know counts as chosen."""
    if name not in FIELDS:
        return Setting(name, plain(value), "unknown", "", chosen=True)
    field = FIELDS[name]
    default = json.loads(json.dumps(default_of(field), default=str))  # as the value was read
    unset = default in (None, "", "none") and not value  # TrainingArguments turns some of them into False or []
    chosen = value != default and not unset and name not in FILLED_IN
    return Setting(name, plain(value), plain(default), field.metadata["help"] if name in OWN_NAMES else "", chosen)


def plain(value: Any) -> str:
    """Format a value as in a YAML file, or a dash for nothing."""
    if value is None or value == "":
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
