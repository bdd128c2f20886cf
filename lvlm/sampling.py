"""Sampled answers: temperature, nucleus (top-p) sampling, and a seed for each answer that does not depend on its batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: logits divided by the temperature, from the smallest set with probability `top_p`.

    The nucleus is that of Holtzman et al. 2020 (arXiv 1904.09751). The random number of each token depends on the seed, the
    name of the answer and the number of tokens before it only: neither the batch nor other answers change it, and two
    conditions that are compared draw the same numbers.

    Raises
    ------
    ConfigError
        For a temperature that is not above 0, or a `top_p` outside (0, 1].

    Examples
    --------
    >>> import torch
    >>> import groundscope as gs
    >>> sampling = gs.Sampling(temperature=0.7, top_p=0.5, seed=1)
    >>> sampling.tokens(torch.tensor([[9.0, 0.0, 1.0]]), ["question 1"], step=0).tolist()
    [0]
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            msg = f"temperature={self.temperature:g}: must be above 0; for greedy answers give no sampling"
            raise ConfigError(msg)
        if not 0 < self.top_p <= 1:
            msg = f"top_p={self.top_p:g}: must be above 0 and at most 1"
            raise ConfigError(msg)

    def tokens(self, logits: Tensor, names: Sequence[str], step: int) -> Tensor:
        """Draw the next token of each row, ``[B, V]`` -> ``[B]``; `names` are those of the rows, `step` counts their tokens."""
        softmax = (logits.double() / self.temperature).softmax(-1)
        probabilities, order = torch.sort(softmax, dim=-1, descending=True, stable=True)
        total = probabilities.cumsum(-1)
        # A token belongs to the nucleus if those before it have less than top_p.
        probabilities = probabilities.masked_fill(total - probabilities >= self.top_p, 0)
        total = probabilities.cumsum(-1)
        draws = torch.tensor([self._uniform(name, step) for name in names], dtype=total.dtype, device=total.device)
        rank = (total <= (draws * total[:, -1])[:, None]).sum(-1)
        last = (probabilities > 0).sum(-1) - 1  # rounding may pass the end of the nucleus
        return order.gather(-1, rank.minimum(last)[:, None])[:, 0]

    def _uniform(self, name: str, step: int) -> float:
        """Return a number in [0, 1) that depends on seed, name and step only."""
        digest = hashlib.sha256(f"{self.seed}\0{step}\0{name}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / (1 << 56)

    def processor(self, names: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a logits processor of transformers under which greedy generation takes the drawn tokens."""
        start: list[int] = []

        def draw(tokens: Tensor, logits: Tensor) -> Tensor:
            start.append(tokens.shape[1])
            chosen = self.tokens(logits, names, tokens.shape[1] - start[0])
            return torch.full_like(logits, -torch.inf).scatter(-1, chosen[:, None], 0.0)

        return draw
