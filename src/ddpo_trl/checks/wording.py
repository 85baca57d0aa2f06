"""Names of modules, settings and dtypes in messages."""

from collections.abc import Sequence

import torch


MAX_NAMES = 3  # in a sentence


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest


def verb(names: Sequence[str]) -> str:
    """Return `"is"` or `"are"`, for a sentence with [`listed`]."""
    return "is" if len(names) == 1 else "are"


def plain(dtype: torch.dtype) -> str:
    """Return `"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def setting_name(owner: str, name: str) -> str:
    """Return the name of a setting as the user writes it; for a field of the config, its own name."""
    match owner:
        case "config":
            return name
        case "pipeline_kwargs":
            return f"pipeline_kwargs[{name!r}]"
        case _:
            return f"{owner}.{name}"
