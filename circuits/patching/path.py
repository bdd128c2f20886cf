"""Exact path patching: what one head tells another, or the answer, with everything else frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from circuits.execution.memory import MEMORY
from circuits.execution.prefix_cache import crosses
from circuits.execution.suffix_runner import Row
from circuits.interventions.intervention import Intervention, Replace
from circuits.patching.activation import plans_of, scores_of, settings_of
from circuits.patching.metrics import MetricName
from circuits.patching.sweep import Direction, Todo, Work, columns_for, sweep
from circuits.patching.targets import head_part
from circuits.results.patch_scores import PatchScores
from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError, PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site, parse_heads

Mlps = Literal["frozen", "live"]


def patch_paths(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    senders: Sequence[Head | str],
    receivers: Sequence[Head | str] | Literal["logits"] = "logits",
    tokens: str = "last",
    direction: Direction = "denoise",
    *,
    inputs: str = "qkv",
    mlps: Mlps = "frozen",
    metric: MetricName = "logit_difference",
    memory: int = MEMORY,
    min_effect: float | None = None,
    progress: bool | None = None,
) -> PatchScores:
    """Patch the path from each sender to each receiver, and measure what that alone does to the answer.

    A path head → logits: the sender's output of the other run is put into the run, every other attention output and every
    MLP's output keeps what it was, and the logits are read. A path head → head: in the same frozen run it is seen what the
    receiver would put out; that, and nothing else, is then put into the run, and everything after the receiver is live
    (Wang et al. 2023, arXiv 2211.00593, appendix B; Goldowsky-Dill et al. 2023, arXiv 2304.05969). Exact: every effect is
    a run of the model. One run a sender shows all its receivers.

    Parameters
    ----------
    model
        In evaluation mode.
    pairs
        Pairs of equal token length whose true answers differ.
    senders
        Heads whose outputs are patched, each apart.
    receivers
        Heads in layers above a sender's, or ``logits``. Of receivers that are not above a sender there is no path.
    tokens
        Where the sender is patched: ``last``, ``suffix``, ``image``, … or positions, as in `patch`, but not ``:each``.
    inputs
        By which of its inputs the receiver hears: any of the letters ``q``, ``k`` and ``v``.
    mlps
        ``frozen``: only what goes through the residual stream itself counts; ``live``: also what goes through MLPs
        between sender and receiver, as Wang et al. have it.
    direction, metric, memory, min_effect, progress
        As in `patch_heads`.

    Returns
    -------
    PatchScores
        Effects ``[n_pairs, n_paths, 1]``; paths are named ``L1.H2->L4.H0`` and ``L1.H2->logits``, sender by sender.

    Raises
    ------
    PatchError
        As `patch_heads`; and where no receiver is above any sender.
    SiteError
        For a head that the model does not have, or inputs that cannot be told apart in it.
    ConfigError
        For an option that does not exist.
    """
    settings = settings_of(model, direction, metric, memory, None, min_effect, progress)
    if mlps not in ("frozen", "live") or not inputs or set(inputs) - set("qkv") or tokens.endswith(":each"):
        msg = f"inputs='{inputs}', mlps='{mlps}', tokens='{tokens}': give letters of 'qkv', 'frozen' or 'live', no ':each'"
        raise ConfigError(msg)
    froms = sorted(set(parse_heads(senders)))
    if not froms:
        msg = "no senders: give heads, as Head(layer, head)"
        raise PatchError(msg)
    ways = _Paths(
        model, tuple(froms), None if receivers == "logits" else parse_heads(receivers), inputs, live=mlps == "live"
    )
    plans = plans_of(model, pairs, tokens, settings)
    found = sweep(model, plans, ways.work(), settings)
    return scores_of(model, pairs, plans, found, settings, ways.names(), tokens, f"{inputs}, mlps {mlps}")


class _Paths:
    """The paths of one call."""

    def __init__(
        self, model: Lvlm, senders: tuple[Head, ...], receivers: tuple[Head, ...] | None, inputs: str, *, live: bool
    ) -> None:
        self.model, self.senders, self.receivers, self.live = model, senders, receivers, live
        self.kept = [c for c in "qkv" if c not in inputs] if receivers is not None else []
        ends = [model.n_layers - 1] if receivers is None else [head.layer for head in receivers]
        self.between = range(senders[0].layer, max(ends, default=0) + 1)
        self.parts = {head: head_part(model, head) for head in (*senders, *(receivers or ()))}
        self.edges = [(s, r) for s in senders for r in receivers or () if r.layer > s.layer]
        if receivers is not None and not self.edges:
            msg = f"no path from {', '.join(map(str, senders))} to {', '.join(map(str, receivers)) or 'nothing'}: none is above"
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
        """Return the sites of a layer that keep what they were, and whether that holds in the sender's layer too."""
        cross = crosses(self.model, layer)
        sites = [(Site("decoder", layer, "attn_out", cross=cross), False)]
        if not self.live:
            sites.append((Site("decoder", layer, "mlp_out"), True))
        # What a layer attends to in the image is the same in every run.
        mine = [c for c in self.kept if not cross or c == "q"]
        return [*sites, *((Site("decoder", layer, c, cross=cross), False) for c in mine)]  # pyright: ignore[reportArgumentType]  # of "qkv"

    def _do(self, todo: Todo) -> Tensor:
        rows = [self._row(todo, sender) for sender in self.senders]
        if self.receivers is None:
            return todo.execute(rows, None)
        heard: dict[tuple[Head, Head], Tensor] = {}

        def see(layer: int, numbers: tuple[int, ...], z: Tensor) -> None:
            for k, number in enumerate(numbers):
                for edge in self.edges if number >= 0 else ():
                    if edge[0] == self.senders[number] and edge[1].layer == layer:
                        columns = columns_for(self.model, *self.parts[edge[1]])
                        heard[edge] = z[:, k, :, columns].clone()

        todo.execute(rows, see)
        return todo.execute([self._told(todo, r, heard[s, r]) for s, r in self.edges], None)

    def _row(self, todo: Todo, sender: Head) -> Row:
        """Return the run in which a sender alone is changed and all after it is frozen."""
        (site, head), at = self.parts[sender], todo.positions[0]
        value = todo.value(todo.source, site, at, columns_for(self.model, site, head))
        items = [Intervention(site, Replace(value), at, head)]
        every = tuple(range(todo.run.start, todo.run.length))
        for layer in self.between:
            for place, also in self._frozen(layer):
                if layer > sender.layer or (also and layer == sender.layer):
                    items.append(Intervention(place, Replace(todo.value(todo.run, place, every)), every))
        return tuple(items)

    def _told(self, todo: Todo, receiver: Head, z: Tensor) -> Row:
        site, head = self.parts[receiver]
        first = todo.run.length - z.shape[1]
        every = tuple(range(first, todo.run.length))
        return (Intervention(site, Replace(z), every, head),)
