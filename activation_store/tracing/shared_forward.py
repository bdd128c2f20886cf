"""Trace questions about one image: the prefix that they have in common runs once, then all other tokens in one forward pass.

Every row is stored with the values of its whole prompt: those of the prefix, the image included, come from the one run of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_store.tracing.module_values import check_width, raw_value
from activation_store.tracing.plan import Read, split_by_example, stack_layers
from activation_store.tracing.shared_rows import SharedSelection, share_selection
from lvlm.decoding.prefix_run import PrefixBatch, run_prefix
from lvlm.encoding.encode import Batch
from lvlm.prefix_groups import PrefixGroups
from lvlm.prefix_sharing import unshared_because

if TYPE_CHECKING:
    from activation_store.format.schema import Key
    from activation_store.tracing.continuation import ContinuedBatch
    from activation_store.tracing.plan import Plan
    from activation_store.tracing.tracer import Tracer
    from concepts.schema import Example
    from lvlm.model import Lvlm
    from lvlm.sites import Site
    from lvlm.token_map import TokenMap


def shares_prefixes(model: Lvlm, examples: Sequence[Example], plan: Plan) -> bool:
    """Whether examples about one image share the run of their prefix in a trace.

    Not if attention patterns are stored, whose columns are the tokens of a whole prompt, or tokens of mentions, whose
    log-probabilities are needed.
    """
    images = [tuple(image.identity for image in e.images) for e in examples if e.images]
    if len(set(images)) == len(images):
        return False
    if any(read.site.component == "pattern" for read in plan.reads):
        return False
    if any(s.role == "mention" for selections in plan.selections.values() for s in selections):
        return False
    return not unshared_because(model)


def trace_batches(model: Lvlm, examples: Sequence[Example], size: int, extra: int) -> Iterator[Batch | PrefixBatch]:
    """Yield the examples in batches: first those with an image in common, with prefixes of equal length, then all others."""
    groups = PrefixGroups(model, examples, size, extra)
    for of_batch in groups.batches():
        alike: dict[Any, list[Any]] = {}
        for group in of_batch:
            alike.setdefault(group.signature, []).append(group)
        for members in alike.values():
            yield PrefixBatch(model, members)
    others = groups.others()
    for batch in model.batches([examples[i] for i in others], size):
        yield Batch(tuple(others[i] for i in batch.index), batch.encodings, batch.inputs)


class SharedForward:
    """The two forward passes of one batch: `run_prefix`, then `run_tails`."""

    def __init__(self, tracer: Tracer, batch: PrefixBatch) -> None:
        self._tracer, self._batch = tracer, batch
        self._vectors: dict[Key, dict[int, Tensor]] = {a.key: {} for a in tracer.plan.schema.arrays}
        self._columns = {a.key: tracer.plan.columns(a) for a in tracer.plan.schema.arrays}
        self._widths = tracer.widths
        self._parts: dict[tuple[Site, str], Tensor] = {}

    @torch.no_grad()
    def run(
        self, maps: Sequence[TokenMap], on: ContinuedBatch | None, *, needs_logits: bool
    ) -> tuple[dict[Key, Tensor], Tensor | None]:
        """Run the tails, after the prefixes if they have not run; return the selected vectors and the last logits.

        The vectors are those of `Tracer.forward`.
        """
        batch, tracer = self._batch, self._tracer
        selections = {
            (stack, str(s)): share_selection([m.positions(s, stack) for m in maps], s, batch, stack)
            for stack, chosen in tracer.plan.selections.items()
            for s in chosen
        }
        self._trace_prefix(selections, needs_logits=needs_logits)
        logits = self._trace_tails(selections, on, needs_logits=needs_logits)
        vectors = self._vectors
        return {a.key: stack_layers(vectors[a.key], a) for a in tracer.plan.schema.arrays}, logits

    # ---- the two passes

    def _trace_prefix(self, selections: Mapping[tuple[str, str], SharedSelection], *, needs_logits: bool) -> None:
        batch, tracer = self._batch, self._tracer
        numbers = range(len(batch.groups))
        inputs, _ = batch.prefix_inputs(numbers)
        later = needs_logits or any(s.part != "prefix" for s in selections.values())
        reached = self._reads(selections, "prefix")
        # The tails read a cache of all layers up to the last site.
        last = tracer.reads[-1:] if later and not needs_logits else ()

        def forward(values: Mapping[str, Tensor], past: Any) -> None:
            with ExitStack() as stack:
                calls = self._calls(stack, reached)
                less = stack.enter_context(tracer.model.last_logits(1))
                options = {"use_cache": True, "past_key_values": past, **less}
                with tracer.wrapper.trace(**values, **options) as invoker:
                    for view, reads in reached:
                        self._keep(
                            reads, raw_value(view, reads[0].place.side), calls, selections, "prefix", len(numbers)
                        )
                    if needs_logits:
                        self._ignore(tracer.wrapper.output)
                    else:
                        for view, reads in last:
                            if not reached or reached[-1][0] is not view:
                                self._ignore(raw_value(view, reads[0].place.side))
                        invoker.stop()

        cache, position = run_prefix(tracer.model, inputs, batch.width + batch.tail, forward)
        batch.store(batch.split(numbers, cache, position))

    def _trace_tails(
        self,
        selections: Mapping[tuple[str, str], SharedSelection],
        on: ContinuedBatch | None,
        *,
        needs_logits: bool,
    ) -> Tensor | None:
        batch, tracer = self._batch, self._tracer
        reached = self._reads(selections, "tail")
        if not reached and not needs_logits:
            return None
        inputs = batch.inputs_after(on.rows if on else None)
        extra = on.extra if on else 0
        logits: list[Tensor] = []
        with ExitStack() as stack:
            calls = self._calls(stack, reached)
            stack.enter_context(tracer.model.reading_answers(batch.width + batch.tail))
            less = stack.enter_context(tracer.model.last_logits(extra + 1))
            with tracer.wrapper.trace(**inputs, use_cache=True, **less) as invoker:
                for view, reads in reached:
                    self._keep(reads, raw_value(view, reads[0].place.side), calls, selections, "tail", len(batch.index))
                if needs_logits:
                    logits.append(tracer.wrapper.output.logits[:, -1 - extra])
                else:
                    invoker.stop()
        return logits[0] if logits else None

    # ---- reading

    def _reads(self, selections: Mapping[tuple[str, str], SharedSelection], part: str) -> Any:
        """Return the reads of which some selected token is in a part."""
        stacks = {stack for (stack, _), s in selections.items() if s.part in (part, "both")}
        chosen = [(view, tuple(r for r in group if r.site.stack in stacks)) for view, group in self._tracer.reads]
        return [(view, group) for view, group in chosen if group]

    def _calls(self, stack: ExitStack, reached: Any) -> dict[Site, Any]:
        calls = {}
        for _, reads in reached:
            for read in reads:
                calls[read.site], handles = read.place.call()
                stack.callback(handles.remove)
        return calls

    def _keep(
        self,
        reads: Sequence[Read],
        raw: Any,
        calls: Mapping[Site, Any],
        selections: Mapping[tuple[str, str], SharedSelection],
        part: str,
        rows: int,
    ) -> None:
        for read in reads:
            site = read.site
            x = split_by_example(read.place.value(raw, calls[site]), rows, site)
            for (stack, name), selection in selections.items():
                if stack != site.stack or selection.part not in (part, "both"):
                    continue
                if selection.part == "both" and part == "prefix":
                    self._parts[site, name] = selection.from_prefix(x)
                elif selection.part == "both":
                    both = torch.cat([self._parts.pop((site, name)), selection.from_tail(x)])
                    self._store(site, name, selection.for_rows(both), x, None)
                elif part == "prefix":
                    self._store(site, name, selection.from_prefix(x), x, selection)
                else:
                    self._store(site, name, selection.from_tail(x), x, None)

    def _store(self, site: Site, name: str, selected: Tensor, x: Tensor, shared: SharedSelection | None) -> None:
        """Store selected vectors; those of a `shared` selection are repeated for the rows."""

        def for_rows(values: Tensor) -> Tensor:
            return values if shared is None else shared.for_rows(values)

        component = f"cross.{site.component}" if site.cross else site.component
        key = (site.stack, component, name)
        if key in self._widths:
            check_width(site, x, self._widths[key], self._batch)
            columns = self._columns[key]
            self._vectors[key][site.layer] = for_rows(selected if columns is None else selected[..., columns])
        for reduced_key, values in self._tracer.reduced.get((site, name), ()):
            self._vectors[reduced_key][site.layer] = for_rows(values(selected))

    def _ignore(self, _value: Any) -> None:
        """Wait for a tensor."""
