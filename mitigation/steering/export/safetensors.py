"""Write a steering vector in groundscope's format, which represents every vector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def safetensors(vector: SteeringVector, path: str | Path, model: Lvlm | None = None) -> Path:
    """Write a steering vector in groundscope's format, as `SteeringVector.save`; `SteeringVector.load` reads it.

    Written with the model, the file also serves code without groundscope: ``apply_vector.py`` in this folder is a loader to
    copy, which needs only torch and safetensors.

    Parameters
    ----------
    vector
        The vector.
    path
        Path of the safetensors file; the metadata go into a file of the same name with the suffix ``.json``.
    model
        The model that the vector was derived for: its modules at the vector's places are named in the metadata. None for a
        file that only groundscope reads.

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
    return vector.save(path, model)
