"""DSGD: answers written sentence by sentence, each the best of several candidates under the model's own judgment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from groundscope.core.errors import ConfigError
from lvlm.access.reused_vision_run import reuse_vision_runs
from lvlm.decoding.beam import Continuation, continue_diversely
from lvlm.decoding.decoder import AnswerRule, Prompts, RuleDecoder
from lvlm.decoding.loop import DecodingRun
from lvlm.generation import end_tokens
from mitigation.protocol import ForwardCost
from mitigation.self_judgment.judge import (
    PAPER_TEMPLATE,
    BlindForm,
    Judge,
    Score,
    judge_sentences,
    reading_tokens,
    stack_is_alone,
)
from mitigation.training_free.method import Category, Regime, TrainingFree, check_choice, check_range

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch, Encoding
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling

Choice = Literal["debiased", "image", "blind", "likelihood", "random"]
CHOICES: tuple[Choice, ...] = ("debiased", "image", "blind", "likelihood", "random")


@dataclass(frozen=True)
class SelfJudgmentDecoding(TrainingFree):
    """Decoding guided by debiased self-judgment (DSGD): each sentence is the best of several under the model's own judgment.

    After the answer so far, `candidates` sentences are written by diverse beams with groups of one: the k-th is a greedy
    continuation whose log-probabilities are reduced by `diversity` for each earlier candidate that takes the same token at the
    same step. The candidate with the largest ``S = (1 + alpha) f - alpha f_blind`` is appended (`Judge`): f is the score that the
    model gives the sentence in a separate conversation with the image, f_blind the same without it. The answer is complete
    when a candidate contains an end token, when the first candidate adds nothing, or at the token limit. Candidates without
    text are not judged. Equal candidates are judged once, and the first of equal scores is taken.

    Source: arXiv 2508.20655. The paper's text beyond its abstract was not available, so the search follows its release (5
    candidates, diversity 2.0, sentences that end in ".", 64 tokens), and the score the secondary description of the paper. The
    release takes another score (``score="release"``) and no blind prompt for captions (``alpha=0``).

    ``choice`` selects by another value instead, as a control of what the judgment contributes beyond the best of several:
    ``image`` (f), ``blind`` (f_blind), ``likelihood`` (mean log-probability of a token), ``random``.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.self_judgment import EMBEDDED_TEMPLATE, SelfJudgmentDecoding
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20).where(kind="caption")[:1]
    >>> method = SelfJudgmentDecoding(template=EMBEDDED_TEMPLATE, ends=(",", ".", "and"))
    >>> with method.applied(model):
    ...     text = gs.answer(model, data).answers[0].text
    >>> text.startswith("a")
    True
    """

    label: ClassVar[str] = "DSGD"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2508.20655"
    regime: ClassVar[Regime] = "beam"

    template: str = PAPER_TEMPLATE
    """The judge's prompt; see `Judge.template`."""
    score: Score = "logit"
    """Score of the judge's answer; see `Judge.score`."""
    blind: BlindForm = "removed"
    """Form of the blind prompt; see `Judge.blind`."""
    alpha: float = 1.0
    """Weight of the text bias that is subtracted; at least 0."""
    candidates: int = 5
    """Number of candidates of a sentence; at least 1."""
    diversity: float = 2.0
    """Penalty of a token for each earlier candidate that takes it at this step; at least 0."""
    ends: tuple[str, ...] = (".",)
    """Texts of the tokens that end a sentence, without spaces and in lower case."""
    sentence_tokens: int = 64
    """Largest number of tokens of a sentence."""
    choice: Choice = "debiased"
    """What the candidates are compared by."""
    seed: int = 0
    """Seed of the random choice, together with the id of the question."""

    def __post_init__(self) -> None:
        Judge(self.template, self.score, self.blind, self.alpha)
        check_choice("choice", self.choice, CHOICES)
        check_range("diversity", self.diversity, 0)
        for name in ("candidates", "sentence_tokens"):
            value = getattr(self, name)
            check_range(name, value, 1)
            if not isinstance(value, int):
                msg = f"{name}={value}: must be an integer"
                raise ConfigError(msg)
        if not self.ends or isinstance(self.ends, str) or not all(self.ends):
            msg = f"ends={self.ends!r}: give the texts of tokens that end a sentence, such as ('.',)"
            raise ConfigError(msg)

    @property
    def judge(self) -> Judge:
        """The judge of the sentences."""
        return Judge(self.template, self.score, self.blind, self.alpha)

    @property
    def forward_cost(self) -> ForwardCost:
        """One pass of a token for each candidate; judged prompts of each sentence are counted by `behavior.answer`."""
        return ForwardCost(per_token=float(self.candidates))

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return which words of the judge's prompt the tokenizer does not know; None if it knows all."""
        return self.judge.problem(model) if self.judges else None

    @property
    def judges(self) -> bool:
        """Whether the choice needs the judge."""
        return self.choice not in ("likelihood", "random") and self.candidates > 1

    def _check(self, model: Lvlm) -> None:
        if self.judges:
            self.judge.check(model)
        for end in self.ends:
            reading_tokens(model, end)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self, stack_is_alone(model))


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: SelfJudgmentDecoding
    share: bool

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        if sampling is not None:
            msg = "DSGD chooses among sentences that are not drawn; answer without sampling"
            raise ConfigError(msg)
        answers = []
        for encoding in batch.encodings:
            search = SentenceSearch(self.method, model, encoding, self.share)
            answers.append(search.answer(max_new_tokens))
        return answers


@dataclass(frozen=True)
class SentenceSearch:
    """Sentences of one answer: candidates, their scores and the choice."""

    method: SelfJudgmentDecoding
    model: Lvlm
    encoding: Encoding
    share: bool = True

    @torch.no_grad()
    def answer(self, max_new_tokens: int) -> list[int]:
        """Return the answer as token ids, without its end token."""
        method, model = self.method, self.model
        ends = end_tokens(model) | {model.content_id}
        stops = frozenset(token for end in method.ends for token in reading_tokens(model, end))
        group = Prompts((0,), model.collate([self.encoding]), (self.encoding.image_key,))
        run = DecodingRun(model, [group], AnswerRule(), continues=max_new_tokens > 1, names=[self.encoding.example.id])
        answer: list[int] = []
        with reuse_vision_runs(model):
            logits = run.start()
            while True:
                run.select([0] * method.candidates)
                several = continue_diversely(
                    run,
                    logits.expand(method.candidates, -1),
                    min(method.sentence_tokens, max_new_tokens - len(answer)),
                    diversity=method.diversity,
                    stops=stops,
                    ends=ends,
                )
                if not several[0].tokens:
                    break
                best = self.choose(several, len(answer))
                answer += several[best].tokens
                if any(continuation.ended for continuation in several) or len(answer) >= max_new_tokens:
                    break
                run.select([best])
                logits = run.rewind(torch.tensor([answer], device=logits.device))
        return answer

    def choose(self, several: Sequence[Continuation], position: int) -> int:
        """Return the index of the best candidate that has text."""
        indices = [i for i, continuation in enumerate(several) if continuation.tokens]
        scores = self.scores([several[i] for i in indices], position)
        return indices[int(np.argmax(scores))]

    def scores(self, several: Sequence[Continuation], position: int) -> NDArray[np.float64]:
        """Return what the candidates are compared by, float64 ``[n]``."""
        method = self.method
        if method.choice == "likelihood" or len(several) == 1:
            return np.array(
                [continuation.log_p / (len(continuation.tokens) + continuation.ended) for continuation in several]
            )
        if method.choice == "random":
            name = f"{method.seed}\0{self.encoding.example.id}\0{position}"
            return np.random.default_rng(list(name.encode())).random(len(several))
        texts = [
            text.strip()
            for text in self.model.processor.tokenizer.batch_decode(
                [list(continuation.tokens) for continuation in several], skip_special_tokens=True
            )
        ]
        different = list(dict.fromkeys(texts))
        judgments = judge_sentences(
            self.model, self.encoding.example, different, method.judge, ends=method.ends, share=self.share
        )
        values = {
            "debiased": judgments.debiased(method.alpha),
            "image": judgments.image,
            "blind": judgments.blind,
        }[method.choice]
        return values[[different.index(text) for text in texts]]
