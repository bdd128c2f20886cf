"""OPERA: beam search with a penalty for columns of attention that all later tokens over-trust."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError, ModelError
from lvlm.decoding.beam import Beams, BeamState
from lvlm.decoding.decoder import AnswerRule, Prompts, RuleDecoder
from lvlm.decoding.loop import DecodingRun, merges_caches
from lvlm.generation import end_tokens
from mitigation.protocol import ForwardCost
from mitigation.training_free.method import (
    Category,
    Regime,
    TrainingFree,
    Variant,
    check_choice,
    check_image_tokens,
    check_range,
)

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling


@dataclass(frozen=True)
class OPERA(TrainingFree):
    """Over-trust penalty and retrospection-allocation for beam search.

    Each of `beams` answers has `candidates` next tokens, those of its largest logits; each candidate runs through the model. Let
    ``w_ij`` be the attention of the last layer from response token i to response token j, the largest of all heads, after each
    row was divided by its sum over all tokens. A candidate, which is the last token of the response, has the over-trust

        phi = scale max_j prod_{i >= j} sigma w_ij ,

    which is subtracted from its logit; all other tokens are excluded. While the response has at most `first` tokens, the share of
    the candidate's attention (its row w) on image tokens is added to its logit instead. The rest is beam search.

    Retrospection: j* is the position of the largest product, for each token of an answer. If in every beam one position is j* of
    more than `recurrences` tokens, the search returns to the answers as they were up to that position (the earliest of the
    beams' positions), and the tokens that followed it are not candidates there again. It never returns to a position before
    `first`, and to each position at most `returns` times; then to the one before.

    Huang et al. 2024, arXiv 2311.17911; rules and defaults are those of the release, which the paper's agree with.
    ``variant="release"`` adds the column after the last image token to the share on image tokens, as the release does. The
    candidates of all beams share one forward pass, whose rows become the next answers; in the release each candidate has a
    separate forward pass, and those chosen run again. Products are computed as sums of logarithms in float64. That the earliest
    of different positions is taken is ours.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.opera import OPERA
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20).where(kind="caption")[:1]
    >>> with OPERA().applied(model):
    ...     text = gs.answer(model, data, max_new_tokens=4).answers[0].text
    >>> len(text.split())
    4
    """

    label: ClassVar[str] = "OPERA"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2311.17911"
    regime: ClassVar[Regime] = "beam"

    variant: Variant = "paper"
    beams: int = 5
    """Number of answers that are continued; at least 1."""
    candidates: int = 5
    """Number of next tokens of each answer; at least 1."""
    sigma: float = 50.0
    """Factor of the attention weights; above 0."""
    scale: float = 1e-7
    """Factor of the product; at least 0."""
    recurrences: int = 15
    """Number of tokens that may have the same position of over-trust; at least 1."""
    first: int = 10
    """Number of tokens without penalty, and the first position that the search returns to; at least 0."""
    returns: int = 5
    """Largest number of returns to a position; at least 0."""
    length_penalty: float = 1.0
    """Exponent of the length that the score of a finished answer is divided by."""

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, ("paper", "release"))
        Beams(self.beams, self.length_penalty)
        check_range("sigma", self.sigma, 0, above=True)
        check_range("scale", self.scale, 0)
        for name, low in (("candidates", 1), ("recurrences", 1), ("first", 0), ("returns", 0)):
            value = getattr(self, name)
            check_range(name, value, low)
            if not isinstance(value, int):
                msg = f"{name}={value}: must be an integer"
                raise ConfigError(msg)

    @property
    def forward_cost(self) -> ForwardCost:
        """One forward pass of a token for each candidate."""
        return ForwardCost(per_token=float(self.beams * self.candidates))

    def _check(self, model: Lvlm) -> None:
        check_image_tokens(model, self.label)
        if not merges_caches(model):
            msg = (
                f"{self.label} continues all candidates in one cache, and the cache of {model.name} ({model.spec.model_type}) "
                "cannot be continued in one batch"
            )
            raise ModelError(msg)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self)


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: OPERA

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        if sampling is not None:
            msg = "OPERA compares the most likely answers and draws none; answer without sampling"
            raise ConfigError(msg)
        answers = []
        for encoding in batch.encodings:
            group = Prompts((0,), model.collate([encoding]), (encoding.image_key,))
            run = DecodingRun(model, [group], AnswerRule(), merges=True, names=[encoding.example.id])
            answers.append(OverTrustSearch(self.method, model, run).answer(max_new_tokens))
        return answers


@dataclass(frozen=True)
class Trust:
    """Attention within the response of one answer.

    Examples
    --------
    >>> import math, torch
    >>> from mitigation.training_free.methods.opera import Trust
    >>> one = Trust().extended(torch.tensor([0.5]), sigma=2.0)
    >>> two = one.extended(torch.tensor([2.0, 0.5]), sigma=2.0)
    >>> [round(math.exp(x), 6) for x in two.products], two.positions
    ([4.0, 1.0], (0, 0))
    """

    products: tuple[float, ...] = ()
    """Logarithm of ``prod_{i >= j} sigma w_ij`` for each column j."""
    positions: tuple[int, ...] = ()
    """Column of the largest product when each token was the last."""

    def extended(self, row: Tensor, sigma: float) -> Trust:
        """Return the attention with one more token, whose weights on the response, itself included, are `row` ``[n + 1]``."""
        logs = (sigma * row.double()).log().tolist()
        products = tuple(a + b for a, b in zip((*self.products, 0.0), logs, strict=True))
        return Trust(products, (*self.positions, max(range(len(products)), key=products.__getitem__)))

    def over_trust(self, scale: float) -> float:
        """Return ``scale`` times the largest product."""
        largest = max(self.products)
        return scale * math.exp(min(largest, 700.0)) if scale and largest > -math.inf else 0.0

    def recurring(self) -> tuple[int, int]:
        """Return the most frequent position, the earliest of equal ones, and how often it occurs."""
        counts = Counter(self.positions)
        position = min(counts, key=lambda p: (-counts[p], p))
        return position, counts[position]


@dataclass(frozen=True)
class _Snapshot:
    """The running answers after some number of tokens."""

    tokens: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    trust: tuple[Trust, ...]


@dataclass
class OverTrustSearch:
    """The search for one answer."""

    method: OPERA
    model: Lvlm
    run: DecodingRun
    snapshots: list[_Snapshot] = field(default_factory=list)
    returned: Counter[int] = field(default_factory=Counter)
    """Number of returns to each position."""
    rejected: dict[int, set[int]] = field(default_factory=dict)
    """Tokens that are not candidates, by number of tokens before them."""

    @torch.no_grad()
    def answer(self, max_new_tokens: int) -> list[int]:
        """Return the best answer as token ids, without its end token."""
        method, run = self.method, self.run
        ends = end_tokens(self.model) | {self.model.content_id}
        state = BeamState(Beams(method.beams, method.length_penalty), [0])
        trust = [Trust()]
        logits = run.start()
        self.snapshots = [_Snapshot(((),), (0.0,), (Trust(),))]
        while len(state.tokens[0]) < max_new_tokens:
            number = len(state.tokens[0])
            chosen = self._candidates(logits, number)  # [k, c]
            k, c = chosen.shape
            run.select([row for row in range(k) for _ in range(c)])
            following, weights, image = self._run(chosen.flatten())
            extended = [trust[row // c].extended(weights[row, -(number + 1) :], method.sigma) for row in range(k * c)]
            change = [
                image[row] if number + 1 <= method.first else -extended[row].over_trust(method.scale)
                for row in range(k * c)
            ]
            scores = logits.gather(1, chosen) + torch.tensor(change, device=logits.device).to(logits).view(k, c)
            log_p = torch.full_like(logits, -math.inf).scatter(1, chosen, scores).log_softmax(-1)
            state.rows = list(range(k))
            parents, tokens = state.advance(log_p, ends, last=number + 1 == max_new_tokens)
            if state.done:
                break
            listed = chosen.tolist()
            rows = [parent * c + listed[parent].index(token) for parent, token in zip(parents, tokens, strict=True)]
            run.select(rows)
            logits, trust = following[rows], [extended[row] for row in rows]
            self.snapshots.append(_Snapshot(tuple(map(tuple, state.tokens)), tuple(state.scores), tuple(trust)))
            position = self._position(trust)
            if position is not None:
                logits, trust = self._return_to(position, state, logits)
        return state.finished[0][1]

    def _candidates(self, logits: Tensor, number: int) -> Tensor:
        """Return the tokens of the largest logits of each answer, int ``[k, c]``."""
        rejected = sorted(self.rejected.get(number, ()))
        open_logits = logits.index_fill(1, torch.tensor(rejected, dtype=torch.long, device=logits.device), -math.inf)
        return open_logits.topk(min(self.method.candidates, logits.shape[1] - len(rejected))).indices

    def _run(self, tokens: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """Continue the answers; return logits, weights w of the last row over all columns, and their share on image tokens."""
        patterns: list[Tensor] = []
        site = self.model.locate(f"decoder.L{self.model.n_layers - 1}.pattern")
        with self.model.eager(), ExitStack() as stack:
            stack.callback(site.watch(lambda x: patterns.append(x[:, :, -1])).remove)
            logits = self.run.next(tokens)
        layout = self.run.layout
        weights = patterns[-1].double().amax(1) * layout.valid  # [rows, columns]
        weights = weights / weights.sum(-1, keepdim=True)
        image = layout.image
        if self.method.variant == "release":
            last = image & ~torch.nn.functional.pad(image, (0, 1))[:, 1:]
            image = image | torch.nn.functional.pad(last, (1, 0))[:, :-1]
        return logits, weights, (weights * image).sum(-1).tolist()

    def _position(self, trust: list[Trust]) -> int | None:
        """Return the position that the search returns to; None if it continues."""
        recurring = [answer_trust.recurring() for answer_trust in trust]
        if any(count <= self.method.recurrences for _, count in recurring):
            return None
        position = min(position for position, _ in recurring)
        while position >= self.method.first and self.returned[position] >= self.method.returns:
            position -= 1
        return position if position >= self.method.first else None

    def _return_to(self, position: int, state: BeamState, logits: Tensor) -> tuple[Tensor, list[Trust]]:
        """Restore the answers up to a position, and exclude the tokens that followed; return their logits and attention."""
        self.returned[position] += 1
        number = position + 1
        followers = {tokens[number] for tokens in state.tokens if len(tokens) > number}
        self.rejected.setdefault(number, set()).update(followers)
        self.rejected = {n: tokens for n, tokens in self.rejected.items() if n <= number}
        self.snapshots = self.snapshots[: number + 1]
        before = self.snapshots[-1]
        state.tokens, state.scores = [list(tokens) for tokens in before.tokens], list(before.scores)
        self.run.select([min(row, self.run.size - 1) for row in range(len(before.tokens))])
        return self.run.rewind(torch.tensor(before.tokens, device=logits.device)), list(before.trust)
