"""The balance of attention between image and text, per layer and head, for right and wrong answers.

The survey of Shu et al. (arXiv 2501.01346, section 3.2.2) names attention that is out of balance between image and text as a
cause of misalignment. Shares are those of the last prompt token, from which the answer is read. Compare them with the share of
tokens: 49 of 60 tokens get .8 of an even attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from circuits.results.statistics import mean_interval
from concepts.schema import Example
from groundscope.core.artifacts import freeze
from groundscope.core.errors import DataError
from groundscope.core.progress import step_bar
from groundscope.core.short_repr import short_repr
from lvlm.answer_keys import answer_key
from lvlm.decoding.attention_edits import read_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.model import Lvlm
from lvlm.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("first", "system", "object", "background", "question", "template")
"""Parts of the prompt: the first token, other tokens before the image, image tokens inside and outside the box of the object in
question (without a box all are background), the question's words, and all others: separators of the image, words of the template
after the question, and a written start of the answer."""


@dataclass(frozen=True, eq=False)
class AttentionBalance:
    """Attention of the last prompt token to each part of the prompt; returned by `attention_balance`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=("neutral",)).where(kind="color")
    >>> balance = gs.attention_balance(model, data.examples[:4], progress=False)
    >>> balance.shares.shape, balance.token_shares.shape
    ((4, 6, 8, 6), (4, 6))
    """

    shares: np.ndarray
    """float32 ``[n, layers, heads, parts]``: attention on each of `PARTS`; sums to 1, or less with a learned sink."""
    token_shares: np.ndarray
    """float32 ``[n, parts]``: share of the prompt's tokens."""
    margins: np.ndarray
    """float32 ``[n]``: log-odds of the true answer."""
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    kinds: tuple[str, ...]
    """Level and kind of each question."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        freeze(self)

    @property
    def right(self) -> np.ndarray:
        """Whether the model prefers the true answer, bool ``[n]``."""
        return self.margins > 0

    def frame(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """Return one row per layer, head and part.

        Columns: layer, head, part; ``right`` and ``wrong`` (mean share for such answers); ``difference`` (wrong minus right,
        within kinds of question, because kinds differ in both) with its interval over images; ``tokens`` (share of tokens).
        Without wrong answers of a kind that has right ones, the difference is NaN.
        """
        import pandas as pd

        n, layers, heads, _ = self.shares.shape
        right = self.right
        kinds = np.array(self.kinds)
        centered = self.shares.astype(np.float64).copy()
        used = np.zeros(n, bool)
        for kind in set(self.kinds):
            rows = kinds == kind
            if right[rows].any() and (~right[rows]).any():
                used |= rows
                centered[rows] -= centered[rows & right].mean(axis=0)
        wrong = used & ~right
        unknown = np.full(self.shares.shape[1:], np.nan)
        difference, low, high = unknown, unknown, unknown
        if wrong.any():
            difference = centered[wrong].mean(axis=0)
            low, high = mean_interval(centered[wrong], [self.groups[i] for i in np.flatnonzero(wrong)], confidence)
        means = {
            name: self.shares[rows].mean(axis=0, dtype=float) if rows.any() else unknown
            for name, rows in (("right", right), ("wrong", ~right))
        }
        at = np.indices(self.shares.shape[1:]).reshape(3, -1)
        columns: dict[str, object] = {"layer": at[0], "head": at[1], "part": [PARTS[i] for i in at[2]]}
        columns |= {name: value.ravel() for name, value in means.items()}
        columns |= {"difference": difference.ravel(), "low": low.ravel(), "high": high.ravel()}
        columns["tokens"] = np.tile(self.token_shares.mean(axis=0), layers * heads)
        return pd.DataFrame(columns)


@torch.no_grad()
def attention_balance(
    model: Lvlm, examples: Sequence[Example], *, batch_size: int = 32, progress: bool | None = None
) -> AttentionBalance:
    """Measure how the last prompt token divides its attention, in every layer and head.

    Parameters
    ----------
    model
        The model.
    examples
        Questions with candidate answers and an image in the decoder's sequence.
    batch_size
        Examples per forward pass; one pass for each example.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    DataError
        If there is no example, an example has no candidate answers, or the image is not in the decoder's sequence.
    ModelError
        If the attention of the family cannot be read.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=("neutral",)).where(kind="color")
    >>> table = gs.attention_balance(model, data.examples[:4], progress=False).frame()
    >>> table[["layer", "head", "part"]].head(2).values.tolist()
    [[0, 0, 'first'], [0, 0, 'system']]
    """
    if not examples:
        msg = "examples is empty; pass at least one question"
        raise DataError(msg)
    keys = [answer_key(model, example) for example in examples]
    shares = np.zeros((len(examples), model.n_layers, model.n_heads, len(PARTS)), np.float32)
    token_shares = np.zeros((len(examples), len(PARTS)), np.float32)
    margins = np.zeros(len(examples), np.float32)
    with step_bar("reading attention", len(examples), show=progress) as advance:
        for batch in model.batches(examples, batch_size):
            weights: dict[int, torch.Tensor] = {}

            def keep(rows: AttentionRows, weights: dict[int, torch.Tensor] = weights) -> None:
                weights[rows.layer] = rows.weights[:, :, -1]  # [rows, heads, keys]

            with read_attention(model, keep):
                logits = model.logits(batch.inputs, batch.images)
            by_layer = torch.stack([weights[layer] for layer in sorted(weights)], dim=1).float().cpu().numpy()
            for row, number, encoding in zip(range(len(logits)), batch.index, batch.encodings, strict=True):
                part = part_of_tokens(encoding.tokens, encoding.example.id)
                member = np.eye(len(PARTS), dtype=np.float32)[part]  # [keys, parts]
                shares[number] = by_layer[row] @ member
                token_shares[number] = member.mean(axis=0)
                margins[number] = float(keys[number].margin(logits[row].float(), examples[number].answer))
                advance()
    return AttentionBalance(
        shares, token_shares, margins, tuple(e.id for e in examples), tuple(e.group for e in examples),
        tuple(f"{e.level} {e.kind}" for e in examples),
    )  # fmt: skip


def part_of_tokens(tokens: TokenMap, name: str = "") -> np.ndarray:
    """Return the index in `PARTS` of each prompt token, int ``[length]``; `name` names the example in an error."""
    if not tokens.image:
        msg = f"example '{name}' has no image tokens in the decoder's sequence; attention to them cannot be measured"
        raise DataError(msg)
    part = np.full(tokens.length, PARTS.index("template"))
    part[list(tokens.system)] = PARTS.index("system")
    part[list(tokens.question)] = PARTS.index("question")
    part[list(tokens.image)] = PARTS.index("background")
    if tokens.subject is not None and tokens.subject in tokens.boxes:
        part[list(tokens.object(tokens.subject))] = PARTS.index("object")
    part[0] = PARTS.index("first")
    return part
