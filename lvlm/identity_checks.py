"""Check at load, by numerical identities of a forward pass, that the paths of a family's spec lead to the right tensors."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError, SiteError
from lvlm.access.hook_point import HookHandles, HookPoint
from lvlm.access.weights import columns, quantized, weight
from lvlm.encoding.encode import Encoding
from lvlm.family.specification import TOLERANCE, layer_list, resolve
from lvlm.model import Lvlm

QUANTIZED = 5e-2
"""Tolerance for the sum over heads if the output projection is quantized: 8-bit layers also round their inputs."""
_LOG = logging.getLogger(__name__)
_PARTS = ("resid_pre", "attn_out", "z", "cross.attn_out", "cross.z", "resid_mid", "mlp_out", "resid_post")


@torch.no_grad()
def validate(model: Lvlm, encoding: Encoding) -> dict[str, float]:
    """Check that the spec's paths lead to the right tensors.

    Identities, with errors relative to the largest value:

    - the heads' contributions ``z_h W_O^h`` and the bias sum to the attention's output;
    - ``resid_pre`` plus the contributions of attention and MLP, after norms, gates and scales, is ``resid_post`` (in post-norm
      transformers step by step, through the norms of the residual stream);
    - a layer's ``resid_post`` is the next layer's ``resid_pre``, except at image positions if the spec declares it;
    - the unembedding of the normed last residual is the logits;
    - reading activations does not change the logits;
    - rows of attention patterns sum to 1.

    Parameters
    ----------
    model
        A loaded model.
    encoding
        Any encoded example.

    Returns
    -------
    dict
        Largest relative error by identity; NaN for an identity that cannot be checked because a layer is quantized, with the
        reason as a warning of the logger ``lvlm.identity_checks``.

    Raises
    ------
    ModelError
        If an identity fails; names the identity, the module and the field of the spec to override.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.identity_checks import validate
    >>> model = gs.load_lvlm("tiny", validate=False)
    >>> errors = validate(model, model.encode(gs.scenes.dataset(10, seed=0).examples[0]))
    >>> max(errors.values()) < 1e-5
    True
    """
    inputs = model.collate([encoding])
    unhooked_logits = model.logits(inputs)
    checks = _Checks(model, encoding)
    hooks = []
    for stack in ("decoder", "vision"):
        for layer in range(len(model.layers(stack))):
            for component in _PARTS:
                cross, name = component.startswith("cross."), component.removeprefix("cross.")
                if name in {"attn_out", "z"} and not model.attends(stack, layer, cross=cross):
                    continue
                point = model.place(stack, layer, name, cross=cross)
                hooks.append(point.watch(lambda x, at=(stack, layer, component): checks.record(*at, x)))
                if name == "z":
                    hooks.append(checks.record_projected(stack, layer, cross=cross))
            hooks += checks.record_other_changes(stack, layer)
    try:
        logits = model.logits(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    checks.check_reached()
    checks.check("reading changes no logit", logits, unhooked_logits, "decoder")
    # Chameleon sets the logits of image tokens to the lowest finite number.
    possible = unhooked_logits > torch.finfo(unhooked_logits.dtype).min / 2
    final = model.unembed(checks.last["decoder"][:, -1:])[:, 0]
    checks.check("unembedding = logits", torch.where(possible, final, unhooked_logits), unhooked_logits, "final_norm")
    _check_patterns(model, inputs, checks)
    return checks.errors


def validate_once(model: Lvlm, encoding: Encoding) -> None:
    """Run `validate` unless this process has already checked the same spec with the same configuration and classes.

    Weights are not part of the key, because they do not change where tensors are.
    """
    from transformers import __version__ as release

    key = (model.config_hash, model.spec, str(model.dtype), type(model.hf), release)
    _validate_key(key, _Job(model, encoding))


@dataclass(frozen=True, eq=False)
class _Job:
    """Arguments of `validate`; equal to any other job, so that only the key determines the cache entry."""

    model: Lvlm | None
    encoding: Encoding | None

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Job)


@lru_cache(maxsize=64)
def _validate_key(key: tuple[object, ...], job: _Job) -> bool:
    del key
    if job.model is not None and job.encoding is not None:
        validate(job.model, job.encoding)
        # The cache keeps its arguments, and must not keep the model alive.
        object.__setattr__(job, "model", None)
        object.__setattr__(job, "encoding", None)
    return True


@dataclass
class _Checks:
    """Checks of one forward pass; a layer's tensors are released as soon as the layer is checked."""

    model: Lvlm
    encoding: Encoding
    errors: dict[str, float] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    """Last ``resid_post`` by stack."""
    reached: dict[str, int] = field(default_factory=dict)
    """Number of layers that ran, by stack."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the current layer by component."""

    def record(self, stack: str, layer: int, component: str, x: Tensor) -> None:
        """Store a tensor; after the last one of a layer, check the layer."""
        self.values[component] = x.clone()
        if component == "resid_pre":
            self._check_link(stack, layer, x)
        if component == "resid_post":
            self._check_layer(stack, layer)
            self.last[stack] = self.values["resid_post"]
            self.reached[stack] = self.reached.get(stack, 0) + 1
            self.values = {}

    def record_other_changes(self, stack: str, layer: int) -> list[Any]:
        """Record changes of the residual stream other than sites: its norms, and convolutions."""
        spec, module = self.model.spec.stack(stack), self.model.layers(stack)[layer]
        handles: list[Any] = []
        for name, path in (("attn", spec.attention_conv), ("mlp", spec.mlp_conv)):
            if path:
                point = HookPoint(resolve(module, path, self.model.spec), "output", layout=spec.layout)
                handles.append(point.watch(lambda x, name=name: self.values.update({f"{name}.conv": x.clone()})))
        paths = {"attn": spec.attention_post_norm, "cross": spec.cross_post_norm, "mlp": spec.mlp_post_norm}
        for name, path in paths.items():
            if path:
                norm = resolve(module, path, self.model.spec)

                def store(_m: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                    self.values[f"{name}.before"], self.values[f"{name}.after"] = args[0].clone(), out.clone()

                handles.append(norm.register_forward_hook(store))
        return handles

    def record_projected(self, stack: str, layer: int, *, cross: bool) -> HookHandles:
        """Record an attention's output before any norm or gate."""
        spec, name = self.model.spec.stack(stack), f"{'cross.' if cross else ''}projected"
        path = spec.cross_attention if cross else spec.attention
        module = resolve(self.model.layers(stack)[layer], path, self.model.spec)
        point = HookPoint(module, "output", layout=spec.layout)
        return point.watch(lambda x: self.values.update({name: x.clone()}))

    def skip(self, name: str, reason: str) -> None:
        """Record that an identity was not checked, and log the reason."""
        self.errors[name] = math.nan
        _LOG.warning("family '%s': %s was not checked: %s", self.model.spec.model_type, name, reason)

    def check(self, name: str, left: Tensor, right: Tensor, override: str, tolerance: float = 0.0) -> None:
        """Record the error of an identity; raise `ModelError` if it exceeds the tolerance of the dtype and `tolerance`."""
        family = self.model.spec.model_type
        if left.shape != right.shape:
            shapes = f"{list(left.shape)} and {list(right.shape)}"
            msg = f"family '{family}': {name} fails with shapes {shapes}; override FamilySpec.{override}"
            raise ModelError(msg)
        scale = max(float(right.abs().max()), 1e-6)
        error = float((left.float() - right.float()).abs().max()) / scale
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        if not error <= max(TOLERANCE[self.model.dtype], tolerance):
            msg = f"family '{family}': {name} fails with relative error {error:.1e}; override FamilySpec.{override}"
            raise ModelError(msg)

    def check_reached(self) -> None:
        """Raise `ModelError` if a layer of the decoder did not run."""
        run, count = self.reached.get("decoder", 0), self.model.n_layers
        if run != count:
            msg = (
                f"family '{self.model.spec.model_type}': {run} of the {count} layers at "
                f"'{self.model.spec.stack('decoder').layers}' ran; override FamilySpec.decoder.layers"
            )
            raise ModelError(msg)

    def _check_link(self, stack: str, layer: int, resid_pre: Tensor) -> None:
        name = f"{stack}.L{layer}: resid_pre = previous resid_post"
        before = self.last.get(stack)
        if before is None or layer == 0 or before.shape != resid_pre.shape or self._begins_list(stack, layer):
            return
        if stack == "decoder" and layer <= self._layers_with_added_features():
            # Between these layers, features are added at image positions only.
            image = self.encoding.tokens.image
            others = [i for i in range(resid_pre.shape[1]) if i not in set(image)]
            self.check(f"{name} except at the image", resid_pre[:, others], before[:, others], "added_after")
            return
        self.check(name, resid_pre, before, f"{stack}.layers")

    def _begins_list(self, stack: str, layer: int) -> bool:
        """Whether a layer is the first of its list of layers."""
        paths = self.model.spec.stack(stack).layers.split("+")
        lengths = [len(layer_list(self.model.hf, path, self.model.spec)) for path in paths]
        return layer in {sum(lengths[: n + 1]) for n in range(len(lengths))}

    def _layers_with_added_features(self) -> int:
        path = self.model.spec.added_after
        return len(attrgetter(path)(self.model.hf.config)) if path else 0

    def _check_layer(self, stack: str, layer: int) -> None:
        name = f"{stack}.L{layer}"
        for cross in (False, True):
            if f"{'cross.' if cross else ''}z" in self.values:
                self._check_heads(stack, layer, cross=cross)
        values, post_norm = self.values, bool(self.model.spec.stack(stack).attention_post_norm)
        stream = values["resid_pre"]
        for part, component in (("attn", "attn_out"), ("cross", "cross.attn_out"), ("mlp", "mlp_out")):
            if component not in values:
                continue
            if component == "mlp_out" and not post_norm and "resid_mid" in values:
                self.check(f"{name}: pre + attn_out = mid", stream, values["resid_mid"], f"{stack}.mid_norm")
            if f"{part}.conv" in values:
                stream = stream + values[f"{part}.conv"]
            stream = stream + values[component]
            if post_norm:
                identity = f"{name}: stream + {component} = before its norm"
                self.check(identity, stream, values[f"{part}.before"], f"{stack}.{part}")
                stream = values[f"{part}.after"]
        self.check(f"{name}: pre + attn_out + mlp_out = post", stream, values["resid_post"], f"{stack}.mlp")

    def _check_heads(self, stack: str, layer: int, *, cross: bool) -> None:
        kind = "cross." if cross else ""
        heads = self.model.n_heads if stack == "decoder" else self.model.n_vision_heads
        projection = self.model.output_projection(stack, layer, cross=cross)
        z, projected = self.values[f"{kind}z"], self.values[f"{kind}projected"]
        if z.shape[-1] % heads:
            msg = (
                f"family '{self.model.spec.model_type}': the width {z.shape[-1]} of {stack}.L{layer}.{kind}z is not a "
                f"multiple of {heads} heads; override FamilySpec.{stack}.{'cross_' if cross else ''}output_projection"
            )
            raise ModelError(msg)
        identity = f"{stack}.L{layer}: sum of {kind}heads = attn_out"
        try:
            total = _sum_of_heads(projection, z, heads)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if not quantized(projection):
                raise
            self.skip(identity, f"{type(projection).__name__} does not return the matrix that it applies ({error})")
            return
        if total.numel() == projected.numel():
            total = total.reshape(projected.shape)
        override = f"{stack}.{'cross_' if cross else ''}output_projection"
        self.check(identity, total, projected, override, QUANTIZED if quantized(projection) else 0.0)


def _sum_of_heads(projection: nn.Linear, z: Tensor, heads: int) -> Tensor:
    """Return ``sum_h z_h W_O^h + b`` in float32 or wider, one product per head: ``[..., H * d]`` -> ``[..., D]``."""
    width = z.shape[-1] // heads
    total = torch.zeros((), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    for head in range(heads):
        span = slice(head * width, (head + 1) * width)
        total = total + z[..., span] @ columns(projection, span, z).T
    bias = weight(projection, "bias")
    return total if bias is None else total + bias.to(total)


def _check_patterns(model: Lvlm, inputs: dict[str, Tensor], checks: _Checks) -> None:
    """Check for the first layer with self-attention, and with cross-attention, that rows of patterns sum to 1."""
    for cross in (False, True):
        layer = next((n for n in range(model.n_layers) if model.attends("decoder", n, cross=cross)), None)
        if layer is None:
            continue
        site = f"decoder.L{layer}.{'cross.' if cross else ''}pattern"
        try:
            pattern = model.read(inputs, [site], quiet=True)[site].float()
        except (SiteError, ModelError):
            continue  # reading the pattern reports the same error
        rows = pattern[:, :, -1].sum(-1)
        checks.check(f"{site}: rows sum to 1", rows, torch.ones_like(rows), "decoder.weights")
