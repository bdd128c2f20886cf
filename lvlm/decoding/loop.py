"""Continue prompts and their branches token by token: each is prefilled once, then all rows share the forward passes.

A decoding step is bound by reading the weights, so the rows of prompts and branches are one batch after the prefill: shorter
rows are padded at their beginning, and each row has explicit positions. Prefills are separate, because a short branch would
otherwise be padded to the length of an image. A model whose cache cannot be merged, or does not give the logits of full forward
passes (`merges_caches`), runs a full forward pass for each token instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from groundscope.core.errors import DataError
from lvlm.access.decoder_module import decoder_of
from lvlm.access.reused_vision_run import reuse_vision_runs
from lvlm.access.shared_vision_run import share_vision_runs
from lvlm.active_interventions import mark_observer, without_marked_hooks
from lvlm.decoding.attention_edits import without_attention_edits
from lvlm.decoding.cache import merge_caches, new_cache
from lvlm.decoding.cache_check import check_prompts, rounding_of
from lvlm.decoding.joined_prefill import Part, joinable, joined_prefill, joins_prefills
from lvlm.decoding.row_layout import RowLayout, stack_layouts
from lvlm.decoding.rule import AnswerRule, Branch, Prompts, Step
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.finite_logits import check_finite
from lvlm.generation import end_tokens
from lvlm.image_tokens import image_in_sequence, image_tokens

if TYPE_CHECKING:
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling

_LOG = logging.getLogger(__name__)
PADDING = 0
"""Token that continues an answer after its end, in the rows of a batch whose other answers go on; nothing attends to it."""


def prompts_of(batch: Batch) -> tuple[Prompts, ...]:
    """Return the prompts of a batch."""
    return (Prompts(tuple(range(len(batch.encodings))), batch.inputs, batch.images),)


@torch.no_grad()
def first_logits(model: Lvlm, batch: Batch, rule: AnswerRule) -> Tensor:
    """Return the logits that the first token of each answer is chosen from, ``[B, V]``."""
    return DecodingRun(model, prompts_of(batch), rule, continues=False).start()


@torch.no_grad()
def generate(
    model: Lvlm,
    batch: Batch,
    rule: AnswerRule,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    ends: bool = True,
) -> list[list[int]]:
    """Return each answer as token ids: the most likely token at each step, or one drawn by `sampling`.

    An answer ends before an end token or a placeholder of an image, as in `lvlm.generation.greedy`.

    Parameters
    ----------
    model
        The model.
    batch
        The prompts.
    rule
        How the logits of prompts and branches are combined.
    max_new_tokens
        Largest number of tokens of an answer.
    sampling
        How tokens are drawn; by the id of each example, so that answers do not depend on their batch.
    ends
        False: write `max_new_tokens` tokens for every answer; an end token is a token like any other.

    Raises
    ------
    ModelError
        If the logits of the model at a step are not finite.
    """
    return generate_prompts(
        model,
        prompts_of(batch),
        rule,
        max_new_tokens,
        names=[e.example.id for e in batch.encodings],
        sampling=sampling,
        ends=ends,
    )


@torch.no_grad()
def generate_prompts(
    model: Lvlm,
    prompts: Sequence[Prompts],
    rule: AnswerRule,
    max_new_tokens: int,
    *,
    names: Sequence[str],
    sampling: Sampling | None = None,
    ends: bool = True,
    stops: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """Return each answer as token ids; the prompts may differ in shape.

    Parameters
    ----------
    model, rule, max_new_tokens, sampling, ends
        As for `generate`.
    prompts
        The prompts of all answers, grouped by shape.
    names
        Name of each answer, for messages and for `sampling`.
    stops
        Tokens after which an answer ends; they belong to it.
    """
    run = DecodingRun(model, prompts, rule, continues=max_new_tokens > 1, names=names)
    return write_answers(model, run, max_new_tokens, names=names, sampling=sampling, ends=ends, stops=stops)


class Continuation(Protocol):
    """A batch of answers that is continued token by token."""

    def start(self) -> Tensor:
        """Run the prompts; return the logits of the first token, ``[B, V]``."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """Continue with the chosen tokens, int ``[B]``; return the logits of the next token, ``[B, V]``."""
        ...


@torch.no_grad()
def write_answers(
    model: Lvlm,
    run: Continuation,
    max_new_tokens: int,
    *,
    names: Sequence[str],
    sampling: Sampling | None = None,
    ends: bool = True,
    stops: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """Return each answer of a run as token ids; parameters are those of `generate_prompts`."""
    end = end_tokens(model) | {model.content_id} if ends and model.ends else frozenset[int]()
    answers: list[list[int]] = [[] for _ in names]
    running = [True] * len(names)
    logits = run.start()
    for number in range(max_new_tokens):
        chosen = logits.argmax(-1) if sampling is None else sampling.tokens(logits, names, number)
        tokens = chosen.tolist()
        for row, token in enumerate(tokens):
            if running[row] and token in end:
                running[row] = False
            elif running[row]:
                answers[row].append(token)
                running[row] = token not in stops
        if number + 1 == max_new_tokens or not any(running):
            break
        tokens = [token if alive else PADDING for token, alive in zip(tokens, running, strict=True)]
        logits = run.next(torch.tensor(tokens, device=chosen.device))
    return answers


class DecodingRun:
    """The state of one batch of answers: caches, positions and tokens of all rows.

    `start`, then `next` for each token; in between, `select` continues other answers (beams) and `rewind` replaces their tokens.
    """

    def __init__(
        self,
        model: Lvlm,
        prompts: Sequence[Prompts],
        rule: AnswerRule,
        *,
        continues: bool = True,
        names: Sequence[str] = (),
        merges: bool | None = None,
    ) -> None:
        self.model, self.rule, self.names = model, rule, names
        self.continues = continues
        self.merges = continues and (merges_caches(model) if merges is None else merges)
        self.size = sum(len(group.rows) for group in prompts)
        self.groups: list[tuple[int, Prompts]] = [(0, group) for group in prompts]
        self._prompts: list[tuple[int, Prompts]] = []
        self._prompt_of = list(range(self.size))
        self.branches: tuple[Branch, ...] = ()
        self.activations: dict[str, Tensor] = {}
        self.image_activations: dict[str, list[Tensor]] = {}
        self.tokens: Tensor | None = None
        self.number = 0
        self._caches: list[Any] = []
        self._layouts: list[RowLayout] = []
        self._positions: list[Tensor] = []

    # ---- prefill

    def start(self) -> Tensor:
        """Run the prompts and the branches; return the combined logits of the first token, ``[B, V]``."""
        with reuse_vision_runs(self.model):
            early = self._early_branches()
            joined = self._prefill_joined(early)
            logits = joined.pop(0, None)
            if logits is None:
                logits = self._by_row([(group.rows, self._prefill(0, group)) for _, group in self.groups])
            self._check(logits)
            first = self._first_step(logits)
            self.branches = early or tuple(self.rule.branches(first))
            branch_logits = []
            for number, branch in enumerate(self.branches, 1):
                if number in joined:
                    parts = [(branch.prompts[0].rows, joined[number])]
                else:
                    with branch.context():
                        parts = [(group.rows, self._prefill(number, group)) for group in branch.prompts]
                self.groups += [(number, group) for group in branch.prompts]
                branch_logits.append(self._by_row(parts))
        self._prompts = list(self.groups)
        if self.merges:
            self._merge()
        self.image_activations = {}
        return self.rule.combine(replace(first, branches=tuple(branch_logits)))

    def _first_step(self, logits: Tensor) -> Step:
        image = {name: tuple(rows) for name, rows in self.image_activations.items()}
        return Step(0, logits, activations=dict(self.activations), image_activations=image)

    def _early_branches(self) -> tuple[Branch, ...]:
        """Return the branches, if they are known before the prompts run and some may run with them."""
        rule = self.rule
        if not rule.independent or rule.sites or rule.image_sites or not joins_prefills(self.model):
            return ()
        return tuple(rule.branches(Step(0, torch.empty(self.size, 0, device=self.model.device))))

    def _prefill_joined(self, branches: Sequence[Branch]) -> dict[int, Tensor]:
        """Run the prompts and the first branches of text in one forward pass; return their logits by number of the branch."""
        count = next((i for i, b in enumerate(branches) if not joinable(self.model, self.groups, b)), len(branches))
        if not count:
            return {}
        groups = [self.groups[0][1], *(branch.prompts[0] for branch in branches[:count])]
        parts = [Part(group, _layout(self.model, group, number)) for number, group in enumerate(groups)]
        prefills = joined_prefill(self.model, parts, keeps_cache=self.merges)
        if self.merges:
            self._caches = [prefill.cache for prefill in prefills]
            self._layouts = [part.layout for part in parts]
            self._positions = [_next_positions([], self.size, p.length, p.logits.device) for p in prefills]
        return {number: prefill.logits for number, prefill in enumerate(prefills)}

    def _prefill(self, branch: int, prompts: Prompts) -> Tensor:
        """Run prompts of equal shape; return the logits at their last token, ``[rows, V]``."""
        model, inputs = self.model, prompts.inputs
        layout = _layout(model, prompts, branch)
        options: dict[str, Any] = {}
        if self.merges:
            options = {"use_cache": True, "past_key_values": new_cache()}
        positions: list[Tensor] = []

        @mark_observer
        def read_positions(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            if isinstance(kwargs.get("position_ids"), Tensor):
                positions.append(kwargs["position_ids"][..., -1:])

        with ExitStack() as stack:
            stack.enter_context(share_vision_runs(model, prompts.images))
            stack.enter_context(model.with_row_layout(layout))
            if branch == 0:
                stack.enter_context(self._reading([(prompts.rows, slice(0, len(prompts.rows)))]))
                stack.enter_context(self._reading_image(prompts.rows, layout))
            stack.callback(decoder_of(model).register_forward_pre_hook(read_positions, with_kwargs=True).remove)
            logits = model.forward(inputs, **options)[:, -1]
        if self.merges:
            self._caches.append(options["past_key_values"])
            self._layouts.append(layout)
            self._positions.append(_next_positions(positions, len(prompts.rows), layout.prompt, logits.device))
        return logits

    def _merge(self) -> None:
        self._cache = merge_caches(self._caches)
        self._layout = stack_layouts(self._layouts)
        axes = max(p.shape[0] for p in self._positions)
        self._position = torch.cat([p.expand(axes, -1, -1) for p in self._positions], dim=1)
        self._caches, self._layouts, self._positions = [], [], []

    # ---- further tokens

    def next(self, tokens: Tensor) -> Tensor:
        """Continue all rows with the chosen tokens, int ``[B]``; return the combined logits of the next token, ``[B, V]``."""
        return self._append(tokens[:, None])

    def _append(self, tokens: Tensor) -> Tensor:
        """Continue all rows with tokens, int ``[B, n]``; return the combined logits after them, ``[B, V]``."""
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        self.number += tokens.shape[1]
        self.activations = {}
        logits, *branches = self._step_merged(tokens) if self.merges else self._step_full(self.tokens)
        self._check(logits)
        return self.rule.combine(Step(self.number, logits, tuple(branches), self.tokens, self.activations))

    def _step_merged(self, tokens: Tensor) -> list[Tensor]:
        model, count = self.model, tokens.shape[1]
        order = [row for _, group in self.groups for row in group.rows]
        for _ in range(count):
            self._layout = self._layout.with_column()
        position = self._position + torch.arange(count, device=self._position.device)  # [axes, rows, n]
        inputs = {
            "input_ids": tokens[order],
            "attention_mask": self._layout.valid.long(),
            "position_ids": position if len(position) > 1 else position[0],
        }
        self._position = self._position + count
        with ExitStack() as stack:
            stack.enter_context(model.with_row_layout(self._layout))
            stack.enter_context(model.reading_answers(self._layout.prompt))
            stack.enter_context(self._reading(list(self._slices())))
            logits = model.forward(inputs, use_cache=True, past_key_values=self._cache)[:, -1]
        return self._split(logits)

    def _step_full(self, tokens: Tensor) -> list[Tensor]:
        model = self.model
        parts: list[list[tuple[Sequence[int], Tensor]]] = [[] for _ in range(len(self.branches) + 1)]
        with reuse_vision_runs(model):
            for number, group in self.groups:
                written = tokens[list(group.rows)].tolist()
                layout = _layout(model, group, number)
                for _ in range(self.number):
                    layout = layout.with_column()
                context = self.branches[number - 1].context if number else ExitStack
                with ExitStack() as stack:
                    stack.enter_context(context())
                    stack.enter_context(share_vision_runs(model, group.images))
                    stack.enter_context(model.with_row_layout(layout))
                    stack.enter_context(model.reading_answers(layout.prompt))
                    if number == 0:
                        stack.enter_context(self._reading([(group.rows, slice(0, len(group.rows)))]))
                    parts[number].append(
                        (group.rows, model.forward(append_tokens(model, group.inputs, written))[:, -1])
                    )
        return [self._by_row(part) for part in parts]

    @property
    def layout(self) -> RowLayout:
        """The layout of merged rows after the last pass."""
        return self._layout

    # ---- other answers

    def select(self, parents: Sequence[int]) -> None:
        """Continue other answers from here on: the i-th is answer ``parents[i]`` so far.

        An answer can be continued several times, or not at all.
        """
        if list(parents) == list(range(self.size)):
            return
        self._prompt_of = [self._prompt_of[parent] for parent in parents]
        self.names = [self.names[parent] for parent in parents] if self.names else self.names
        if self.tokens is not None:
            self.tokens = self.tokens[list(parents)]
        if self.merges:
            rows = [(number, row) for number, group in self.groups for row in group.rows]
            place = {row: i for i, row in enumerate(rows)}
            numbers = range(len(self.branches) + 1)
            order = torch.tensor([place[number, parent] for number in numbers for parent in parents])
            order = order.to(self._position.device)
            self._cache.batch_select_indices(order)
            self._layout = self._layout.selected(order)
            self._position = self._position[:, order]
            self.groups = [(number, Prompts(tuple(range(len(parents))), {})) for number in numbers]
        else:
            self.groups = [
                (number, replace(group, rows=rows))
                for number, group in self._prompts
                for rows in _passes(group.rows, self._prompt_of)
            ]
        self.size = len(parents)
        self.rule.select(parents)

    def rewind(self, tokens: Tensor) -> Tensor:
        """Replace the tokens of all answers, int ``[B, n]``, n >= 1; return the combined logits after them, ``[B, V]``.

        Only tokens after the first that differs run again.
        """
        if self.tokens is None:
            return self._append(tokens)
        common = min(tokens.shape[1] - 1, self.number)
        differs = (tokens[:, :common] != self.tokens[:, :common]).any(0).nonzero()
        start = int(differs[0]) if len(differs) else common
        if self.merges and start < self.number:
            self._cache.crop(start - self.number)
            self._layout = self._layout.without_columns(self.number - start)
            self._position = self._position - (self.number - start)
        self.tokens, self.number = self.tokens[:, :start], start
        return self._append(tokens[:, start:])

    # ---- rows

    def _slices(self) -> Iterator[tuple[Sequence[int], slice]]:
        """Yield the answers of each group of prompts, and its rows in a merged forward pass."""
        start = 0
        for number, group in self.groups:
            if number == 0:
                yield group.rows, slice(start, start + len(group.rows))
            start += len(group.rows)

    def _split(self, logits: Tensor) -> list[Tensor]:
        parts: list[list[tuple[Sequence[int], Tensor]]] = [[] for _ in range(len(self.branches) + 1)]
        start = 0
        for number, group in self.groups:
            parts[number].append((group.rows, logits[start : start + len(group.rows)]))
            start += len(group.rows)
        return [self._by_row(part) for part in parts]

    def _by_row(self, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
        """Return the rows of several parts in the order of the answers."""
        if len(parts) == 1 and list(parts[0][0]) == list(range(self.size)):
            return parts[0][1]
        rows = [row for part, _ in parts for row in part]
        if set(rows) != set(range(self.size)):
            msg = f"a branch has prompts for the answers {sorted(rows)}, but there are {self.size} answers"
            raise DataError(msg)
        values = torch.cat([x for _, x in parts])
        last = {row: i for i, row in enumerate(rows)}
        return values[[last[row] for row in range(self.size)]]

    @contextmanager
    def _reading(self, where: Sequence[tuple[Sequence[int], slice]]) -> Iterator[None]:
        """Read the sites of the rule at the last token of the prompts' rows."""
        with ExitStack() as stack:
            for site in self.rule.sites:

                def store(x: Tensor, name: str = str(site)) -> None:
                    for rows, part in where:
                        values = x[part, -1]
                        if name not in self.activations:
                            self.activations[name] = values.new_empty(self.size, *values.shape[1:])
                        self.activations[name][list(rows)] = values

                stack.callback(self.model.locate(site).watch(store).remove)
            yield

    @contextmanager
    def _reading_image(self, rows: Sequence[int], layout: RowLayout) -> Iterator[None]:
        """Read the image sites of the rule at the image tokens of prompts."""
        with ExitStack() as stack:
            for site in self.rule.image_sites:

                def store(x: Tensor, name: str = str(site)) -> None:
                    values = self.image_activations.setdefault(name, [x.new_empty(0, x.shape[-1])] * self.size)
                    for i, row in enumerate(rows):
                        values[row] = x[i, layout.image[i].to(x.device)]

                stack.callback(self.model.locate(site).watch(store).remove)
            yield

    def _check(self, logits: Tensor) -> None:
        names = self.names or [f"row {row} of a batch" for row in range(self.size)]
        check_finite(logits.float().logsumexp(-1), names, self.model.name)


def _passes(rows: Sequence[int], prompt_of: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the answers that each forward pass over whole prompts continues, one for each of the `rows` of prompts.

    A prompt without as many answers as another one repeats its last, and one without any continues an arbitrary answer.
    """
    answers = [[i for i, prompt in enumerate(prompt_of) if prompt == row] or [0] for row in rows]
    count = max(len(several) for several in answers)
    return [tuple(several[min(i, len(several) - 1)] for several in answers) for i in range(count)]


def _layout(model: Lvlm, prompts: Prompts, branch: int) -> RowLayout:
    """Return the layout of a prefill."""
    rows = len(prompts.rows)
    length = prompts.inputs["decoder_input_ids" if model.encoder_decoder else "input_ids"].shape[1]
    valid = torch.ones(rows, length, dtype=torch.bool, device=model.device)
    image = (
        image_tokens(model, prompts.inputs).to(valid.device) if image_in_sequence(model) else torch.zeros_like(valid)
    )
    return RowLayout(torch.full((rows,), branch, device=valid.device), image, valid, length)


def _next_positions(positions: Sequence[Tensor], rows: int, length: int, device: torch.device) -> Tensor:
    """Return the position of the first generated token, int ``[axes, rows, 1]``, from those of the prompt's last token."""
    if not positions:
        return torch.full((1, rows, 1), length, device=device)
    last = positions[-1]
    last = last[None] if last.dim() == 2 else last
    return (last + 1).expand(-1, rows, -1)


# ---- whether a model can be decoded with merged caches


def merges_caches(model: Lvlm) -> bool:
    """Whether merged caches give the logits of full forward passes; measured once per model with two prompts.

    Logs a warning, of the logger ``lvlm.decoding.loop``, for a model that needs a full forward pass per token.
    """
    if model.encoder_decoder or "position_ids" not in model.accepts:
        return False
    return bool(model.remember(("merged caches", model.attention, str(model.dtype)), lambda: _measure_merging(model)))


@torch.no_grad()
def _measure_merging(model: Lvlm) -> bool:
    with model.with_row_layout(None), without_attention_edits(model), without_marked_hooks(model.hf):
        prompts = check_prompts(model)
        count = sum(len(group.rows) for group in prompts)
        try:
            merged, full = (DecodingRun(model, prompts, AnswerRule(), merges=merges) for merges in (True, False))
            token = merged.start().argmax(-1)
            full.start()
            difference = (merged.next(token).log_softmax(-1) - full.next(token).log_softmax(-1)).abs().amax().item()
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            difference, problem = float("inf"), str(error)
        else:
            problem = f"its logits differ by {difference:.2g}"
    if difference <= rounding_of(model) * count:
        return True
    _LOG.warning(
        "%s is decoded with a full forward pass per token, which is slower: its cache cannot be continued in one batch (%s)",
        model.name,
        problem,
    )
    return False
