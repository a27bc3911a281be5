"""Import of packages that only some features need, with the pip command in the error."""

import importlib
from typing import Any

from duoka.errors import MissingDependencyError


def import_optional(module: str, extra: str) -> Any:
    """Import and return ``module``, which ``pip install 'duoka[extra]'`` installs.

    Raises:
        MissingDependencyError: the package is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        message = f"{package} is needed for this and is not installed: pip install 'duoka[{extra}]'"
        raise MissingDependencyError(message) from error
