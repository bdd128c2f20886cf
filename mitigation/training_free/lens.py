"""Next-token distributions of inner layers: the logit lens with and without the final norm, and their divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError
from lvlm.family.specification import resolve
from lvlm.sites import Site

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def block_outputs(layers: Sequence[int]) -> tuple[Site, ...]:
    """Return the residual streams after some blocks of the decoder."""
    return tuple(Site("decoder", layer, "resid_post") for layer in layers)


def hidden_state_sites(numbers: Sequence[int]) -> tuple[Site, ...]:
    """Return the sites of Hugging Face's ``hidden_states``: 0 is the embedding, ``k`` the output of block ``k - 1``.

    Examples
    --------
    >>> from mitigation.training_free.lens import hidden_state_sites
    >>> [str(site) for site in hidden_state_sites([0, 3])]
    ['decoder.L0.resid_pre', 'decoder.L2.resid_post']
    """
    return tuple(Site("decoder", k - 1, "resid_post") if k else Site("decoder", 0, "resid_pre") for k in numbers)


def stacked(activations: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensor:
    """Return the activations of several sites, ``[B, D]`` each, as one tensor ``[B, sites, D]``."""
    first = activations[str(sites[0])]
    return torch.stack([activations[str(site)].to(first.device) for site in sites], dim=1)


def lens(model: Lvlm, residual: Tensor) -> Tensor:
    """Return the logits of residuals ``[..., D]`` after the final norm, ``[..., V]``, in at least float32."""
    return at_least_float32(model.unembed(residual))


def lens_without_norm(model: Lvlm, residual: Tensor) -> Tensor:
    """Return the unembedding of residuals ``[..., D]`` without the final norm, ``[..., V]``, in at least float32."""
    return at_least_float32(resolve(model.hf, model.spec.unembedding or "", model.spec)(residual))


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32 if its type is shorter."""
    return x.float() if x.element_size() < 4 else x


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2`` of log-probabilities ``[..., V]``, in nats.

    Examples
    --------
    >>> import torch
    >>> from mitigation.training_free.lens import jensen_shannon
    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> round(float(jensen_shannon(p.log(), q.log())), 4), float(jensen_shannon(p.log(), p.log()))
    (0.6931, 0.0)
    """
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2
    return (torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(m, m)).sum(-1) / 2


def reverse_jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the mean over the vocabulary of ``m (2 log m - log p - log q) / 2``, of log-probabilities ``[..., V]``.

    The Kullback-Leibler divergences of ``m = (p + q) / 2`` from p and q, with the directions exchanged and an average
    in place of the sum, as the released codes of DoLa and ReVisiT compute them.
    """
    m = (log_p.exp() + log_q.exp()) / 2
    return (2 * torch.xlogy(m, m) - m * (log_p + log_q)).mean(-1) / 2


def check_blocks(layers: Sequence[int] | None, name: str = "layers") -> None:
    """Raise `ConfigError` if a parameter is not None or a tuple of different whole numbers from 0."""
    if layers is None:
        return
    valid = isinstance(layers, tuple) and len(layers) > 0 and len(set(layers)) == len(layers)
    if not valid or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in layers):
        msg = f"{name}={layers}: must be None or a tuple of different layer numbers from 0, such as (20, 21)"
        raise ConfigError(msg)


def check_depth(layers: Sequence[int] | None, count: int, label: str, model: Lvlm) -> None:
    """Raise `ConfigError` for a layer number that is not below `count`."""
    high = max(layers or (0,))
    if high >= count:
        msg = f"{label}: layer {high}, but {model.name} has layers 0-{count - 1} here"
        raise ConfigError(msg)
