"""Four debated explanations of misalignment at decoding, each tested by correlation and by an intervention, in one table.

Section 4.2 of the survey of Shu et al. (arXiv 2501.01346) reports that decoding methods rest on explanations that differ: the
model attends to irrelevant image tokens (Woo et al. 2024; Gong et al. 2024), to text instead of the image (Leng et al. 2024; Liu
et al. 2024), to summary tokens (OPERA, Huang et al. 2024), or loses the image in a long context (SGD, Min et al. 2024). Each
predicts which answers are wrong, and that removing its cause helps them; both are measured, because a symptom also correlates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from circuits.attention_knockout import blocked
from circuits.results.statistics import mean_interval
from concepts.schema import Example
from diagnosis.attention_shares import PARTS, AttentionBalance, attention_balance, part_of_tokens
from diagnosis.ceiling_regression import regress_correctness
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.progress import step_bar
from groundscope.core.statistics import FEW_GROUPS, Estimate
from groundscope.core.text import format_count
from lvlm.answer_keys import answer_key
from lvlm.decoding.attention_edits import edit_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.encoding.encode import Batch
from lvlm.model import Lvlm

if TYPE_CHECKING:
    import pandas as pd

MIN_WRONG = 15
"""Smallest number of wrong answers of a row of the table."""
FACTOR = 2.0
"""Factor on the attention weights of image tokens, before they are normalized."""
PADDING = "Describe the image. "
"""Text that is put before the question, without information about the image."""
REPEATS = 3
"""How often it is repeated."""
VERDICTS = ("supported", "intervention only", "correlation only", "not supported")


@dataclass(frozen=True)
class Explanation:
    """One explanation: what its score predicts, and what removing its cause changes.

    Examples
    --------
    >>> from diagnosis import Explanation
    >>> from groundscope.core.statistics import Estimate
    >>> odds, change, nothing = Estimate(0.7, 0.5, 0.9, 100), Estimate(0.8, 0.3, 1.2, 30), Estimate(0.1, -0.1, 0.2, 30)
    >>> Explanation("text over image", "1 - image", "doubled", 100, 30, odds, change, nothing, change, 0.5).verdict
    'supported'
    """

    name: str
    score: str
    """What is measured in the unchanged model."""
    intervention: str
    """What is changed, and the control."""
    n: int
    wrong: int
    odds_ratio: Estimate
    """Factor of the odds of a right answer for one standard deviation more of the score, with the kind of question as control;
    the explanation predicts less than 1."""
    change: Estimate
    """Mean change of the log-odds of the true answer in wrong answers, by the intervention."""
    control: Estimate
    """The same by the control."""
    difference: Estimate
    """``change - control``, paired by question; the explanation predicts more than 0."""
    corrected: float
    """Share of the wrong answers that become right by the intervention; NaN for a long context, where nothing is removed."""

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`, by the intervals."""
        correlated, helps = self.odds_ratio.high < 1, self.difference.low > 0 and self.change.low > 0
        return VERDICTS[(0 if helps else 2) if correlated else (1 if helps else 3)]


@dataclass(frozen=True)
class _Test:
    """How an explanation is tested."""

    score: str
    measure: Callable[[AttentionBalance], np.ndarray]
    """Score of each example ``[n]``; NaN where it is undefined."""
    intervention: str
    change: Callable[[Lvlm, Batch, np.random.Generator], AbstractContextManager[None]]
    control: Callable[[Lvlm, Batch, np.random.Generator], AbstractContextManager[None]]


def _share(balance: AttentionBalance, *parts: str) -> np.ndarray:
    """Return the attention on some parts, mean over layers and heads, float64 ``[n]``."""
    return balance.shares.mean(axis=(1, 2), dtype=float)[:, [PARTS.index(p) for p in parts]].sum(axis=1)


def _background(balance: AttentionBalance) -> np.ndarray:
    """Return the share of the attention on the image that is outside the box; NaN without a box."""
    outside, inside = _share(balance, "background"), _share(balance, "object")
    has_box = balance.token_shares[:, PARTS.index("object")] > 0
    return np.where(has_box, outside / np.maximum(outside + inside, 1e-12), np.nan)


@contextmanager
def _cut(
    model: Lvlm, batch: Batch, keys: Callable[[np.ndarray, np.ndarray], np.ndarray], queries: str
) -> Iterator[None]:
    """Block attention, in all layers, from the last token or from all tokens after the image to keys of each example.

    `keys` gets the part of each token and its position, and returns positions.
    """
    length = batch.encodings[0].tokens.length
    block = torch.zeros(len(batch.encodings), length, length, dtype=torch.bool)
    for row, encoding in enumerate(batch.encodings):
        tokens = encoding.tokens
        part = part_of_tokens(tokens, encoding.example.id)
        at = torch.as_tensor(keys(part, np.arange(length)).astype(np.int64))
        rows = torch.tensor([tokens.last] if queries == "last" else list(tokens.suffix))
        block[row, rows[:, None], at[None]] = True
    block.diagonal(dim1=1, dim2=2).fill_(False)
    with blocked(model, range(model.n_layers), block.to(model.device)):
        yield


def _background_keys(part: np.ndarray, at: np.ndarray) -> np.ndarray:
    return at[part == PARTS.index("background")] if (part == PARTS.index("object")).any() else at[:0]


def _without_background(model: Lvlm, batch: Batch, _rng: np.random.Generator) -> AbstractContextManager[None]:
    return _cut(model, batch, _background_keys, "suffix")


def _without_random_image(model: Lvlm, batch: Batch, rng: np.random.Generator) -> AbstractContextManager[None]:
    def keys(part: np.ndarray, at: np.ndarray) -> np.ndarray:
        image = at[np.isin(part, (PARTS.index("background"), PARTS.index("object")))]
        return rng.choice(image, len(_background_keys(part, at)), replace=False)

    return _cut(model, batch, keys, "suffix")


def _without_template(model: Lvlm, batch: Batch, _rng: np.random.Generator) -> AbstractContextManager[None]:
    return _cut(model, batch, lambda part, at: at[:-1][part[:-1] == PARTS.index("template")], "last")


def _without_question(model: Lvlm, batch: Batch, rng: np.random.Generator) -> AbstractContextManager[None]:
    def keys(part: np.ndarray, at: np.ndarray) -> np.ndarray:
        question = at[part == PARTS.index("question")]
        count = int((part[:-1] == PARTS.index("template")).sum())
        return rng.choice(question, min(count, len(question)), replace=False)

    return _cut(model, batch, keys, "last")


def _scaled(model: Lvlm, *, image: bool) -> AbstractContextManager[None]:
    def scale(rows: AttentionRows) -> AttentionRows:
        chosen = rows.image if image else ~rows.image
        return rows.with_scores(rows.scores + float(np.log(FACTOR)) * chosen)

    return edit_attention(model, scale, queries="after image")


TESTS: Mapping[str, _Test] = MappingProxyType(
    {
        "irrelevant image tokens": _Test(
            "attention on the image that is outside the object's box",
            _background,
            "no attention to image tokens outside the box; control: to as many random image tokens",
            _without_background,
            _without_random_image,
        ),
        "text over image": _Test(
            "attention on text instead of the image",
            lambda balance: 1 - _share(balance, "object", "background"),
            f"weights of image tokens times {FACTOR:g}; control: those of all others",
            lambda model, _batch, _rng: _scaled(model, image=True),
            lambda model, _batch, _rng: _scaled(model, image=False),
        ),
        "summary tokens": _Test(
            "attention on the first token and on words of the template",
            lambda balance: _share(balance, "first", "template"),
            "no attention of the last token to words of the template; control: to as many random words of the question",
            _without_template,
            _without_question,
        ),
    }
)
"""Explanation to its test; ``long context`` changes the prompt instead of attention."""
LONG = "long context"


@torch.no_grad()
def compare_explanations(
    model: Lvlm,
    examples: Sequence[Example],
    *,
    padding: str = PADDING,
    repeats: int = REPEATS,
    batch_size: int = 32,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Explanation, ...]:
    """Test the four explanations on the same questions; those without enough wrong answers are left out.

    Parameters
    ----------
    model
        In evaluation mode, its attention computed by ``sdpa`` or ``eager``.
    examples
        Questions with candidate answers; background needs boxes of the objects in question.
    padding, repeats
        Text before the question that makes the context long, and how often it is repeated. If longer context is a cause, its
        removal helps; so the change is the log-odds of the given prompt minus those of the long one, and there is no control.
    batch_size
        Examples per forward pass; eight passes for each example.
    resamples, confidence, seed
        Of the regression and the intervals over images; the seed also draws the tokens of controls.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    DataError
        If no explanation has `MIN_WRONG` wrong answers and as many right ones, or as for `attention_balance`.
    ConfigError
        If `repeats` is below 1.
    ModelError
        If the attention of the family cannot be read or edited.

    Examples
    --------
    >>> import groundscope as gs
    >>> from diagnosis import compare_explanations
    >>> model = gs.load_lvlm("tiny")
    >>> data = gs.scenes.dataset(150, splits=("conflict",)).where(kind="color")
    >>> table = compare_explanations(model, data.examples, resamples=20, progress=False)
    >>> sorted(row.name for row in table)
    ['irrelevant image tokens', 'long context', 'summary tokens', 'text over image']
    """
    if repeats < 1:
        msg = f"repeats={repeats}: must be at least 1"
        raise ConfigError(msg)
    balance = attention_balance(model, examples, batch_size=batch_size, progress=progress)
    results = []
    with step_bar("testing explanations", 2 * len(TESTS) + 1, show=progress) as advance:
        for name, test in TESTS.items():
            scores = test.measure(balance)
            rows = np.flatnonzero(np.isfinite(scores))
            if not _enough(balance.right[rows]):
                continue
            chosen = [examples[int(i)] for i in rows]
            margins = []
            for change in (test.change, test.control):
                margins.append(_margins(model, chosen, batch_size, change, seed))
                advance()
            own = balance.margins[rows].astype(float)
            results.append(
                _explanation(
                    name, test.score, test.intervention, balance, rows, scores, margins[0] - own, margins[1] - own,
                    margins[0] > 0, (resamples, confidence, seed),
                )
            )  # fmt: skip
        longer = [replace(e, question=f"{padding * repeats}{e.question}") for e in examples]
        lengths = np.array([model.encode(e).tokens.length - len(model.encode(e).tokens.image) for e in examples], float)
        rows = np.arange(len(examples))
        if _enough(balance.right):
            long = _margins(model, longer, batch_size, None, seed)
            own = balance.margins.astype(float)
            results.append(
                _explanation(
                    LONG, "number of text tokens", f"the given prompt against one with {format_count(repeats, 'sentence')} more",
                    balance, rows, lengths, own - long, np.zeros(len(rows)), np.full(len(rows), np.nan),
                    (resamples, confidence, seed),
                )
            )  # fmt: skip
        advance()
    if not results:
        msg = (
            f"{int((~balance.right).sum())} of {format_count(len(examples), 'answer')} are wrong; each explanation needs "
            f"{MIN_WRONG} wrong and {MIN_WRONG} right ones"
        )
        raise DataError(msg)
    return tuple(results)


def explanation_frame(explanations: Sequence[Explanation]) -> pd.DataFrame:
    """Return one row per explanation: its effects with intervals, and the verdict.

    Examples
    --------
    >>> from diagnosis import Explanation, explanation_frame
    >>> from groundscope.core.statistics import Estimate
    >>> odds, change, nothing = Estimate(0.7, 0.5, 0.9, 100), Estimate(0.8, 0.3, 1.2, 30), Estimate(0.1, -0.1, 0.2, 30)
    >>> row = Explanation("text over image", "1 - image", "doubled", 100, 30, odds, change, nothing, change, 0.5)
    >>> explanation_frame([row])[["explanation", "odds_ratio", "change", "verdict"]].values.tolist()
    [['text over image', 0.7, 0.8, 'supported']]
    """
    import pandas as pd

    rows = []
    for item in explanations:
        row: dict[str, object] = {"explanation": item.name, "score": item.score, "intervention": item.intervention}
        row |= {"n": item.n, "wrong": item.wrong}
        for name in ("odds_ratio", "change", "control", "difference"):
            effect: Estimate = getattr(item, name)
            row |= {name: effect.value, f"{name}_low": effect.low, f"{name}_high": effect.high}
        rows.append(row | {"corrected": item.corrected, "verdict": item.verdict})
    return pd.DataFrame(rows)


def _enough(right: np.ndarray) -> bool:
    return min(int(right.sum()), int((~right).sum())) >= MIN_WRONG


def _margins(
    model: Lvlm,
    examples: Sequence[Example],
    batch_size: int,
    change: Callable[[Lvlm, Batch, np.random.Generator], AbstractContextManager[None]] | None,
    seed: int,
) -> np.ndarray:
    """Return the log-odds of the true answers under an intervention, float64 ``[n]``."""
    rng = np.random.default_rng(seed)
    margins = np.zeros(len(examples))
    for batch in model.batches(examples, batch_size):
        if change is None:
            logits = model.logits(batch.inputs)
        else:
            with change(model, batch, rng):
                logits = model.logits(batch.inputs)
        for row, number in zip(logits, batch.index, strict=True):
            margins[number] = float(answer_key(model, examples[number]).margin(row.float(), examples[number].answer))
    return margins


def _explanation(
    name: str,
    score: str,
    intervention: str,
    balance: AttentionBalance,
    rows: np.ndarray,
    scores: np.ndarray,
    change: np.ndarray,
    control: np.ndarray,
    corrected: np.ndarray,
    options: tuple[int, float, int],
) -> Explanation:
    resamples, confidence, seed = options
    right, groups = balance.right[rows], np.array(balance.groups)[rows]
    kinds = np.array(balance.kinds)[rows]
    values = scores[rows]
    n = len(rows)
    if np.ptp(values) > 0:
        controls: dict[str, np.ndarray] = {"kind": kinds} if len(set(kinds.tolist())) > 1 else {}
        odds = regress_correctness(
            right, {"score": values}, groups, controls=controls, folds=2, resamples=resamples, confidence=confidence,
            seed=seed, progress=False,
        ).odds_ratios["score"]  # fmt: skip
    else:
        odds = Estimate(1.0, float("nan"), float("nan"), n)
    wrong = ~right

    def effect(values: np.ndarray) -> Estimate:
        names = groups[wrong].tolist()
        low, high = mean_interval(values[wrong][:, None], names, confidence, seed=seed)
        return Estimate(
            float(values[wrong].mean()), float(low[0]), float(high[0]), int(wrong.sum()), len(set(names)) < FEW_GROUPS
        )

    return Explanation(
        name, score, intervention, n, int(wrong.sum()), odds, effect(change), effect(control), effect(change - control),
        float(corrected[wrong].mean()),
    )  # fmt: skip
