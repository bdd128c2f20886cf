"""Write a steering vector in groundscope's format, which represents every vector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def safetensors(vector: SteeringVector, path: str | Path, model: Lvlm | None = None) -> Path:
    """Write a steering vector in groundscope's format, as `SteeringVector.save`; `SteeringVector.load` reads it.

    Parameters
    ----------
    vector
        The vector.
    path
        Path of the safetensors file; the metadata go into a file of the same name with the suffix ``.json``.
    model
        Optional, for the common interface of exports: a model to check the vector against.

    Raises
    ------
    StoreError
        If a file cannot be written.
    ModelError
        For a model that the vector was not derived for.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from pathlib import Path
    >>> from mitigation import AddChange, SteeringVector, export
    >>> vector = SteeringVector({2: AddChange(np.eye(8)[0])}, "last+generated", 1.0, "m", "c")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export.safetensors(vector, Path(folder) / "correction.safetensors")
    ...     SteeringVector.load(path)
    SteeringVector(add at L2; last+generated, strength 1, for 'm')
    """
    if model is not None:
        vector.check(model)
    return vector.save(path)
