"""Direct effects of heads at the last position: on the answer's logits, and their change without an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.access.weights import columns, matrix_of, quantized
from lvlm.answer_keys import AnswerKey
from lvlm.encoding.encode import Batch
from lvlm.family.specification import TOLERANCE, resolve
from lvlm.identity_checks import QUANTIZED
from lvlm.image_tokens import image_in_sequence
from lvlm.model import Lvlm
from lvlm.sites import Site
from lvlm.text_only import read_text_only

_BLOCK = 4096
"""Number of unembedding rows per matrix product."""


def direct_attribution(model: Lvlm, batch: Batch, keys: Sequence[AnswerKey], answers: Sequence[str]) -> Tensor:
    """Return each head's direct contribution to the answer's margin, not through later layers: ``[B, L, H]``, in logits.

    ``z W_O W_U`` projected on the margin's gradient by the logits, with the scale of the final norm frozen (direct logit
    attribution; Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

    Raises
    ------
    ModelError
        If a layer's attention does not add ``z W_O``, the logits are not linear in the normed residual, or the final norm
        is neither an RMS norm nor a layer norm.
    """
    layers = range(model.n_layers)
    last = model.n_layers - 1
    heads = [model.head_site(i) for i in layers]
    sums = [replace(site, component="attn_out") for site in heads]
    sites = [*heads, *sums, Site("decoder", last, "resid_post")]
    values = model.read(batch.inputs, sites, take=lambda _, x: x[:, -1].float())
    residual = values[f"decoder.L{last}.resid_post"]  # [B, D]
    frozen = _frozen_norm(model, residual)
    unembedding: Any = resolve(model.hf, model.spec.unembedding or "", model.spec)
    weight = matrix_of(unembedding, residual.to(model.dtype))  # [V, D]
    bias: Tensor | None = getattr(unembedding, "bias", None)
    normed = (
        resolve(model.hf, model.spec.final_norm, model.spec)(residual.to(model.dtype))
        if model.spec.final_norm
        else residual
    )
    # In blocks: the full unembedding in float32 may be as large as many layers.
    parts = [normed.float() @ block.float().T for block in weight.split(_BLOCK)]
    logits = torch.cat(parts, dim=1) + (0 if bias is None else bias.float())
    _check(model, "its logits are not linear in the normed residual", logits, model.unembed(residual.to(model.dtype)))
    gradient = _gradient(logits, keys, answers)  # [B, V]: zero except for the answers' tokens
    used = gradient.any(0).nonzero().flatten()
    direction = gradient[:, used] @ weight[used].float()  # [B, D]
    out = torch.empty(len(residual), model.n_layers, model.n_heads, device=residual.device)
    for i in layers:
        projection = model.head_projection(i)
        w_o = columns(projection, slice(0, projection.in_features), residual.to(model.dtype)).float()
        w_o = w_o.reshape(-1, model.n_heads, model.head_dim)  # [D, H, head_dim]
        z = values[str(heads[i])].reshape(len(residual), model.n_heads, model.head_dim)
        gate = gate_of(model, sums[i])
        written = gate * torch.einsum("bhk,dhk->bhd", z, w_o)
        whole = written.sum(1) if projection.bias is None else written.sum(1) + gate * projection.bias.float()
        tolerance = QUANTIZED if quantized(projection) else 0.0
        _check(model, f"the attention of layer {i} does not add z W_O", whole, values[str(sums[i])], tolerance)
        out[:, i] = (frozen(written) * direction[:, None]).sum(-1)
    return out


def without_image(model: Lvlm, batch: Batch) -> dict[str, Tensor]:
    """Return a batch's inputs without the image: image tokens and their separators are removed from the prompt.

    Raises
    ------
    ModelError
        If the image has no tokens in the decoder's sequence.
    """
    ids = batch.inputs["input_ids"]
    rows = []
    for encoding in batch.encodings:
        removed = {*encoding.tokens.image, *encoding.tokens.separators}
        rows.append([i for i in range(ids.shape[1]) if i not in removed])
    if not image_in_sequence(model) or len({len(row) for row in rows}) != 1 or len(rows[0]) in (0, ids.shape[1]):
        msg = (
            f"{model.name}: the decoder's sequence has no image tokens, so the image cannot be removed from the prompt"
        )
        raise ModelError(msg)
    index = torch.tensor(rows, device=ids.device)
    return {"input_ids": ids.gather(1, index), "attention_mask": torch.ones_like(index)}


def image_difference(model: Lvlm, batch: Batch) -> Tensor:
    """Return the change of each head's output at the last position when the image is removed, ``[B, L, H]``.

    The Euclidean norm of ``A(image) - A(no image)``, before the output projection (vision-aware head divergence;
    He et al. 2024, arXiv 2412.13949).
    """
    sites = [model.head_site(i) for i in range(model.n_layers)]
    outputs = []
    text_inputs = without_image(model, batch)

    def last(_site: Site, x: Tensor) -> Tensor:
        return x[:, -1].float()

    for values in (model.read(batch.inputs, sites, take=last), read_text_only(model, text_inputs, sites, take=last)):
        z = torch.stack([values[str(site)] for site in sites], dim=1)  # [B, L, H * head_dim]
        outputs.append(z.reshape(*z.shape[:2], model.n_heads, model.head_dim))
    return (outputs[0] - outputs[1]).norm(dim=-1)


def gate_of(model: Lvlm, attn_out: Site) -> float:
    """Return the factor of a layer's attention output: the value of its gate, or 1 without a gate."""
    place = model.locate(attn_out)
    if place.gate is None:
        return 1.0
    return float((place.gate.tanh() if place.tanh else place.gate).detach())


def _gradient(logits: Tensor, keys: Sequence[AnswerKey], answers: Sequence[str]) -> Tensor:
    """Return the gradient of each row's margin by its logits, ``[B, V]``."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        margins = [key.margin(row, answer) for key, row, answer in zip(keys, leaf, answers, strict=True)]
        (gradient,) = torch.autograd.grad(torch.stack(margins).sum(), leaf)
    return gradient


def _frozen_norm(model: Lvlm, residual: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the final norm as a linear map of parts of the residual, its scale frozen at that of `residual` ``[B, D]``."""
    if not model.spec.final_norm:
        return lambda part: part
    norm = resolve(model.hf, model.spec.final_norm, model.spec)
    normed = norm(residual.to(model.dtype)).float()
    # A zero-mean probe, large enough to make epsilon negligible: the output is the norm's weight, for both kinds of norm.
    probe = torch.ones(residual.shape[-1], device=residual.device)
    probe[1::2] = -1
    shift = norm(torch.zeros_like(residual[:1]).to(model.dtype)).float()[0]
    weight = (norm((1e3 * probe)[None].to(model.dtype)).float()[0] - shift) * probe
    for centered in (False, True):

        def linear(part: Tensor, centered: bool = centered) -> Tensor:
            return (part - part.mean(-1, keepdim=True) if centered else part) * weight

        whole = linear(residual)
        scale = (whole * (normed - shift)).sum(-1, keepdim=True) / (whole**2).sum(-1, keepdim=True)
        if _error(scale * whole, normed - shift) <= TOLERANCE[model.dtype]:
            return lambda part, scale=scale, linear=linear: linear(part) * scale[:, None]
    msg = f"{model.name}: its final norm ({type(norm).__name__}) is neither an RMS norm nor a layer norm"
    raise ModelError(msg)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).abs().max()) / max(float(expected.abs().max()), 1e-6)


def _check(model: Lvlm, problem: str, actual: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    if not _error(actual, expected) <= max(TOLERANCE[model.dtype], tolerance):
        msg = f"{model.name} (family '{model.spec.model_type}'): {problem}, so direct contributions of heads are undefined"
        raise ModelError(msg)
