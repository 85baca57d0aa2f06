"""Objects named on a command line, `module:name`."""

import importlib
import inspect
import operator
import os
import sys
from typing import Any


def import_object(spec: str) -> Any:
    """
    Imports an object, from the working directory too.

    Args:
        spec (`str`):
            `module:name` of a function, of another object, or of a class, which is made without arguments.

    Raises:
        `ValueError`: If there is no such thing, or if it is a class that needs arguments.
        `RuntimeError`: If the module raises an error when it is imported.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise ValueError(f"{spec!r} is no module:function; give one, such as my_module:my_function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"There is no module {error.name!r}, neither installed nor in {os.getcwd()}, to take {spec!r} from."
            ) from error
        raise RuntimeError(f"The module {module_name!r} could not be imported.") from error
    try:
        found: Any = operator.attrgetter(name)(module)
    except AttributeError as error:
        raise ValueError(f"{spec!r} does not exist: {error}.") from error
    if inspect.isclass(found):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise ValueError(
                f"{spec!r} is a class that can't be made without arguments ({error}); give an instance: "
                f"mine = {name}(...) in a module of yours, and module:mine."
            ) from error
        found = found()
    return found
