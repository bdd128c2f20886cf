"""``groundscope plan …``: what a trace will take, from tracing some of it for a minute or less.

The configured model traces examples spread evenly over the configured data, in a folder that is removed again; bytes,
forwards and seconds for an example come from that, and grow with the number of examples. What is measured is this
machine: on another one the hours are others, the bytes and forwards are not.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from concepts.schema import ConceptDataset
from experiments.run.context import Context
from experiments.stages.table import traced
from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from activation_store import ActivationStore

SECONDS = 30.0
"""How long is measured, about: half a minute, so that with the model's loading it is a minute."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Estimate:
    """What a trace will take."""

    examples: int
    measured: int
    """Examples that were traced to find out."""
    sites: dict[str, float]
    """Array to its bytes for all examples."""
    on_disk: float
    """Bytes of the whole store, with its tables and digests."""
    forwards: int
    seconds: float
    """For all examples in one process, after the model is loaded."""
    loading: float
    """Seconds to load the model, in every process."""

    def hours(self, parts: int) -> float:
        """Return the hours each of so many processes takes, on as many machines like this one."""
        return (self.seconds / parts + self.loading) / 3600


def estimate(context: Context, examples: int | None = None, seconds: float = SECONDS) -> Estimate:
    """Trace a little and return what all of it will take.

    Parameters
    ----------
    context
        The run that is planned; nothing is written into its folder.
    examples
        For how many examples; by default those of the configured data.
    seconds
        How long to measure, about.
    """
    from lvlm.applied import observer

    data = traced(context)
    start = time.perf_counter()
    model = context.model.hf
    loading = time.perf_counter() - start
    count = 0

    @observer
    def counted(*_: object) -> None:  # one of each trace is for the shapes alone
        nonlocal count
        count += 1

    handle = model.register_forward_pre_hook(counted)
    try:
        with tempfile.TemporaryDirectory() as folder:
            some = min(len(data), context.config.trace.batch_size)
            _trace(context, _spread(data, some), Path(folder) / "first")  # what happens once: memory, kernels, proofs
            spent, number = 0.0, 0
            sizes: list[tuple[int, int]] = []
            while True:
                number, count = number + 1, 0
                root = Path(folder) / str(number)
                begun = time.perf_counter()
                store = _trace(context, _spread(data, some), root)
                took = time.perf_counter() - begun
                spent += took
                sizes.append((some, sum(p.stat().st_size for p in root.rglob("*") if p.is_file())))
                # Longer traces hide what a trace costs however short it is; the last one counts.
                if some == len(data) or spent + 2 * took > seconds:
                    break
                some = min(len(data), 2 * some)
            wanted = len(data) if examples is None else examples
            factor = wanted / some
            sites = {}
            for info in store.arrays:
                tokens = 1.0
                if info.ragged:
                    layer = info.layers[0] if info.layers else 0
                    site = "projector.out" if info.stack == "projector" else f"{info.stack}.L{layer}.{info.component}"
                    tokens = len(store.ragged(site, info.tokens).values) / some
                each = tokens * info.n_layers * info.width * _BYTES[context.config.trace.dtype]
                sites[info.name] = each * wanted
            return Estimate(
                wanted, some, sites, _grown(sizes, wanted), math.ceil((count - 1) * factor), took * factor, loading
            )
    finally:
        handle.remove()


def _grown(sizes: Sequence[tuple[int, int]], examples: int) -> float:
    """Return the bytes of a store of so many examples, from (examples, bytes) of smaller ones: what is there once, and each."""
    (few, small), (many, large) = sizes[max(0, len(sizes) - 2)], sizes[-1]
    each = (large - small) / (many - few) if many > few else large / many
    return large + (examples - many) * each


def _trace(context: Context, some: ConceptDataset, root: Path) -> ActivationStore:
    from activation_store import trace

    options = context.config.trace
    return trace(
        context.model,
        some,
        sites=options.sites,
        tokens=options.tokens,
        out=root,
        batch_size=options.batch_size,
        dtype=options.dtype,
        progress=False,
    )


def _spread(data: ConceptDataset, count: int) -> ConceptDataset:
    """Return so many examples, evenly spread: lengths and pictures may change along the data."""
    chosen = {data.examples[i * len(data) // count].id for i in range(count)}
    return data.filter(lambda e: e.id in chosen)


def show(arguments: Sequence[str]) -> int:
    """Print what a trace with these options will take.

    Raises
    ------
    ConfigError
        For options that cannot be, as running them would.
    """
    from rich.table import Table
    from rich.text import Text

    from experiments.cli.overrides import composed, read
    from experiments.cli.validation import check
    from experiments.run.folder import RunFolder
    from experiments.text import plain_console, size

    own = {w.partition("=")[0]: w.partition("=")[2] for w in arguments if w.startswith(("examples=", "seconds="))}
    words = [w for w in arguments if w.partition("=")[0] not in own]
    try:
        examples = int(own["examples"]) if "examples" in own else None
        seconds = float(own.get("seconds", SECONDS))
    except ValueError as error:
        msg = f"groundscope plan: {error}; write examples=100000 or seconds=30"
        raise ConfigError(msg) from error
    if (examples is not None and examples < 1) or not seconds > 0:
        msg = "groundscope plan: examples and seconds must be above 0"
        raise ConfigError(msg)
    config, _ = composed(read(words).first())
    check(config)
    console = plain_console()
    with tempfile.TemporaryDirectory() as folder:
        context = Context(config, RunFolder(Path(folder)), console)
        with console.status("measuring") if console.is_terminal else nullcontext():
            found = estimate(context, examples, seconds)
    console.print(
        f"model {config.model.path} on {config.model.device}, {found.examples} examples; measured on {found.measured}",
        markup=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("array")
    table.add_column("bytes", justify="right")
    for name, count in found.sites.items():
        table.add_row(Text(name), size(count))
    table.add_row("all on disk", size(found.on_disk))
    console.print(table)
    each = found.seconds / found.examples
    console.print(
        f"{found.forwards} forwards, {1000 * each:.1f} ms an example, {found.loading:.0f} s to load the model"
    )
    for parts in sorted({1, 4, config.trace.shards}):
        hours = found.hours(parts)
        label = "one process" if parts == 1 else f"{parts} processes, trace.shards={parts}"
        console.print(f"{label}: {hours:.2f} hours" + ("" if parts == 1 else " each"))
    console.print("hours are this machine's; several processes need as many machines like it")
    return 0
