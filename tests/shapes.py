"""How array shapes in signatures are checked while tests run.

pytest's ``--jaxtyping-packages`` (see pyproject.toml) hands every function of the packages to `checked`. Those that name
an array's shape have all their arguments and their result checked; the others run unchanged, so that a test can
give them what a user should not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_Function = TypeVar("_Function", bound=Callable[..., Any])

# An int is good where a float is asked for.
_CONFIGURATION = BeartypeConf(is_pep484_tower=True)


def checked(function: _Function) -> _Function:
    """Return the function with its arguments checked if its signature names a shape, else unchanged."""
    if any(names_shape(hint) for hint in function.__annotations__.values()):
        return beartype(conf=_CONFIGURATION)(function)
    return function


def names_shape(hint: Any) -> bool:
    """Say whether a type, or one it is made of, is a jaxtyping array such as ``Float[np.ndarray, "n d"]``."""
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(names_shape(a) for a in get_args(hint))
