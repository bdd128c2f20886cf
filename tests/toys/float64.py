"""Run transformers in float64 throughout: its casts to float32 (norms, eager softmax, rotary embeddings) are to float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Float64(TorchFunctionMode):
    """Replace float32 by float64 in the torch calls of transformers; those of other packages, ours included, are unchanged."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if _caller() != "transformers":
            return func(*args, **options)
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_widened, args), **{name: _widened(value) for name, value in options.items()})


@contextmanager
def float64_inside() -> Iterator[None]:
    """Compute everything inside of float64 models in float64 while the context is open; also a decorator.

    Without it results of two orders of computation agree to about 1e-5 only. Float32 models do not run in the context.
    """
    with _Float64():
        yield


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _caller() -> str:
    """The package that called a torch function, which may be a Python function of torch itself."""
    frame = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package != "torch":
            return package
        frame = frame.f_back
    return ""
