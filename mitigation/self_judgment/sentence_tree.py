"""DSR: preference pairs from a tree of sentences that the model itself judges, assembled from CSR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from groundscope.core.errors import ConfigError, DataError
from groundscope.core.progress import progress_bar
from lvlm.access.reused_vision_run import reuse_vision_runs
from lvlm.decoding.beam import Continuation, continue_diversely
from lvlm.decoding.decoder import AnswerRule, Prompts
from lvlm.decoding.loop import DecodingRun
from lvlm.generation import end_tokens
from mitigation.preference.data import PreferenceData
from mitigation.preference.makers import scored_pair
from mitigation.self_judgment.judge import Judge, judge_sentences, reading_tokens
from mitigation.training_free.method import check_count, check_range

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Lvlm
    from mitigation.preference.pair import PreferencePair


@dataclass(frozen=True)
class SentenceTree:
    """How a tree of sentences is grown.

    From every path, `candidates` sentences are written by diverse beams with groups of one (`lvlm.decoding.beam`). A path is an
    answer when an end token follows, when nothing is added, or at the token limit. Of the other paths of one depth, if there are
    at least `candidates`, the `best` and the `worst` by the mean score of their sentences are continued, else all. The score is
    ``S = (1 + alpha) f - alpha f_blind`` of the judge.

    Assembled from CSR (arXiv 2405.14622, whose release has these numbers), with S (arXiv 2508.20655) in place of its reward: the
    paper's own text on rewards was not available. CSR's release prunes by likelihood, compares complete paths by ranks of
    likelihood and CLIP scores, and ends an answer at 1,024 characters; this tree ends at a number of tokens, and takes equal
    continuations of a path as one.

    Raises
    ------
    ConfigError
        For counts below 1, a negative diversity, more paths continued than candidates, or no text that ends a sentence.

    Examples
    --------
    >>> from mitigation.self_judgment import SentenceTree
    >>> SentenceTree(worst=5)
    Traceback (most recent call last):
    groundscope.core.errors.ConfigError: best=1 and worst=5 are more than the 5 candidates; give at most as many
    """

    judge: Judge = field(default_factory=Judge)
    """Prompt, score and alpha of the judge; alpha 0 is the reward without debiasing, a control."""
    candidates: int = 5
    """Sentences that continue a path."""
    diversity: float = 3.0
    """Penalty of a token for each earlier candidate that takes it at this step; at least 0."""
    ends: tuple[str, ...] = (".",)
    """Texts of the tokens that end a sentence, without spaces and in lower case."""
    sentence_tokens: int = 70
    """Largest number of tokens of a sentence."""
    max_new_tokens: int = 256
    """Largest number of tokens of an answer."""
    best: int = 1
    worst: int = 2

    def __post_init__(self) -> None:
        for name in ("candidates", "sentence_tokens", "max_new_tokens", "best", "worst"):
            check_count(name, getattr(self, name))
        check_range("diversity", self.diversity, 0)
        if self.best + self.worst > self.candidates:
            msg = f"best={self.best} and worst={self.worst} are more than the {self.candidates} candidates; give at most as many"
            raise ConfigError(msg)
        if not self.ends or isinstance(self.ends, str) or not all(self.ends):
            msg = f"ends={self.ends!r}: give the texts of tokens that end a sentence, such as ('.',)"
            raise ConfigError(msg)


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer, complete or not, with the score of each sentence.

    Examples
    --------
    >>> from mitigation.self_judgment import ScoredAnswer
    >>> ScoredAnswer((5, 9), (2.0, -1.0)).score
    0.5
    """

    tokens: tuple[int, ...] = ()
    """Token ids, without an end token."""
    scores: tuple[float, ...] = ()
    """S of each sentence."""

    @property
    def score(self) -> float:
        """Mean of the scores; NaN without sentences."""
        return float(np.mean(self.scores)) if self.scores else float("nan")


def select_paths(paths: Sequence[ScoredAnswer], tree: SentenceTree) -> list[ScoredAnswer]:
    """Return the paths of one depth that are continued: the best and the worst, or all if there are fewer than `candidates`.

    Examples
    --------
    >>> from mitigation.self_judgment.sentence_tree import ScoredAnswer, SentenceTree, select_paths
    >>> paths = [ScoredAnswer((i,), (score,)) for i, score in enumerate([0.0, 3.0, 2.0, -1.0, 1.0])]
    >>> [path.score for path in select_paths(paths, SentenceTree())]
    [3.0, 0.0, -1.0]
    """
    if len(paths) < tree.candidates:
        return list(paths)
    ordered = sorted(paths, key=lambda path: -path.score)
    return [*ordered[: tree.best], *ordered[-tree.worst :]]


@torch.no_grad()
def grow_tree(model: Lvlm, example: Example, tree: SentenceTree | None = None) -> tuple[ScoredAnswer, ...]:
    """Return the complete answers of a tree of sentences, in the order of their completion.

    Equal continuations of one path are one, and sentences of one depth are judged together.

    Parameters
    ----------
    model
        The model, which writes and judges.
    example
        The question.
    tree
        Options; those of CSR by default.

    Raises
    ------
    ModelError
        If the model cannot judge (`Judge.check`), or no token reads as one of `ends`.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.self_judgment import EMBEDDED_TEMPLATE, Judge, SentenceTree, grow_tree
    >>> model, example = gs.load_lvlm("tiny"), gs.scenes.dataset(10).where(kind="caption")[0]
    >>> tree = SentenceTree(Judge(EMBEDDED_TEMPLATE), ends=(",", ".", "and"), max_new_tokens=8)
    >>> answers = grow_tree(model, example, tree)
    >>> len(answers) > 2, all(len(answer.tokens) <= 8 for answer in answers)
    (True, True)
    """
    options = SentenceTree() if tree is None else tree
    check_tree(model, options)
    stops = frozenset(token for end in options.ends for token in reading_tokens(model, end))
    ends = end_tokens(model) | {model.content_id}
    encoding = model.encode(example)
    group = Prompts((0,), model.collate([encoding]), (encoding.image_key,))
    run = DecodingRun(model, [group], AnswerRule(), continues=options.max_new_tokens > 1, names=[example.id])
    answers: dict[tuple[int, ...], ScoredAnswer] = {}
    with reuse_vision_runs(model):
        logits = run.start()
        paths = [ScoredAnswer()]
        while paths:
            several: list[tuple[ScoredAnswer, Continuation]] = []
            for path in paths:
                if path.tokens:
                    run.select([0])
                    logits = run.rewind(torch.tensor([path.tokens], device=logits.device))
                run.select([0] * options.candidates)
                written = continue_diversely(
                    run,
                    logits.expand(options.candidates, -1),
                    min(options.sentence_tokens, options.max_new_tokens - len(path.tokens)),
                    diversity=options.diversity,
                    stops=stops,
                    ends=ends,
                )
                several += [(path, continuation) for continuation in dict.fromkeys(written)]
            running: dict[tuple[int, ...], ScoredAnswer] = {}
            for path, continuation in _judged(model, example, several, options):
                complete = continuation is None or continuation.ended or len(path.tokens) >= options.max_new_tokens
                if path.tokens:
                    (answers if complete else running).setdefault(path.tokens, path)
            paths = select_paths(list(running.values()), options)
    return tuple(answers.values())


def _judged(
    model: Lvlm, example: Example, several: Sequence[tuple[ScoredAnswer, Continuation]], tree: SentenceTree
) -> list[tuple[ScoredAnswer, Continuation | None]]:
    """Return each path with its continuation and its score; the path alone, and None, for a continuation without text."""
    decode = model.processor.tokenizer.batch_decode
    texts = [
        t.strip() for t in decode([list(continuation.tokens) for _, continuation in several], skip_special_tokens=True)
    ]
    different = list(dict.fromkeys(text for text in texts if text))
    scores: dict[str, float] = {}
    if different:
        judgments = judge_sentences(model, example, different, tree.judge, ends=tree.ends)
        scores = dict(zip(different, judgments.debiased(tree.judge.alpha).tolist(), strict=True))
    return [
        (ScoredAnswer((*path.tokens, *continuation.tokens), (*path.scores, scores[text])), continuation)
        if text
        else (path, None)
        for (path, continuation), text in zip(several, texts, strict=True)
    ]


def check_tree(model: Lvlm, tree: SentenceTree) -> None:
    """Raise `ModelError` if a model cannot grow a tree: it cannot judge, or no token ends a sentence."""
    tree.judge.check(model)
    for end in tree.ends:
        reading_tokens(model, end)


def judged_preferences(
    model: Lvlm, data: Sequence[Example], tree: SentenceTree | None = None, *, progress: bool | None = None
) -> PreferenceData:
    """Return for each question the pair of the best and the worst answer of a tree of sentences, by their mean score.

    Assembled from CSR; see `SentenceTree`. Questions whose answers have one score or one text are left out and counted.

    Parameters
    ----------
    model
        The model, which writes and judges: its preferences teach a model of the same weights.
    data
        The questions, such as "Describe this image in detail.".
    tree
        Options; those of CSR by default.
    progress
        Whether to show a bar; by default on a terminal.

    Raises
    ------
    DataError
        Without questions, or if no pair is left.
    ModelError
        As for `grow_tree`.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.self_judgment import EMBEDDED_TEMPLATE, Judge, SentenceTree, judged_preferences
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10).where(kind="caption")
    >>> tree = SentenceTree(Judge(EMBEDDED_TEMPLATE), ends=(",", ".", "and"), max_new_tokens=8)
    >>> pairs = judged_preferences(model, data[:1], tree)
    >>> pairs[0].source, pairs[0].provenance["chosen_score"] > pairs[0].provenance["rejected_score"]
    ('self_judgment', True)
    """
    options = SentenceTree() if tree is None else tree
    if not len(data):
        msg = "no questions to answer; give at least one"
        raise DataError(msg)
    check_tree(model, options)
    decode = model.processor.tokenizer.decode
    pairs: list[PreferencePair] = []
    with progress_bar(progress) as bar:
        task = bar.add_task("judging answers", total=len(data))
        for example in data:
            answers = grow_tree(model, example, options)
            if answers:
                texts = [decode(list(answer.tokens), skip_special_tokens=True).strip() for answer in answers]
                pair = scored_pair(example, texts, [answer.score for answer in answers])
                pairs += [] if pair is None else [pair]
            bar.advance(task)
    if not pairs:
        msg = f"the answers to none of the {len(data)} questions differ in score; give more candidates or a larger diversity"
        raise DataError(msg)
    provenance = {
        "maker": "judged_preferences", "method": "assembled from CSR", "tree": {**asdict(options), "ends": list(options.ends)},
        "model": model.name, "weights_hash": model.weights_hash,
        "left_out": {"questions whose answers do not differ": len(data) - len(pairs)},
    }  # fmt: skip
    return PreferenceData("self-judged answers", tuple(pairs), provenance)
