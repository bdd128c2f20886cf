"""The list of packages, and a check that all of them come from one distribution.

They are top-level packages with common names. A user's folder ``probes/`` or ``experiments/`` with an
``__init__.py`` in the current directory comes first on ``sys.path`` and hides ours. `groundscope` and every package call
`check_packages` on import, so that such a folder is an error and never a silent replacement. If the hidden package is the only
import, no code of groundscope runs: begin with ``import groundscope``.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    "concepts",
    "lvlm",
    "activation_store",
    "probes",
    "circuits",
    "behavior",
    "mitigation",
    "diagnosis",
    "experiments",
)
"""Import packages of the distribution except `groundscope`, lowest first."""


@cache
def check_packages() -> None:
    """Check that every package is imported from the folder next to this package.

    Raises
    ------
    ImportError
        If another folder or module hides a package; the message names both paths and the fix. A package that cannot be imported
        at all is not an error here.
    """
    home = Path(__file__).resolve().parents[2]
    for name in PACKAGES:
        place = _place(name)
        if place is not None and place.resolve() != home / name:
            msg = (
                f"{place} hides the package '{name}' of groundscope at {home / name}: rename it, or run Python from another "
                f"directory or with the option -P, which removes the current directory from the import path"
            )
            raise ImportError(msg, name=name, path=str(place))


def _place(name: str) -> Path | None:
    """Return the folder or module file of a top-level import name; None if it cannot be imported."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module without a spec
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return Path(next(iter(spec.submodule_search_locations), name))
    return Path(spec.origin or name)
