"""Objects named on a command line, `module:name`."""

import importlib
import inspect
import operator
import os
import sys
from typing import Any


def import_object(spec: str) -> Any:
    """
    Import `module:name`, also from the working directory. A class is instantiated without arguments.

    Raises:
        `ValueError`: If it does not exist, or is a class that needs arguments.
        `RuntimeError`: If the module raises an error when it is imported.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise ValueError(f"{spec!r} is not module:function; give one, such as my_module:my_function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = operator.attrgetter(name)(_import_module(module_name, spec))
    except AttributeError as error:
        raise ValueError(f"{spec!r} does not exist: {error}.") from error
    if not inspect.isclass(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(
            f"{spec!r} is a class that can't be instantiated without arguments ({error}); give an instance: "
            f"mine = {name}(...) in a module of yours, and module:mine."
        ) from error
    return found()


def _import_module(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"There is no module {error.name!r} for {spec!r}, neither installed nor in {os.getcwd()}."
            ) from error
        raise RuntimeError(f"The module {name!r} could not be imported.") from error
