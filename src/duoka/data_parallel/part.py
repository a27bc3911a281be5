"""How one device computes its part: by the model itself, or by what ``torch.compile`` makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["MaybeCompiled"]


class MaybeCompiled:
    """Whether and how to compile. What is compiled is kept here, so that the model does not see it."""

    def __init__(self, how: bool | Mapping[str, Any] | None) -> None:
        self.options: dict[str, Any] | None = None if how is None or how is False else {} if how is True else dict(how)
        self._module: nn.Module | None = None
        self._compiled: Callable[..., Any] | None = None

    def of(self, module: nn.Module) -> Callable[..., Any]:
        """Return what to call in the place of ``module``."""
        if self.options is None:
            return module
        if self._compiled is None or self._module is not module:
            self._module, self._compiled = module, torch.compile(module, **self.options)
        return self._compiled
