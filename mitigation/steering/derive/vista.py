"""VISTA's visual steering vector: the difference between the prompt with and without this image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from circuits.interventions.options import Norm
from groundscope.core.errors import PatchError
from lvlm.sites import Site
from mitigation.steering.activations import run
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.derive.base import check_variant
from mitigation.steering.derive.text_activations import read_text
from mitigation.steering.places import Key, canonical
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Lvlm


def vsv(
    model: Lvlm,
    example: Example,
    *,
    layers: Sequence[int] | None = None,
    positions: str | None = None,
    strength: float = 0.1,
    variant: Literal["paper", "release", "simple"] = "paper",
) -> SteeringVector:
    """Return the visual steering vector of one question about one image.

    VISTA (Li et al. 2025, arXiv 2502.03628): V is the residual stream at the last token of the prompt with the image minus
    that without it; during generation ``h <- |h| unit(h + lambda V)``. The vector is valid only for its image. The method with
    a vector for each answer, and with VISTA's second part, which mixes in logits of earlier layers, is
    `mitigation.training_free.methods.vista.VISTA`.

    Parameters
    ----------
    model
        The model to steer.
    example
        Image and question.
    layers
        Layers of the decoder; all by default.
    positions
        Token positions that the vector acts on; by default ``last+generated`` for the paper's form and ``all`` for the release's.
    strength
        lambda. The paper states no value for its form; the release's scripts use 0.17 for captions and 0.01 for POPE.
    variant
        ``paper``: at the residual stream, with the length of V.
        ``release`` (github.com/LzVv123456/VISTA, as its run scripts set it): at the MLP's output,
        ``x <- |x| unit(unit(x) + lambda (1 + max(0, cos(x, -V))) unit(V))``.
        ``simple`` (the release's simple mode): the same without the cosine, ``x <- |x| unit(unit(x) + lambda unit(V))``.
        Both modes of the release apply a principal component analysis of one sample to V, which only adds 1 to coordinate 0
        of layer 0.

    Raises
    ------
    PatchError
        If the prompts with and without the image have equal activations at a layer.
    SiteError
        For a layer that the model lacks.
    ModelError
        For a model whose decoder does not read the prompt.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> gs.derive.vsv(model, gs.scenes.dataset(10)[0], layers=[2, 3]).norm
    'kept'
    """
    check_variant(variant, ("paper", "release", "simple"))
    selected = tuple(range(model.n_layers) if layers is None else layers)
    sites = [Site("decoder", layer, "resid_post") for layer in selected]
    with_image = run(model, [example], [canonical(site) for site in sites], "last")
    without_image = read_text(model, model.prompt(example.request, images=0, system=example.system), sites)
    changes: dict[Key, VectorChange] = {}
    for site in sites:
        difference = with_image[canonical(site)][0] - without_image[site]
        if variant != "paper" and site.layer == 0:
            difference[0] += 1
        length = float(np.linalg.norm(difference))
        if not length > 0:
            msg = f"at L{site.layer} the image has no effect, so the direction is undefined"
            raise PatchError(msg)
        key = canonical(site) if variant == "paper" else Site("decoder", site.layer, "mlp_out")
        changes[key] = AddChange(difference / length, length if variant == "paper" else 1.0)
    provenance = {"method": f"VSV ({variant})", "example": example.id, "weights": model.weights_hash}
    norm: Norm = {"paper": "kept", "release": "away", "simple": "relative"}[variant]  # pyright: ignore[reportAssignmentType]
    acting_positions = positions or ("last+generated" if variant == "paper" else "all")
    return SteeringVector(changes, acting_positions, strength, model.name, model.config_hash, provenance, norm=norm)
