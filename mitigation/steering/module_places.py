"""Names of the modules at the places of a vector, so that code without groundscope can apply the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuits.interventions.intervention import head_site
from lvlm.access.site_lookup import find_hook_point
from lvlm.encoding.image_token_masks import by_token_id, without_class_token
from lvlm.image_tokens import image_in_sequence
from lvlm.sites import Head
from mitigation.steering.places import Key, site_of
from mitigation.steering.vector_file import tensor_name

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from mitigation.steering.vector import SteeringVector

NO_IMAGE = -1
"""Id of the image token of a family whose decoder reads no image tokens: no token has it."""


def module_places(vector: SteeringVector, model: Lvlm) -> dict[str, Any]:
    """Return ``modules`` and ``image_token_id`` for the metadata of a vector's file.

    ``modules`` maps each place, and ``gate``, to the name of a module, ``input`` or ``output``, the element of a tuple, and the
    columns of a head. A place whose value is not simply a module's input or output (fused projections, gated or flattened
    outputs, ``resid_mid``) is left out, and so is an image token id where other tokens share it.
    """
    names = {module: name for name, module in model.hf.named_modules()}
    places: dict[str, Key] = {tensor_name(key): key for key in vector.changes}
    if vector.gate is not None:
        places["gate"] = vector.gate.place
    modules: dict[str, Any] = {}
    for name, key in places.items():
        site = head_site(model, site_of(key)) if isinstance(key, Head) else site_of(key)
        if site.component == "resid_mid":
            continue
        point = find_hook_point(model, site)
        converted = point.gate is not None or point.third is not None or point.layout or point.row_mask
        if converted or point.module not in names:
            continue
        about: dict[str, Any] = {"module": names[point.module], "side": point.side, "element": point.element}
        if isinstance(key, Head):
            about["columns"] = [key.head * model.head_dim, (key.head + 1) * model.head_dim]
        modules[name] = about
    return {"modules": modules, "image_token_id": _image_token_id(model)}


def _image_token_id(model: Lvlm) -> int | None:
    """Return the id that marks every image token and no other token; None if no id does."""
    if not image_in_sequence(model):
        return NO_IMAGE
    mask = model.image_encoding.image_token_mask
    strategy = getattr(model.hf.config, "vision_feature_select_strategy", "default")
    plain = mask is by_token_id or (mask is without_class_token and strategy != "full")
    return model.content_id if plain else None
