"""The list of rooms, and a check that all of them come from one distribution.

The rooms are top-level packages with ordinary names. A user's folder ``probes/`` or ``experiments/`` with an
``__init__.py`` in the current directory comes first on ``sys.path`` and hides ours. `groundscope` and every room call
`check_rooms` when they are imported, so that such a folder is an error and never a silent replacement. Where the hidden room is
the only import, no line of ours runs: begin with ``import groundscope``.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOMS = (
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
"""Import packages of the distribution besides `groundscope`, lowest first."""


@cache
def check_rooms() -> None:
    """Check that an import of any room loads the one next to this package.

    Raises
    ------
    ImportError
        Where another folder or module hides a room; the message names both places and the fix. A room that cannot be imported
        at all is not an error here.
    """
    home = Path(__file__).resolve().parents[2]
    for name in ROOMS:
        place = _place(name)
        if place is not None and place.resolve() != home / name:
            msg = (
                f"{place} hides the package '{name}' of groundscope at {home / name}: rename it, or run Python from another "
                f"directory or with the option -P, which keeps the current directory off the import path"
            )
            raise ImportError(msg, name=name, path=str(place))


def _place(name: str) -> Path | None:
    """Return the folder, or the file of a module, that a top-level name is imported from; None where there is none."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module made by hand, without a spec
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return Path(next(iter(spec.submodule_search_locations), name))
    return Path(spec.origin or name)
