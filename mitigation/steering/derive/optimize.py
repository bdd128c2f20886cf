"""A constant addition that is fitted to right answers by gradient descent, while the model's own descriptions stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits.execution.memory import MEMORY, batch_rows
from circuits.interventions.hooks import edit
from circuits.interventions.intervention import head_site
from groundscope.core.errors import ConfigError, DataError, PatchError
from groundscope.core.progress import progress_bar
from lvlm.answer_keys import AnswerKey, answer_key
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.generation import end_tokens, greedy
from lvlm.sites import Head, Site
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.derive.base import keys_of
from mitigation.steering.places import Key, name_of, order, site_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Batch, Lvlm

RIGHT = 4
"""Correctly answered questions that are used for each incorrectly answered one."""
POSITIONS = ("all", "last+generated")
_TOLERANCE = 1e-3
"""Largest relative difference of logits that resumed layers may have from a full forward pass."""


def optimize(
    model: Lvlm,
    questions: Sequence[Example],
    *,
    texts: Sequence[Example] = (),
    plain: Sequence[tuple[Tensor, int]] = (),
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    positions: str = "all",
    strength: float = 1.0,
    passes: int = 6,
    steps: int = 60,
    step: float = 0.0125,
    emphasis: float = 3.0,
    keep: float = 1.0,
    keep_plain: float = 0.03,
    right: int = RIGHT,
    max_new_tokens: int = 40,
    memory: int = MEMORY,
    seed: int = 0,
    progress: bool | None = None,
) -> SteeringVector:
    """Return the constant additions with which a model answers questions correctly and describes images as before.

    Minimizes ``mean over questions of the cross-entropy of the true answer among the candidates + keep * mean over tokens of
    KL(model || steered model)`` on the descriptions that the model itself writes of `texts`, and likewise on `plain`, by Adam on
    the additions only; the weights do not change. Optimized steering vectors are described by Cao et al. 2024 (BiPO,
    arXiv 2406.00045) and Dunefsky & Cohan 2025 (arXiv 2502.18862); the loss here is neither's. The result is one addition for
    every token, which all formats for constant vectors can represent. It is fitted to the questions, so choose its strength on
    questions about other images.

    Parameters
    ----------
    model
        The model to steer; its parameters need gradients through the layers above the first place only.
    questions
        Questions with candidates. All that the model answers incorrectly are used, and `right` times as many of the others.
    texts
        Prompts without candidates, such as ``Describe the image.``, whose answers are preserved.
    plain
        Texts without an image to preserve: token ids ``[1, positions]``, and the first position of the continuation that is
        preserved (`mitigation.free_text_prompts.plain_texts` makes such texts).
    heads, layers, sites
        Places to act on; at least one.
    positions
        ``all`` or ``last+generated``.
    strength
        The vector's default strength; 1 is the fitted addition.
    passes, steps
        Number of passes over the questions, and smallest number of steps: with few questions there are more passes. A step
        takes the questions of one batch.
    step
        Largest step of Adam, in units of an activation's root mean square at the place; decreases linearly to 0.
    emphasis
        Weight of a question that the model answers incorrectly; the others have weight 1.
    keep, keep_plain
        Weights of the descriptions, and of the texts without an image.
    right
        Correctly answered questions for each incorrectly answered one, spread evenly.
    max_new_tokens
        Largest length of a description.
    memory
        Largest number of bytes of stored activations, with which later passes start at the first place.
    seed
        Seed of the order of batches.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    DataError
        For no questions with candidates.
    ConfigError
        For other positions, or a number of passes below 1.
    PatchError
        If the model answers every question correctly, or there are no places.
    SiteError
        For a place that the model lacks.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> vector = gs.derive.optimize(model, data, layers=[4], passes=1, steps=2, progress=False)
    >>> vector, vector.decay
    (SteeringVector(add at L4; all, strength 1, for 'tiny'), 1.0)
    """
    if positions not in POSITIONS or passes < 1:
        msg = f"positions='{positions}', passes={passes}: choose positions {' or '.join(POSITIONS)}, and at least one pass"
        raise ConfigError(msg)
    candidate_questions = [e for e in questions if e.candidates]
    if not candidate_questions:
        msg = "no question has candidate answers; pass questions with candidates, such as yes and no"
        raise DataError(msg)
    keys = tuple(sorted(keys_of(heads, layers, sites), key=order))
    first = min(site_of(key).layer if site_of(key).stack == "decoder" else 0 for key in keys)
    additions = _Additions(model, keys, positions)
    size = batch_rows(model, candidate_questions, 32, recorded=True)
    store = _Budget(memory)
    with progress_bar(progress) as bar:
        task = bar.add_task("optimizing a vector", total=len(candidate_questions) + len(texts))
        parts: list[_Questions] = []
        for batch in model.batches(candidate_questions, size, in_order=False):
            parts.append(_Questions.record(model, batch, first, store, additions))
            bar.advance(task, len(batch.index))
        selected = _select(parts, right)
        descriptions = []
        for batch in model.batches(list(texts), size, in_order=False):
            descriptions.append(_Description.record(model, batch, max_new_tokens, first, store, additions))
            bar.advance(task, len(batch.index))
        plain_parts = [_Description.of_text(model, ids, start, first, store, additions) for ids, start in plain]
        wrong = sum(int(part.wrong.sum()) for part in parts)
        additions.scale()
        preserved_groups = [
            (group, weight) for group, weight in ((descriptions, keep), (plain_parts, keep_plain)) if group
        ]
        total = max(passes * len(selected), steps)
        _minimize(additions, selected, preserved_groups, total, step, emphasis, seed, lambda: bar.advance(task, 0))
    changes: dict[Key, VectorChange] = {}
    for key, addition in additions.fitted().items():
        length = float(np.linalg.norm(addition))
        if not length > 0:
            msg = f"at {name_of(key)} the addition has no effect on any answer; choose another place"
            raise PatchError(msg)
        changes[key] = AddChange(addition / length, length)
    provenance = {
        "method": "optimize",
        "questions": sum(len(rows) for _, rows in selected),
        "wrong": wrong,
        "texts": len(texts),
        "plain": len(plain),
        "passes": passes,
        "steps": total,
        "step": step,
        "emphasis": emphasis,
        "keep": [keep, keep_plain],
        "seed": seed,
        "weights": model.weights_hash,
    }
    return SteeringVector(changes, positions, strength, model.name, model.config_hash, provenance)


class _Budget:
    """Bytes of activations that may still be stored."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Take bytes; False if not so many are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class _Additions:
    """The vectors that are fitted, added by hooks while a context is open."""

    def __init__(self, model: Lvlm, keys: Sequence[Key], positions: str) -> None:
        self.model, self.positions = model, positions
        self.sites: dict[Site, list[tuple[Key, slice]]] = {}
        self.values: dict[Key, Tensor] = {}
        self._square: dict[Key, list[float]] = {}
        self.scales: dict[Key, float] = {}
        self.start = -1
        """First position that ``last+generated`` selects."""
        for key in keys:
            site, columns = site_of(key), slice(None)
            if isinstance(key, Head):
                site = head_site(model, site)
                columns = slice(key.head * model.head_dim, (key.head + 1) * model.head_dim)
            model.locate(site)
            self.sites.setdefault(site, []).append((key, columns))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Measure the size of activations at each place."""
        with ExitStack() as hooks:
            for site, parts in self.sites.items():

                def measure(x: Tensor, parts: list[tuple[Key, slice]] = parts) -> None:
                    for key, columns in parts:
                        self._square.setdefault(key, []).append(float(x[..., columns].float().pow(2).mean()))
                        self.values.setdefault(key, torch.zeros(x[..., columns].shape[-1], device=x.device))

                hooks.callback(self.model.locate(site).watch(measure).remove)
            yield

    def scale(self) -> None:
        """Set the unit of each place: the root mean square of its activations."""
        self.scales = {key: float(np.sqrt(np.mean(squares))) for key, squares in self._square.items()}
        self.values = {key: value.requires_grad_() for key, value in self.values.items()}

    @contextmanager
    def added(self) -> Iterator[None]:
        """Add the vectors in every forward pass."""
        with ExitStack() as hooks:
            for site, parts in self.sites.items():

                def change(x: Tensor, parts: list[tuple[Key, slice]] = parts) -> Tensor:
                    total = torch.zeros(x.shape[-1], device=x.device)
                    pieces = []
                    for key, columns in parts:
                        piece = self.scales[key] * self.values[key]
                        whole = columns == slice(None)
                        pieces.append(
                            piece if whole else nn.functional.pad(piece, (columns.start, len(total) - columns.stop))
                        )
                    value = torch.stack(pieces).sum(0).to(x)
                    if self.positions == "all":
                        return x + value
                    mask = torch.arange(x.shape[1], device=x.device) >= (self.start % x.shape[1])
                    return x + mask[None, :, None] * value

                hooks.callback(edit(self.model, site, change).remove)
            yield

    def fitted(self) -> dict[Key, np.ndarray]:
        """Return the additions, float64."""
        return {key: (self.scales[key] * value).detach().double().cpu().numpy() for key, value in self.values.items()}


@dataclass(eq=False)
class _Forward:
    """A recorded forward pass that is repeated from the first changed layer on; as a whole if it was not stored."""

    model: Lvlm
    inputs: Mapping[str, Tensor]
    keep: int
    first: int
    hidden: Tensor | None
    calls: list[dict[str, Any]]

    @classmethod
    def record(
        cls, model: Lvlm, inputs: Mapping[str, Tensor], keep: int, first: int, store: _Budget, additions: _Additions
    ) -> tuple[_Forward, Tensor]:
        """Run inputs once; return the recording and the logits at the last `keep` positions."""
        entered: list[Tensor] = []
        calls: list[dict[str, Any]] = []
        with ExitStack() as hooks, torch.no_grad():
            for layer in range(first, model.n_layers):
                module = model.place("decoder", layer, "resid_post").module

                def called(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    calls.append({k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")})
                    if not entered:
                        entered.append(args[0] if args else kwargs["hidden_states"])

                hooks.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
            hooks.enter_context(additions.watched())
            logits = model.forward(inputs, keep=keep).float()
        whole = cls(model, inputs, keep, first, None, [])
        if len(calls) != model.n_layers - first or not entered:
            return whole, logits
        hidden = entered[0].clone()
        resumed = cls(model, inputs, keep, first, hidden, calls)
        try:
            with torch.no_grad():
                resumed_logits = resumed.logits()
            fits = bool(((resumed_logits - logits).abs().max() <= _TOLERANCE * logits.abs().max()).item())
        except (TypeError, RuntimeError, ValueError, AttributeError):
            fits = False  # layers that need more than their recorded arguments
        if not fits or not store.take(hidden.numel() * hidden.element_size()):
            return whole, logits
        return resumed, logits

    def logits(self, rows: Tensor | None = None) -> Tensor:
        """Return the logits at the last positions, ``[rows, keep, V]``, with gradients if they are enabled."""
        if self.hidden is None:
            logits = self.model.forward(self.inputs, keep=self.keep)
            return (logits if rows is None else logits[rows]).float()
        count = len(self.hidden)
        x = self.hidden if rows is None else self.hidden[rows]
        for layer, call in enumerate(self.calls, self.first):
            arguments = {name: _take(value, rows, count) for name, value in call.items()}
            out = self.model.place("decoder", layer, "resid_post").module(x, **arguments)
            x = out[0] if isinstance(out, tuple) else out
        return self.model.unembed(x[:, -self.keep :]).float()


def _take(value: Any, rows: Tensor | None, count: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_take(item, rows, count) for item in value)
    if rows is None or not isinstance(value, Tensor) or not value.dim() or len(value) != count:
        return value
    return value[rows]


@dataclass(eq=False)
class _Questions:
    """Questions of one batch."""

    forward: _Forward
    keys: list[AnswerKey]
    truth: list[int]
    """Index of the true answer among the candidates."""
    wrong: Tensor
    """Whether the model without addition answers incorrectly, bool ``[rows]``."""

    @classmethod
    def record(cls, model: Lvlm, batch: Batch, first: int, store: _Budget, additions: _Additions) -> _Questions:
        examples = [encoding.example for encoding in batch.encodings]
        forward, logits = _Forward.record(model, batch.inputs, 1, first, store, additions)
        keys = [answer_key(model, example) for example in examples]
        truth = [key.candidates.index(e.answer) for key, e in zip(keys, examples, strict=True)]
        wrong = [int(key.scores(row[-1]).argmax()) != at for key, row, at in zip(keys, logits, truth, strict=True)]
        return cls(forward, keys, truth, torch.tensor(wrong))

    def loss(self, rows: Tensor, emphasis: float) -> Tensor:
        """Return the weighted mean of the cross-entropy of the true answers among the candidates."""
        logits = self.forward.logits(rows)[:, -1]
        each = [
            -self.keys[i].scores(row).log_softmax(-1)[self.truth[i]]
            for i, row in zip(rows.tolist(), logits, strict=True)
        ]
        weights = 1 + (emphasis - 1) * self.wrong[rows].to(logits)
        return (torch.stack(each) * weights).sum() / weights.sum()


@dataclass(eq=False)
class _Description:
    """Descriptions of one batch, written by the model without addition."""

    forward: _Forward
    before: Tensor
    """Log-probabilities without addition at every token of the descriptions, ``[rows, tokens, V]``."""
    mask: Tensor
    """Which tokens belong to a description, ``[rows, tokens]``."""
    start: int
    """Position of the prompt's last token."""

    @classmethod
    def record(
        cls, model: Lvlm, batch: Batch, max_new_tokens: int, first: int, store: _Budget, additions: _Additions
    ) -> _Description:
        answers = greedy(model, batch.inputs, max_new_tokens, images=batch.images)
        ends = sorted(end_tokens(model))
        written = [[*answer, *ends[:1]] for answer in answers]  # the end is a token to preserve, too
        longest = max(map(len, written))
        rows = [row + [row[-1] if row else 0] * (longest - len(row)) for row in written]
        inputs = append_tokens(model, batch.inputs, rows)
        forward, logits = _Forward.record(model, inputs, longest + 1, first, store, additions)
        mask = torch.tensor([[i < len(row) for i in range(longest)] for row in written]).to(logits.device)
        return cls(forward, logits[:, :-1].log_softmax(-1), mask, -longest - 1)

    @classmethod
    def of_text(
        cls, model: Lvlm, ids: Tensor, start: int, first: int, store: _Budget, additions: _Additions
    ) -> _Description:
        keep = ids.shape[1] - start + 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        forward, logits = _Forward.record(model, inputs, keep, first, store, additions)
        mask = torch.ones(1, keep - 1, dtype=torch.bool, device=logits.device)
        return cls(forward, logits[:, :-1].log_softmax(-1), mask, -keep)

    def loss(self, rows: Tensor) -> Tensor:
        """Return the mean over tokens of KL(before || after)."""
        after = self.forward.logits(rows)[:, :-1].log_softmax(-1)
        before, mask = self.before[rows], self.mask[rows].to(after)
        return ((before.exp() * (before - after)).sum(-1) * mask).sum() / mask.sum()


def _select(parts: Sequence[_Questions], right: int) -> list[tuple[_Questions, Tensor]]:
    """Return the rows of each batch that are used: all wrong ones, and `right` times as many others, spread evenly."""
    wrong = sum(int(part.wrong.sum()) for part in parts)
    if not wrong:
        msg = "the model answers every question correctly, so there is nothing to correct; use other questions"
        raise PatchError(msg)
    others = sum(len(part.wrong) for part in parts) - wrong
    every = max(1, others // (right * wrong))
    selected, n_right = [], 0
    for part in parts:
        rows = []
        for i, is_wrong in enumerate(part.wrong.tolist()):
            if is_wrong or n_right % every == 0:
                rows.append(i)
            n_right += not is_wrong
        if rows:
            selected.append((part, torch.tensor(rows)))
    return selected


def _minimize(
    additions: _Additions,
    questions: Sequence[tuple[_Questions, Tensor]],
    preserved_groups: Sequence[tuple[Sequence[_Description], float]],
    total: int,
    step: float,
    emphasis: float,
    seed: int,
    advance: Callable[[], None],
) -> None:
    """Fit the additions by Adam; each step takes the questions of one batch, some descriptions and a text without an image."""
    values = list(additions.values.values())
    optimizer = torch.optim.Adam(values, lr=step)
    draw = torch.Generator().manual_seed(seed)
    done = 0
    with additions.added(), torch.enable_grad():
        for _ in range(-(-total // len(questions))):
            for k in torch.randperm(len(questions), generator=draw).tolist()[: total - done]:
                part, rows = questions[k]
                additions.start = -1
                loss = part.loss(rows, emphasis)
                for group, weight in preserved_groups:
                    description = group[done % len(group)]
                    some = torch.randperm(len(description.mask), generator=draw)[: max(4, len(rows) // 2)]
                    additions.start = description.start
                    loss = loss + weight * description.loss(some)
                gradients = torch.autograd.grad(loss, values)
                for group in optimizer.param_groups:
                    group["lr"] = step * (1 - done / total)
                for value, gradient in zip(values, gradients, strict=True):
                    value.grad = gradient
                optimizer.step()
                done += 1
                advance()
