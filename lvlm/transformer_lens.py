"""A copy of a model as TransformerLens bridge, with its hook names and analysis tools."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from groundscope.core.errors import ModelError
from lvlm.model import Lvlm

_BUILDING = threading.Lock()


def as_transformer_lens(model: Lvlm) -> Any:
    """Return a TransformerLens bridge over a copy of the model.

    TransformerLens replaces modules in place and uses eager attention, so the bridge needs a copy of the model. It is built from
    the module in memory; nothing is downloaded or installed. Run it on the inputs of `Lvlm.encode`:
    ``bridge.run_with_cache(inputs["input_ids"], pixel_values=inputs["pixel_values"])``.

    Parameters
    ----------
    model
        The model.

    Raises
    ------
    ModelError
        If TransformerLens has no adapter for the model's class.

    Returns
    -------
    TransformerBridge
        With the hooks ``blocks.<l>.hook_resid_pre``, ``…hook_resid_mid``, ``…hook_resid_post``, ``…hook_attn_out``,
        ``…hook_mlp_out``, ``blocks.<l>.attn.hook_z`` and more, and weights such as ``blocks[l].attn.W_O``.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    name = type(model.hf).__name__
    if name not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(sorted(n for n in SUPPORTED_ARCHITECTURES if n.endswith("ForConditionalGeneration")))
        msg = f"TransformerLens has no adapter for {name}; it supports {supported}"
        raise ModelError(msg)
    with _BUILDING, _without_libraries(SUPPORTED_ARCHITECTURES[name]):
        network = copy.deepcopy(model.hf)
        bridge = build_bridge_from_module(network, name, hf_config=network.config)
    return bridge.eval()


@contextmanager
def _without_libraries(adapter: Any) -> Iterator[None]:
    """Remove an adapter's requirement of packages that load images: this package loads images with Pillow."""
    own = "required_libraries" in vars(adapter)
    before = adapter.required_libraries
    adapter.required_libraries = []
    try:
        yield
    finally:
        if own:
            adapter.required_libraries = before
        else:
            del adapter.required_libraries
