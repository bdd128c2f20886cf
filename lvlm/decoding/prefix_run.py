"""Run the common prefixes of a batch once, and continue them with the other tokens of each row.

The rows of a batch are ``[padding, prefix, padding, tail]``: prefixes of different length are padded at their beginnings, tails
(the tokens of a prompt after its prefix) at theirs, so that all prompts end in the same column. Each token has an explicit
position, so padding moves none. Keys and values of a prefix are stored once; a layer's are repeated for the rows when its
attention reads them, and never for all layers at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvlm.access.decoder_module import decoder_of
from lvlm.access.shared_vision_run import share_vision_runs
from lvlm.active_interventions import mark_observer
from lvlm.decoding.cache import new_cache
from lvlm.decoding.loop import PADDING, write_answers
from lvlm.finite_logits import check_finite
from lvlm.prefix_groups import PER_TOKEN, PrefixGroup, PrefixGroups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lvlm.encoding.encode import Encoding
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Prefix:
    """The keys and values of one prefix."""

    keys: tuple[Tensor, ...]
    """Of each layer, ``[key heads, tokens, head_dim]``."""
    values: tuple[Tensor, ...]
    position: Tensor
    """Position of the last token, int ``[axes, 1]``."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.keys[0].shape[1]

    def shortened(self, length: int) -> Prefix:
        """Return the first tokens; those that are removed must be text, whose positions increase by one."""
        if length == self.length:
            return self
        keys = tuple(x[:, :length] for x in self.keys)
        values = tuple(x[:, :length] for x in self.values)
        return Prefix(keys, values, self.position - (self.length - length))


class PrefixBatch:
    """Rows of several groups, each with a common prefix that runs at most once.

    All methods continue the same run of the prefixes, also under different interventions, so these must not act on prefixes
    (`lvlm.prefix_sharing.unshared_because`).

    Examples
    --------
    >>> import torch
    >>> import groundscope as gs
    >>> from lvlm.decoding.prefix_run import prefix_batches
    >>> from lvlm.prefix_groups import PrefixGroups
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> batch = next(prefix_batches(model, PrefixGroups(model, data.examples, 8)))
    >>> alone = torch.cat([model.logits(model.collate([e])) for e in batch.encodings])
    >>> torch.allclose(batch.logits(), alone, atol=1e-4)
    True
    """

    def __init__(self, model: Lvlm, groups: Sequence[PrefixGroup], earlier: PrefixBatch | None = None) -> None:
        self.model, self.groups = model, tuple(groups)
        self.index: tuple[int, ...] = tuple(row for group in groups for row in group.index)
        self.encodings: tuple[Encoding, ...] = tuple(e for group in groups for e in group.encodings)
        self.group_of = tuple(number for number, group in enumerate(groups) for _ in group.index)
        shortest: dict[Any, int] = {}
        for group in groups:
            shortest[group.signature] = min(group.length, shortest.get(group.signature, group.length))
        self.lengths = tuple(shortest[group.signature] for group in groups)
        """Number of tokens of each group's prefix."""
        self._earlier = earlier
        self._prefixes: dict[Any, Prefix] | None = None

    @property
    def prefixes(self) -> dict[Any, Prefix]:
        """The prefix of each group by its key; run at the first access."""
        if self._prefixes is None:
            self._prefixes = self.run_prefixes()
            self._earlier = None  # so that the prefixes of the batches before are freed
        return self._prefixes

    def store(self, prefixes: dict[Any, Prefix]) -> None:
        """Set the prefixes, from a run of the caller's own (`run_prefix`, `split`)."""
        self._prefixes, self._earlier = prefixes, None

    @property
    def width(self) -> int:
        """Number of columns of the longest prefix."""
        return max(self.lengths)

    @property
    def tail(self) -> int:
        """Number of columns of the longest tail."""
        return max(len(row) for row in self.tails())

    def tails(self) -> list[list[int]]:
        """Return the tokens of each row after its prefix."""
        return [
            e.inputs["input_ids"][0, self.lengths[group] :].tolist()
            for e, group in zip(self.encodings, self.group_of, strict=True)
        ]

    # ---- prefixes

    @torch.no_grad()
    def run_prefixes(self) -> dict[Any, Prefix]:
        """Run the prefixes that no earlier batch has run; those of images of equal shape are one forward pass."""
        ready: dict[Any, Prefix] = {}
        alike: dict[Any, list[int]] = {}
        for number, group in enumerate(self.groups):
            before = None if self._earlier is None else self._earlier.prefixes.get(group.key)
            if before is not None and before.length >= self.lengths[number]:
                ready[group.key] = before
            else:
                alike.setdefault(group.signature, []).append(number)
        for numbers in alike.values():
            inputs, images = self.prefix_inputs(numbers)
            with share_vision_runs(self.model, images):
                cache, position = run_prefix(self.model, inputs, self.width + self.tail, self._forward)
            ready.update(self.split(numbers, cache, position))
        return ready

    def _forward(self, inputs: Mapping[str, Tensor], past: Any) -> None:
        self.model.forward(inputs, use_cache=True, past_key_values=past)

    def prefix_inputs(self, numbers: Sequence[int]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the inputs of the prefixes of some groups with equal signatures, and the identities of their images."""
        firsts = [self.groups[number].encodings[0] for number in numbers]
        length = self.lengths[numbers[0]]
        inputs = {
            name: torch.cat([e.inputs[name][:, :length] if name in PER_TOKEN else e.inputs[name] for e in firsts])
            for name in firsts[0].inputs
        }
        return self.model.on_device(inputs), tuple(e.image_key for e in firsts)

    def split(self, numbers: Sequence[int], cache: Any, position: Tensor) -> dict[Any, Prefix]:
        """Return the prefixes of some groups from the cache of their common run, and positions ``[axes, groups, 1]``."""
        return {
            self.groups[number].key: Prefix(
                tuple(layer.keys[row] for layer in cache.layers),
                tuple(layer.values[row] for layer in cache.layers),
                position[:, row],
            )
            for row, number in enumerate(numbers)
        }

    # ---- tails

    def inputs_after(self, extra: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
        """Return the inputs of a forward pass over all tails, with a new cache that contains the prefixes.

        `extra` has the tokens that follow each prompt, the same number for all rows.
        """
        prefixes = [
            self.prefixes[group.key].shortened(length) for group, length in zip(self.groups, self.lengths, strict=True)
        ]
        device = self.model.device
        tails, count = self.tails(), self.tail
        more = len(extra[0]) if extra else 0
        rows = [
            [*[PADDING] * (count - len(tail)), *tail, *(extra[number] if extra else ())]
            for number, tail in enumerate(tails)
        ]
        group_of = torch.tensor(self.group_of, device=device)
        lengths = torch.tensor(self.lengths, device=device)[group_of]
        own = torch.tensor([len(tail) for tail in tails], device=device)
        columns = torch.arange(count + more, device=device)
        valid = torch.cat(
            [
                torch.arange(self.width, device=device) >= self.width - lengths[:, None],
                columns >= count - own[:, None],
            ],
            dim=1,
        )
        last = torch.stack([prefix.position.to(device) for prefix in prefixes], dim=1)[:, group_of]  # [axes, B, 1]
        position = (last + 1 + columns - (count - own[:, None])).clamp_min(0)
        cache = new_cache()
        cache.layers.extend(
            _prefix_layer()(
                torch.stack([_padded(prefix.keys[layer], self.width) for prefix in prefixes]),
                torch.stack([_padded(prefix.values[layer], self.width) for prefix in prefixes]),
                group_of,
            )
            for layer in range(len(prefixes[0].keys))
        )
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": valid.long(),
            "position_ids": position if len(position) > 1 else position[0],
            "past_key_values": cache,
        }

    @torch.no_grad()
    def run_tails(self, inputs: Mapping[str, Any], keep: int = 1) -> Tensor:
        """Run the inputs of `inputs_after`; return the logits of the last positions, ``[B, keep, V]``."""
        model = self.model
        inputs = dict(inputs)
        cache = inputs.pop("past_key_values")
        with model.reading_answers(self.width + self.tail):
            return model.forward(inputs, keep=keep, use_cache=True, past_key_values=cache)

    # ---- answers

    def logits(self) -> Tensor:
        """Return the logits after each prompt, ``[B, V]``."""
        return self.run_tails(self.inputs_after())[:, -1]

    def answer_logits(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits before each token of answers of equal length n, ``[B, n, V]``."""
        count = len(answers[0])
        return self.run_tails(self.inputs_after(answers), count + 1)[:, :-1]

    def generate(self, max_new_tokens: int, *, sampling: Sampling | None = None) -> list[list[int]]:
        """Return the answers as token ids, as `lvlm.generation.greedy`."""
        names = [e.example.id for e in self.encodings]
        return write_answers(self.model, Continuation(self), max_new_tokens, names=names, sampling=sampling)


class Continuation:
    """Answers that are written token by token after the prompts of a batch."""

    def __init__(self, batch: PrefixBatch) -> None:
        self._batch, self._model = batch, batch.model
        self._inputs = batch.inputs_after()
        self._cache = self._inputs["past_key_values"]

    def start(self) -> Tensor:
        """Return the logits of the first token, ``[B, V]``."""
        return self._checked(self._batch.run_tails(self._inputs)[:, -1])

    def next(self, tokens: Tensor) -> Tensor:
        """Continue with the chosen tokens, int ``[B]``; return the logits of the next, ``[B, V]``."""
        mask = self._inputs["attention_mask"]
        self._inputs = {
            "input_ids": tokens[:, None],
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
            "position_ids": self._inputs["position_ids"][..., -1:] + 1,
            "past_key_values": self._cache,
        }
        return self._checked(self._batch.run_tails(self._inputs)[:, -1])

    def _checked(self, logits: Tensor) -> Tensor:
        names = [f"row {row} of a batch" for row in range(len(logits))]
        check_finite(logits.float().logsumexp(-1), names, self._model.name)
        return logits


def prefix_batches(model: Lvlm, groups: PrefixGroups) -> Iterator[PrefixBatch]:
    """Yield the batches of some groups; a group that is divided runs its prefix once."""
    earlier: PrefixBatch | None = None
    for of_batch in groups.batches():
        continues = earlier is not None and earlier.groups[-1].key == of_batch[0].key
        earlier = PrefixBatch(model, of_batch, earlier if continues else None)
        yield earlier


def run_prefix(
    model: Lvlm, inputs: Mapping[str, Tensor], columns: int, forward: Callable[[Mapping[str, Tensor], Any], object]
) -> tuple[Any, Tensor]:
    """Run prefixes of equal shape; return their cache, and the position of their last tokens, int ``[axes, rows, 1]``.

    Parameters
    ----------
    model
        The model.
    inputs
        Inputs of the prefixes.
    columns
        Number of columns of the whole prompts, so that no token of the prefix is the last of a prompt.
    forward
        Runs the model with the inputs and the cache.
    """
    cache: Any = new_cache()
    positions: list[Tensor] = []

    @mark_observer
    def read_positions(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("position_ids"), Tensor):
            positions.append(kwargs["position_ids"][..., -1:])

    with ExitStack() as stack:
        stack.callback(decoder_of(model).register_forward_pre_hook(read_positions, with_kwargs=True).remove)
        stack.enter_context(model.reading_answers(columns))
        forward(inputs, cache)
    rows, length = inputs["input_ids"].shape
    if not positions:
        return cache, torch.full((1, rows, 1), length - 1, device=inputs["input_ids"].device)
    last = positions[-1]
    last = last[None] if last.dim() == 2 else last
    return cache, last.expand(-1, rows, -1)


def _padded(x: Tensor, length: int) -> Tensor:
    """Pad ``[heads, tokens, width]`` with zeros before its tokens."""
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[-2], 0)) if x.shape[-2] < length else x


@cache
def _prefix_layer() -> type:
    """Return the class of a cache layer whose rows share prefixes; transformers is imported at its first use."""
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """Keys and values of prefixes ``[groups, heads, L, width]``, and of the later tokens of each row."""

        def __init__(self, keys: Tensor, values: Tensor, group_of: Tensor) -> None:
            super().__init__()
            self._prefix = keys, values
            self._later: tuple[Tensor, Tensor] | None = None
            self._group_of = group_of.to(keys.device)
            self.lazy_initialization(keys, values)

        def update(
            self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Store new keys and values, and return all of them for each row."""
            new = key_states, value_states
            if self._later is not None:
                new = tuple(torch.cat(pair, dim=-2) for pair in zip(self._later, new, strict=True))
            self._later = (new[0], new[1])
            return self._whole(self._prefix[0], new[0]), self._whole(self._prefix[1], new[1])

        def of_rows(self) -> tuple[Tensor, Tensor]:
            """Return all keys and values of each row, ``[B, heads, columns, width]``, after the tails have run."""
            if self._later is None:
                msg = "no tail has run yet"
                raise RuntimeError(msg)
            return self._whole(self._prefix[0], self._later[0]), self._whole(self._prefix[1], self._later[1])

        def get_seq_length(self) -> int:
            """Return the number of cached columns."""
            return self._prefix[0].shape[-2] + (0 if self._later is None else self._later[0].shape[-2])

        def _whole(self, prefix: Tensor, later: Tensor) -> Tensor:
            return torch.cat([prefix[self._group_of], later], dim=-2)

    return PrefixLayer
