"""Write directions for VTI's code, which normalizes them and adds them relative to the MLP output's length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from groundscope.core.errors import ConfigError
from lvlm.sites import Site
from mitigation.steering.changes import AddChange
from mitigation.steering.derive.vti import SHARE
from mitigation.steering.export.capability import Capability, metadata_of, require
from mitigation.steering.export.torch_files import write_pt
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

CAPABILITY = Capability(
    "VTI",
    "MLP output, at every token",
    ("MLP output", "vision MLP output"),
    norms=("relative",),
    by_token=True,
    one_place=True,
)


def vti(vector: SteeringVector, path: str | Path, model: Lvlm, *, strength: float | None = None) -> Path:
    """Write float32 directions ``[layers, 1, D]`` of the decoder, or ``[vision layers, 1, tokens, D]`` of the vision tower.

    For ``add_vti_layers(stack, torch.load(path, weights_only=True), alpha=[alpha])`` of github.com/shengliu66/VTI, with the
    alpha from the metadata file: the code normalizes every direction, so the file cannot contain the strength. A layer that
    is not steered is a row of zeros.

    Parameters
    ----------
    vector
        Vector of `derive.vti_text` or `derive.vti_vision`: relative additions at MLP outputs, at every token.
    path
        Path of the ``.pt`` file.
    model
        The model that the vector was derived for.
    strength
        Strength; by default the vector's.

    Raises
    ------
    ConfigError
        If the format cannot represent the vector, for example if layers have different sigmas.
    ModelError
        For a model that the vector was not derived for.
    StoreError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, torch
    >>> import numpy as np
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> changes = {"decoder.L2.mlp_out": gs.AddChange(np.eye(model.width)[0], sigma=0.1)}
    >>> vector = gs.SteeringVector(changes, "all", 1.0, model.name, model.config_hash, norm="relative")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = gs.export.vti(vector, Path(folder) / "directions.pt", model)
    ...     directions = torch.load(path, weights_only=True)
    >>> directions.shape == (model.n_layers, 1, model.width), directions[2, 0, :3].tolist()
    (True, [1.0, 0.0, 0.0])
    """
    vector.check(model)
    require(vector, "vti", CAPABILITY)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    additions = {key: change for key, change in vector.changes.items() if isinstance(change, AddChange)}
    sigmas = {change.sigma for change in additions.values()}
    if max(sigmas) - min(sigmas) > 1e-6 * max(sigmas):
        msg = (
            f"{vector}: VTI has one strength for all layers, but this vector's sigmas range from {min(sigmas):g} to "
            f"{max(sigmas):g}"
        )
        raise ConfigError(msg)
    first = next(iter(additions.values()))
    vision = any(isinstance(key, Site) and key.stack == "vision" for key in vector.changes)
    directions = np.zeros((model.n_vision_layers if vision else model.n_layers, *first.direction.shape), np.float32)
    for key, change in additions.items():
        if isinstance(key, Site):
            directions[key.layer] = change.direction
    path = Path(path)
    alpha = s * first.sigma / SHARE
    write_pt(path, torch.from_numpy(directions)[:, None], metadata_of(vector, "vti", s, alpha=alpha), "VTI directions")
    return path
