"""Names that differ between the supported versions of other libraries."""

from importlib.metadata import version
from typing import TYPE_CHECKING


def installed(library: str) -> tuple[int, int]:
    """Return the major and minor version of an installed library."""
    major, minor, *_ = version(library).split(".")
    return int(major), int(minor)


# The HTTP client that huggingface_hub installs: httpx2 continues httpx under the same names.
if TYPE_CHECKING or installed("huggingface_hub") >= (2, 0):
    import httpx2 as http
else:
    import httpx as http

# Name of the argument of diffusers' `from_pretrained`. The other one is deprecated, or ignored with a warning.
DTYPE = "dtype" if installed("diffusers") >= (0, 40) else "torch_dtype"

__all__ = ["DTYPE", "http", "installed"]
