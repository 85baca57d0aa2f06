"""Names for the place in the code that an operation comes from."""

import sys
from types import CodeType


OWN = "/ddpo_trl/"
LIBRARIES = ("/diffusers/", "/transformers/", "/accelerate/", "/peft/")


def place() -> str:
    """Return "function of this package < innermost function of a library", each as file:function."""
    innermost, frame = "", sys._getframe(2)
    while frame is not None:
        if name := described(frame.f_code, (OWN,)):
            return f"{name} < {innermost}" if innermost else name
        innermost = innermost or described(frame.f_code, LIBRARIES)
        frame = frame.f_back  # type: ignore[assignment]  # `None` behind the outermost
    return f" < {innermost}"


def described(code: CodeType, packages: tuple[str, ...]) -> str:
    """Return a function of one of the packages by its file and name, "" if it belongs to none of them."""
    for package in packages:
        _, found, path = code.co_filename.rpartition(package)
        if found:
            prefix = "" if package == OWN else package[1:]
            return f"{prefix}{path}:{code.co_name}"
    return ""
