"""Exact path patching: the effect of one head on another, or on the answer, with all other nodes frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from circuits.execution.memory import MEMORY
from circuits.execution.prefix_cache import crosses
from circuits.execution.suffix_runner import Row
from circuits.interventions.intervention import Intervention, Replace
from circuits.patching.activation import plans_of, scores_of, settings_of
from circuits.patching.metrics import MetricFunction, metric_of
from circuits.patching.sweep import Mode, Todo, Work, columns_for, sweep
from circuits.patching.targets import head_part
from circuits.results.patch_scores import PatchScores
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ConfigError, PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site, parse_heads
from lvlm.token_selection import PATCHABLE, TokenSelection

Mlps = Literal["frozen", "live"]
TOKENS = tuple(form for form in PATCHABLE if not form.endswith(":each"))


def patch_paths(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    senders: Sequence[Head | str],
    receivers: Sequence[Head | str] | Literal["logits"] = "logits",
    *,
    tokens: str = "last",
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    inputs: str = "qkv",
    mlps: Mlps = "frozen",
    min_effect: float | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> PatchScores:
    """Patch the path from each sender to each receiver, and measure the effect on the answer.

    A path head → logits: patch the sender's output from the other run, freeze all other attention outputs and MLP outputs,
    and read the logits. A path head → head: record the receiver's output in the same frozen run, then patch only that
    output, with everything after the receiver live (Wang et al. 2023, arXiv 2211.00593, appendix B; Goldowsky-Dill et al.
    2023, arXiv 2304.05969). Exact: every effect is a run of the model. One run per sender records all its receivers.

    Parameters
    ----------
    model
        In evaluation mode.
    pairs
        Pairs of equal token length whose true answers differ.
    senders
        Heads whose outputs are patched, each separately.
    receivers
        Heads in layers above a sender's, or ``logits``. A sender has no path to receivers that are not above it.
    tokens
        Positions of the patched sender: ``last``, ``suffix:all``, ``image:all``, … as in `patch`, but not ``:each``.
    mode, metric, min_effect, memory, progress
        As in `patch_heads`.
    inputs
        Inputs of the receiver that the path enters: any of the letters ``q``, ``k`` and ``v``.
    mlps
        ``frozen``: only the direct path through the residual stream; ``live``: also paths through MLPs between sender and
        receiver, as in Wang et al.

    Returns
    -------
    PatchScores
        Effects ``[n_pairs, n_paths, 1]``; paths are named ``L1.H2->L4.H0`` and ``L1.H2->logits``, ordered by sender.

    Raises
    ------
    PatchError
        As `patch_heads`; and if no receiver is above any sender.
    SiteError
        If the model has no such head, or its inputs cannot be separated.
    ConfigError
        If an option has an unknown value.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> gs.patch_paths(model, pairs, ["L1.H0"], ["L3.H1"]).sites
    ('L1.H0->L3.H1',)
    """
    settings = settings_of(model, mode, metric_of(metric), memory, None, min_effect, progress)
    if mlps not in ("frozen", "live") or not inputs or set(inputs) - set("qkv"):
        msg = f"invalid inputs='{inputs}' or mlps='{mlps}': pass letters of 'qkv', and mlps 'frozen' or 'live'"
        raise ConfigError(msg)
    tokens = str(TokenSelection.parse(tokens, allowed=TOKENS))
    sender_heads = sorted(set(parse_heads(senders)))
    if not sender_heads:
        msg = "senders is empty; pass heads such as Head(layer, head)"
        raise PatchError(msg)
    paths = _Paths(
        model,
        tuple(sender_heads),
        None if receivers == "logits" else parse_heads(receivers),
        inputs,
        live=mlps == "live",
    )
    plans = plans_of(model, pairs, tokens, settings)
    result = sweep(model, plans, paths.work(), settings)
    return scores_of(model, plans, result, settings, paths.names(), tokens, f"{inputs}, mlps {mlps}")


class _Paths:
    """The paths of one call."""

    def __init__(
        self, model: Lvlm, senders: tuple[Head, ...], receivers: tuple[Head, ...] | None, inputs: str, *, live: bool
    ) -> None:
        self.model, self.senders, self.receivers, self.live = model, senders, receivers, live
        self.frozen_inputs = [c for c in "qkv" if c not in inputs] if receivers is not None else []
        ends = [model.n_layers - 1] if receivers is None else [head.layer for head in receivers]
        self.between = range(senders[0].layer, max(ends, default=0) + 1)
        self.parts = {head: head_part(model, head) for head in (*senders, *(receivers or ()))}
        self.edges = [(s, r) for s in senders for r in receivers or () if r.layer > s.layer]
        if receivers is not None and not self.edges:
            msg = f"no receiver ({', '.join(map(str, receivers)) or 'none'}) is above a sender ({', '.join(map(str, senders))})"
            raise PatchError(msg)

    def names(self) -> list[str]:
        if self.receivers is None:
            return [f"{s}->logits" for s in self.senders]
        return [f"{s}->{r}" for s, r in self.edges]

    def work(self) -> Work:
        sites = [site for site, _ in self.parts.values()]
        frozen = [site for layer in self.between for site, _ in self._frozen(layer)]
        every = tuple(dict.fromkeys([*sites, *frozen]))
        for site in every:
            self.model.locate(site)
        count = len(self.names())
        return Work(every, count, max(count, len(self.senders)), self._do)

    def _frozen(self, layer: int) -> list[tuple[Site, bool]]:
        """Return the frozen sites of a layer, each with whether it is also frozen in the sender's layer."""
        cross = crosses(self.model, layer)
        sites = [(Site("decoder", layer, "attn_out", cross=cross), False)]
        if not self.live:
            sites.append((Site("decoder", layer, "mlp_out"), True))
        # Keys and values of cross-attention are the same in every run.
        mine = [c for c in self.frozen_inputs if not cross or c == "q"]
        return [*sites, *((Site("decoder", layer, c, cross=cross), False) for c in mine)]  # pyright: ignore[reportArgumentType]  # of "qkv"

    def _do(self, todo: Todo) -> Tensor:
        rows = [self._row(todo, sender) for sender in self.senders]
        if self.receivers is None:
            return todo.execute(rows, None)
        receiver_outputs: dict[tuple[Head, Head], Tensor] = {}

        def see(layer: int, numbers: tuple[int, ...], z: Tensor) -> None:
            for k, number in enumerate(numbers):
                for edge in self.edges if number >= 0 else ():
                    if edge[0] == self.senders[number] and edge[1].layer == layer:
                        columns = columns_for(self.model, *self.parts[edge[1]])
                        receiver_outputs[edge] = z[:, k, :, columns].clone()

        todo.execute(rows, see)
        return todo.execute([self._receiver_row(todo, r, receiver_outputs[s, r]) for s, r in self.edges], None)

    def _row(self, todo: Todo, sender: Head) -> Row:
        """Return the changes of a run with one patched sender and all later nodes frozen."""
        (site, head), at = self.parts[sender], todo.positions[0]
        value = todo.value(todo.source, site, at, columns_for(self.model, site, head))
        items = [Intervention(site, Replace(value), at, head)]
        every = tuple(range(todo.run.start, todo.run.length))
        for layer in self.between:
            for place, also in self._frozen(layer):
                if layer > sender.layer or (also and layer == sender.layer):
                    items.append(Intervention(place, Replace(todo.value(todo.run, place, every)), every))
        return tuple(items)

    def _receiver_row(self, todo: Todo, receiver: Head, z: Tensor) -> Row:
        site, head = self.parts[receiver]
        first = todo.run.length - z.shape[1]
        every = tuple(range(first, todo.run.length))
        return (Intervention(site, Replace(z), every, head),)
