"""The proof, at load, that a family's spec points at the right tensors."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError, SiteError
from lvlm.access.hook_point import Handles, Place
from lvlm.access.weights import columns, quantized, weight
from lvlm.family.specification import TOLERANCE, layer_list, resolve

if TYPE_CHECKING:
    from lvlm.encoding.encode import Encoding
    from lvlm.model import Lvlm

QUANTIZED = 5e-2
"""Allowed error of the heads' sum where the output projection is quantized: 8-bit layers round their inputs too."""
_LOG = logging.getLogger(__name__)
_PARTS = ("resid_pre", "attn_out", "z", "cross.attn_out", "cross.z", "resid_mid", "mlp_out", "resid_post")


@torch.no_grad()
def validate(model: Lvlm, encoding: Encoding) -> dict[str, float]:
    """Check that the spec points at the right tensors.

    Identities, each relative to its largest value: the heads' contributions ``z_h W_O^h`` and the bias add up to what the
    attention gives; ``resid_pre`` and all that attention and MLP add, after norms, gates and scales, make ``resid_post``
    (in post-norm transformers step by step, through the norms of the residual stream); one layer's ``resid_post`` is the
    next one's ``resid_pre``, but for image positions where the family says so; the unembedding of the normed last
    residual is the logits; reading changes no logit; the rows of attention patterns sum to 1.

    Parameters
    ----------
    model
        A loaded model.
    encoding
        Any encoded example.

    Returns
    -------
    dict
        Largest relative error by identity; NaN for one that a quantized layer does not allow to be checked, with the
        reason as a record of level WARNING of the logger ``lvlm.spec_validation``.

    Raises
    ------
    ModelError
        Naming the identity, the module and the override to write, where one fails.
    """
    inputs = model.collate([encoding])
    plain = model.logits(inputs)
    proof = _Proof(model, encoding)
    hooks = []
    for stack in ("decoder", "vision"):
        for layer in range(len(model.layers(stack))):
            for component in _PARTS:
                cross, name = component.startswith("cross."), component.removeprefix("cross.")
                if name in {"attn_out", "z"} and not model.attends(stack, layer, cross=cross):
                    continue
                place = model.place(stack, layer, name, cross=cross)
                hooks.append(place.watch(lambda x, at=(stack, layer, component): proof.see(*at, x)))
                if name == "z":
                    hooks.append(proof.watch_projected(stack, layer, cross=cross))
            hooks += proof.watch_beside(stack, layer)
    try:
        watched = model.logits(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    proof.all_reached()
    proof.check("reading changes no logit", watched, plain, "decoder")
    seen = plain > torch.finfo(plain.dtype).min / 2  # Chameleon rules out image tokens by the lowest number there is
    last = proof.last["decoder"][:, -1:]
    final = model.unembed(last)[:, 0]
    proof.check("unembedding = logits", torch.where(seen, final, plain), plain, "final_norm")
    _check_patterns(model, inputs, proof)
    return proof.errors


def validate_once(model: Lvlm, encoding: Encoding) -> None:
    """Run `validate` unless this process has already proved the same family on the same configuration.

    What is checked is where tensors are, which depends on configuration, classes and spec, and not on weights.
    """
    from transformers import __version__ as release

    key = (model.config_hash, model.spec, str(model.dtype), type(model.hf), release)
    _proved(key, _Job(model, encoding))


@dataclass(frozen=True, eq=False)
class _Job:
    """A model to be validated, as a cache argument that never decides the key (equal to any other)."""

    model: Lvlm | None
    encoding: Encoding | None

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Job)


@lru_cache(maxsize=64)
def _proved(key: tuple[object, ...], job: _Job) -> bool:
    del key
    if job.model is not None and job.encoding is not None:
        validate(job.model, job.encoding)
        # The cache keeps its arguments for as long as it lasts: it must not keep the model with them.
        object.__setattr__(job, "model", None)
        object.__setattr__(job, "encoding", None)
    return True


@dataclass
class _Proof:
    """What a forward has shown so far; a layer's tensors are let go as soon as the layer is checked."""

    model: Lvlm
    encoding: Encoding
    errors: dict[str, float] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    """Last ``resid_post`` by stack."""
    reached: dict[str, int] = field(default_factory=dict)
    now: dict[str, Tensor] = field(default_factory=dict)

    def see(self, stack: str, layer: int, component: str, x: Tensor) -> None:
        """Take a tensor; with the last of a layer, check the layer."""
        self.now[component] = x.clone()
        if component == "resid_pre":
            self._link(stack, layer, x)
        if component == "resid_post":
            self._layer(stack, layer)
            self.last[stack] = self.now["resid_post"]
            self.reached[stack] = self.reached.get(stack, 0) + 1
            self.now = {}

    def watch_beside(self, stack: str, layer: int) -> list[Any]:
        """Watch what changes the residual stream beside the sites: its own norms, and convolutions."""
        spec, module = self.model.spec.stack(stack), self.model.layers(stack)[layer]
        handles: list[Any] = []
        for name, path in (("attn", spec.attention_conv), ("mlp", spec.mlp_conv)):
            if path:
                place = Place(resolve(module, path, self.model.spec), "output", layout=spec.layout)
                handles.append(place.watch(lambda x, name=name: self.now.update({f"{name}.conv": x.clone()})))
        paths = {"attn": spec.attention_post_norm, "cross": spec.cross_post_norm, "mlp": spec.mlp_post_norm}
        for name, path in paths.items():
            if path:
                norm = resolve(module, path, self.model.spec)

                def keep(_m: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                    self.now[f"{name}.before"], self.now[f"{name}.after"] = args[0].clone(), out.clone()

                handles.append(norm.register_forward_hook(keep))
        return handles

    def watch_projected(self, stack: str, layer: int, *, cross: bool) -> Handles:
        """Watch what an attention gives, before any norm or gate after it."""
        spec, name = self.model.spec.stack(stack), f"{'cross.' if cross else ''}projected"
        path = spec.cross_attention if cross else spec.attention
        module = resolve(self.model.layers(stack)[layer], path, self.model.spec)
        place = Place(module, "output", layout=spec.layout)
        return place.watch(lambda x: self.now.update({name: x.clone()}))

    def skip(self, name: str, reason: str) -> None:
        """Record that an identity was not checked, and log why."""
        self.errors[name] = math.nan
        _LOG.warning("family '%s': %s was not checked: %s", self.model.spec.model_type, name, reason)

    def check(self, name: str, left: Tensor, right: Tensor, override: str, tolerance: float = 0.0) -> None:
        """Record the error of an identity; raise `ModelError` where it is larger than the dtype or `tolerance` allows."""
        family = self.model.spec.model_type
        if left.shape != right.shape:
            shapes = f"{list(left.shape)} against {list(right.shape)}"
            msg = f"family '{family}': {name} fails, {shapes}; override FamilySpec.{override}"
            raise ModelError(msg)
        scale = max(float(right.abs().max()), 1e-6)
        error = float((left.float() - right.float()).abs().max()) / scale
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        if not error <= max(TOLERANCE[self.model.dtype], tolerance):
            msg = f"family '{family}': {name} fails by {error:.1e}; override FamilySpec.{override}"
            raise ModelError(msg)

    def all_reached(self) -> None:
        """Raise `ModelError` where a layer of the decoder was never run."""
        run, count = self.reached.get("decoder", 0), self.model.n_layers
        if run != count:
            msg = (
                f"family '{self.model.spec.model_type}': {run} of the {count} layers at "
                f"'{self.model.spec.stack('decoder').layers}' ran; override FamilySpec.decoder.layers"
            )
            raise ModelError(msg)

    def _link(self, stack: str, layer: int, entering: Tensor) -> None:
        name = f"{stack}.L{layer}: resid_pre = previous resid_post"
        before = self.last.get(stack)
        if before is None or layer == 0 or before.shape != entering.shape or self._begins(stack, layer):
            return
        if stack == "decoder" and layer <= self._added():
            # Something is added to the image's tokens between these layers, and to nothing else.
            image = self.encoding.tokens.image
            others = [i for i in range(entering.shape[1]) if i not in set(image)]
            self.check(f"{name} but for the image", entering[:, others], before[:, others], "added_after")
            return
        self.check(name, entering, before, f"{stack}.layers")

    def _begins(self, stack: str, layer: int) -> bool:
        """Whether a layer is the first of another list than the one before."""
        paths = self.model.spec.stack(stack).layers.split("+")
        lengths = [len(layer_list(self.model.hf, path, self.model.spec)) for path in paths]
        return layer in {sum(lengths[: n + 1]) for n in range(len(lengths))}

    def _added(self) -> int:
        path = self.model.spec.added_after
        return len(attrgetter(path)(self.model.hf.config)) if path else 0

    def _layer(self, stack: str, layer: int) -> None:
        name, now, spec = f"{stack}.L{layer}", self.now, self.model.spec.stack(stack)
        heads = self.model.n_heads if stack == "decoder" else self.model.n_vision_heads
        for kind in ("", "cross."):
            if f"{kind}z" not in now:
                continue
            projection = self.model.output_projection(stack, layer, cross=bool(kind))
            z = now[f"{kind}z"]
            if z.shape[-1] % heads:
                msg = f"family '{self.model.spec.model_type}': {name}.{kind}z of width {z.shape[-1]} has not {heads} heads"
                raise ModelError(msg)
            field_ = f"{stack}.{'cross_' if kind else ''}output_projection"
            identity = f"{name}: sum of {kind}heads = attn_out"
            try:
                total = _sum_of_heads(projection, z, heads)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                if not quantized(projection):
                    raise
                self.skip(identity, f"{type(projection).__name__} does not give the matrix that it applies ({error})")
                continue
            projected = now[f"{kind}projected"]
            if total.numel() == projected.numel():
                total = total.reshape(projected.shape)
            self.check(identity, total, projected, field_, QUANTIZED if quantized(projection) else 0.0)
        post_norm = bool(spec.attention_post_norm)
        stream = now["resid_pre"]
        for part, component in (("attn", "attn_out"), ("cross", "cross.attn_out"), ("mlp", "mlp_out")):
            if component not in now:
                continue
            if component == "mlp_out" and not post_norm and "resid_mid" in now:
                self.check(f"{name}: pre + attn_out = mid", stream, now["resid_mid"], f"{stack}.mid_norm")
            if f"{part}.conv" in now:
                stream = stream + now[f"{part}.conv"]
            stream = stream + now[component]
            if post_norm:
                self.check(
                    f"{name}: stream + {component} = before its norm", stream, now[f"{part}.before"], f"{stack}.{part}"
                )
                stream = now[f"{part}.after"]
        identity = f"{name}: pre + attn_out + mlp_out = post"
        self.check(identity, stream, now["resid_post"], f"{stack}.mlp")


def _sum_of_heads(projection: nn.Linear, z: Tensor, heads: int) -> Tensor:
    """Return ``sum_h z_h W_O^h + b`` in float32 or wider, one product a head: ``[..., H * d]`` -> ``[..., D]``."""
    width = z.shape[-1] // heads
    total = torch.zeros((), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    for head in range(heads):
        span = slice(head * width, (head + 1) * width)
        total = total + z[..., span] @ columns(projection, span, z).T
    bias = weight(projection, "bias")
    return total if bias is None else total + bias.to(total)


def _check_patterns(model: Lvlm, inputs: dict[str, Tensor], proof: _Proof) -> None:
    """Check that attention patterns of the first layers that give them are shares: their rows sum to 1."""
    for cross in (False, True):
        layer = next((n for n in range(model.n_layers) if model.attends("decoder", n, cross=cross)), None)
        if layer is None:
            continue
        site = f"decoder.L{layer}.{'cross.' if cross else ''}pattern"
        try:
            pattern = model.read(inputs, [site], quiet=True)[site].float()
        except (SiteError, ModelError):
            continue  # asking for it will say so
        rows = pattern[:, :, -1].sum(-1)
        proof.check(f"{site}: rows sum to 1", rows, torch.ones_like(rows), "decoder.weights")
