"""Eager attention written out for one row without padding, in whole uncached forwards, with a rule in place of the usual one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm import Lvlm


@dataclass(frozen=True)
class Call:
    """Attention of one layer over a prompt and its answer so far, of n tokens."""

    layer: int
    scores: Tensor
    """``[heads, n, n]``, after softcap; minus infinity where a query does not attend."""
    values: Tensor
    """``[heads, n, width]``."""
    image: Tensor
    """Which tokens are image tokens, bool ``[n]``."""
    prompt: int
    """Number of tokens of the prompt."""

    @property
    def live(self) -> range:
        """The last prompt token and the generated ones."""
        return range(self.prompt - 1, self.scores.shape[1])

    @property
    def plain(self) -> Tensor:
        """Outputs of the heads ``[heads, n, width]``."""
        return self.scores.softmax(-1) @ self.values


Rule = Callable[[Call], Tensor]
"""From the call to the outputs of the heads, ``[heads, n, width]``."""


class _Interface(dict):
    def __init__(self, usual: Any, modules: dict[int, int], attend: Callable[..., Any]) -> None:
        super().__init__()
        self.usual, self.modules, self.attend = usual, modules, attend

    def get_interface(self, name: str, default: Any) -> Any:
        usual = self.usual.get_interface(name, default)
        modules, attend = self.modules, self.attend
        return lambda m, *a, **k: attend(modules[id(m)], *a, **k) if id(m) in modules else usual(m, *a, **k)


@contextmanager
def by_hand(lvlm: Lvlm, rule: Rule, prompt: int) -> Iterator[None]:
    """Attend by a rule in every layer of the decoder."""
    image: list[Tensor] = []

    def ids(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        image[:] = [kwargs["input_ids"][0] == lvlm.content_id]

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        _, heads, n, _ = q.shape
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * options["scaling"]
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        if attention_mask is not None:
            mask = attention_mask[0, 0] if attention_mask.dtype == torch.bool else attention_mask[0, 0] > -1
        scores = scores[0].masked_fill(~mask, -torch.inf)
        out = rule(Call(layer, scores, v[0], image[0], prompt))
        return out.transpose(0, 1)[None], None

    modules = {id(layer.self_attn): i for i, layer in enumerate(lvlm.layers("decoder"))}
    names = type(lvlm.layers("decoder")[0].self_attn).forward.__globals__
    usual = names["ALL_ATTENTION_FUNCTIONS"]
    with ExitStack() as stack:
        stack.callback(lvlm.hf.register_forward_pre_hook(ids, with_kwargs=True).remove)
        names["ALL_ATTENTION_FUNCTIONS"] = _Interface(usual, modules, attend)
        stack.callback(names.__setitem__, "ALL_ATTENTION_FUNCTIONS", usual)
        yield


def edited_scores(change: Callable[[Call, int, int], Tensor], layers: range | list[int], *, live: bool = True) -> Rule:
    """Return the rule that changes the scores ``[n]`` of one head and query at a time."""

    def rule(call: Call) -> Tensor:
        if call.layer not in layers:
            return call.plain
        scores = call.scores.clone()
        for head in range(len(scores)):
            for query in call.live if live else range(scores.shape[1]):
                scores[head, query] = change(call, head, query).masked_fill(
                    scores[head, query] == -torch.inf, -torch.inf
                )
        return scores.softmax(-1) @ call.values

    return rule


def plain(call: Call) -> Tensor:
    return call.plain
