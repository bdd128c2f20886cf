"""A model of real width with few layers and random weights: what a forward pass costs, without the weights of the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.encoding.encode import Encoding
from lvlm.model import Lvlm

LAYERS = 2
"""Layers of each stack of a thin model."""
_DEPTHS = ("num_hidden_layers", "depth", "n_layer", "num_layers")
_BLOCK = 1 << 20


@torch.no_grad()
def thin_model(outline: Lvlm, layers: int = LAYERS, *, device: str = "cpu") -> Lvlm:
    """Return a model with the widths of another one, its first layers, and random weights.

    Parameters
    ----------
    outline
        A model, also one without weights (`lvlm.loading.outline_lvlm`).
    layers
        Number of layers of the decoder and of the vision tower; at most those of the model.
    device
        Device of the weights, which are in the number type of `outline`.

    Returns
    -------
    Lvlm
        Its times per layer are those of the full model; its answers mean nothing.

    Raises
    ------
    ModelError
        If the family cannot be built with fewer layers.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.thin_model import thin_model
    >>> thin = thin_model(gs.load_lvlm("tiny"))
    >>> thin.n_layers, thin.n_vision_layers, thin.width
    (2, 2, 192)
    """
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(outline.hf.config)
    parts = {id(part): part for part in (config.get_text_config(decoder=True), _vision(config)) if part is not None}
    for part in parts.values():
        _shorten(part, layers)
    try:
        with no_init_weights():
            network = type(outline.hf)(config).to(outline.dtype)
        for tensor in network.parameters():
            _fill(tensor)
        return Lvlm(network.to(device), outline.processor, outline.spec, f"{outline.name}, {layers} layers")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        text = str(error).strip().splitlines()
        msg = f"{outline.name} cannot be built with {layers} layers: {text[0] if text else type(error).__name__}"
        raise ModelError(msg) from error


def count_flops(model: Lvlm, encoding: Encoding) -> tuple[float, float]:
    """Return the floating-point operations of a forward pass of one example: of the image, and of the text.

    Two operations for each weight of a matrix and each token, and ``4 T^2 D`` for the attention of a layer over T tokens of
    width D; the unembedding counts for one token, and every expert of a mixture.

    Parameters
    ----------
    model
        The model, also one without weights.
    encoding
        An encoded example.

    Returns
    -------
    tuple of float
        Operations of the vision tower and the projector, which questions about one image may share; operations of the decoder.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.thin_model import count_flops
    >>> model = gs.load_lvlm("tiny")
    >>> image, text = count_flops(model, model.encode(gs.scenes.dataset(10, seed=0).examples[0]))
    >>> image > 0, text > image
    (True, True)
    """
    sequence, length = encoding.tokens.sequence, encoding.tokens.length
    unembedding = sum(p.numel() for p in _module(model, model.spec.unembedding).parameters())
    image = _stack_flops(model, "vision", int(sequence.get("vision", 0)))
    projector = sum(p.numel() for p in _module(model, model.spec.projector).parameters()) if model.spec.projector else 0
    image += 2.0 * projector * int(sequence.get("projector", 0))
    return image, _stack_flops(model, "decoder", length) + 2.0 * unembedding


def weight_bytes(model: Lvlm) -> int:
    """Return the bytes of a model's weights in its number type, also of a model without weights."""
    return sum(p.numel() * p.element_size() for p in model.hf.parameters())


def _stack_flops(model: Lvlm, stack: str, tokens: int) -> float:
    layers = model.layers(stack)
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    width = 0
    if layers:
        try:
            width = model.output_projection(stack, 0).out_features
        except ModelError:
            width = model.width if stack == "decoder" else 0
    return 2.0 * weights * tokens + 4.0 * len(layers) * width * float(tokens) ** 2


def _module(model: Lvlm, path: str) -> Any:
    from lvlm.family.specification import resolve

    return resolve(model.hf, path, model.spec)


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None)


def _shorten(config: Any, layers: int) -> None:
    """Set the number of layers, and shorten lists with one entry per layer, or of layers."""
    name = next((n for n in _DEPTHS if isinstance(getattr(config, n, None), int)), None)
    if name is None or getattr(config, name) <= layers:
        return
    before = getattr(config, name)
    setattr(config, name, layers)
    for key, value in list(vars(config).items()):
        if not isinstance(value, list) or not ("layer" in key or key.endswith(("_indexes", "_indices"))):
            continue
        if key.startswith("intermediate"):  # the width after the tower depends on their number
            setattr(config, key, [min(int(v), layers - 1) for v in value])
        elif len(value) == before:
            setattr(config, key, value[:layers])
        elif all(isinstance(v, int) for v in value):
            setattr(config, key, [v for v in value if v < layers])


def _fill(tensor: Tensor) -> None:
    """Fill with small random numbers: zeros would be faster than weights on some processors, and large numbers overflow."""
    draw = torch.Generator().manual_seed(0)
    block = (torch.randn(min(_BLOCK, tensor.numel()), generator=draw) * 0.02).to(tensor.dtype)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
