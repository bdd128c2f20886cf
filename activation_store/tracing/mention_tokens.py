"""The tokens of mentions in a batch: their log-probabilities, and the columns of the example table about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from groundscope.core.errors import DataError
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    from concepts.schema import ConceptDataset
    from lvlm.model import Encoding, Lvlm
    from lvlm.token_map import TokenMap


@dataclass(frozen=True)
class MentionTokens:
    """Every token of every mention of a batch, row by row."""

    rows: Tensor
    """int64 [S]: row of the batch."""
    before: Tensor
    """int64 [S]: position before the token, from the end of the sequence; the logits there predict it."""
    ids: Tensor
    """int64 [S]: the token."""
    counts: tuple[int, ...]
    """Number of tokens of each row."""
    keep: int
    """Number of last positions whose logits are needed."""

    @classmethod
    def of(cls, model: Lvlm, inputs: Mapping[str, Tensor], maps: Sequence[TokenMap]) -> Self | None:
        """Return the tokens of a batch's mentions; None if no row has any."""
        name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
        ids = inputs[name].cpu()
        places = [
            (row, position)
            for row, tokens in enumerate(maps)
            for first, last in tokens.mentions
            for position in range(first, last + 1)
        ]
        if not places:
            return None
        rows, positions = torch.tensor(places).T
        before = positions - 1 - ids.shape[1]
        counts = tuple(sum(row == number for row, _ in places) for number in range(len(maps)))
        return cls(rows, before, ids[rows, positions], counts, -int(before.min()))

    def select(self, logits: Tensor) -> Tensor:
        """Return the logits that predict the tokens, ``[B, keep or more, V]`` -> ``[S, V]``."""
        return logits[self.rows.to(logits.device), self.before.to(logits.device)]

    def log_probabilities(self, logits: Tensor) -> list[list[float]]:
        """Return the log-probability of each token in nats, row by row, from the result of `select`."""
        wide = logits.float().log_softmax(-1)
        values = wide.gather(-1, self.ids.to(wide.device)[:, None])[:, 0].tolist()
        out, start = [], 0
        for count in self.counts:
            out.append(values[start : start + count])
            start += count
        return out


def build_mentions(encoding: Encoding, log_p: Sequence[float]) -> dict[str, Any]:
    """Return the columns ``mention:…`` of an example; `log_p` has the log-probability of each token of its mentions."""
    mentions, places = encoding.example.mentions, encoding.tokens.mentions
    totals, firsts, start = [], [], 0
    for first, last in places:
        count = last - first + 1
        totals.append(float(sum(log_p[start : start + count])))
        firsts.append(float(log_p[start]))
        start += count
    return {
        "mention:noun": [m.noun for m in mentions],
        "mention:present": [float("nan") if m.present is None else float(m.present) for m in mentions],
        "mention:characters": [[m.start, m.stop] for m in mentions],
        "mention:tokens": [[first, last + 1] for first, last in places],
        "mention:log_p": totals,
        "mention:first_log_p": firsts,
    }


def check_mentions(tokens: Sequence[str], data: ConceptDataset) -> None:
    """Raise `DataError` if tokens of mentions are requested and no example has any."""
    names = [tokens] if isinstance(tokens, str) else tokens
    requested = next((name for name in names if TokenSelection.parse(name).role == "mention"), None)
    if requested is not None and not any(example.mentions for example in data):
        msg = (
            f"token selection '{requested}': no example of dataset '{data.name}' has mentions; make them from texts and "
            "annotations with concepts.with_mentions"
        )
        raise DataError(msg)
