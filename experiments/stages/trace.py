"""Stage `trace`: activations of the discovery questions, in one process or in parts (`trace_shards`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from activation_store.format.schema import MANIFEST, manifest_name
from concepts.schema import ConceptDataset
from experiments.config import TraceConfig
from experiments.run.context import Context
from experiments.run.folder import SHARDS
from groundscope.core.errors import ConfigError
from groundscope.core.paths import is_file
from groundscope.core.text import format_count
from groundscope.core.user_files import read_text
from lvlm.sites import LAYER_COMPONENTS

if TYPE_CHECKING:
    from activation_store import ActivationStore, Reduction


def make_activations(context: Context, root: Path) -> str:
    """Trace the questions that have candidate answers; captions are used by `evaluate` only."""
    options = context.config.trace
    return describe(trace_into(context, root) if options.shards == 1 else merge(context, root), root)


def trace_into(context: Context, root: Path, worker: int = 0) -> ActivationStore:
    """Trace all questions, or one part of them, into a folder."""
    from activation_store import trace

    options = context.config.trace
    return trace(
        context.model,
        traced_examples(context),
        sites=traced_sites(options),
        tokens=traced_tokens(context),
        out=root,
        batch_size=options.batch_size,
        dtype=options.dtype,
        heads=options.heads,
        reduce=traced_reductions(options),
        shard_size=options.shard_size,
        unembedding=options.unembedding,
        worker=worker,
        workers=options.shards,
        on_error=cast('Literal["raise", "skip"]', options.on_error),
    )


def traced_sites(options: TraceConfig) -> list[str]:
    """Return the sites of the configuration, with components of the decoder restricted to its layers.

    >>> from experiments.config import TraceConfig
    >>> from experiments.stages.trace import traced_sites
    >>> traced_sites(TraceConfig(sites=["z", "vision.z", "decoder.L5.z"], layers=[1, 2]))
    ['decoder.L1.z', 'decoder.L2.z', 'vision.z', 'decoder.L5.z']
    """
    if options.layers is None:
        return list(options.sites)
    sites = []
    for site in options.sites:
        name = site.removeprefix("decoder.")
        whole = name.removeprefix("cross.") in LAYER_COMPONENTS
        sites += [f"decoder.L{layer}.{name}" for layer in options.layers] if whole else [site]
    return list(dict.fromkeys(sites))


def traced_reductions(options: TraceConfig) -> dict[str, list[Reduction]]:
    """Return the reductions of the configuration by token selection.

    Raises
    ------
    ConfigError
        For an unknown reduction, one without token selection, or wrong options of one.
    """
    from activation_store import reductions
    from probes import ProbeGrid

    by_tokens: dict[str, list[Reduction]] = {}
    for name, settings in options.reduce.items():
        make = reductions[name]
        values = dict(settings) if isinstance(settings, Mapping) else {}
        tokens = values.pop("tokens", None)
        if not tokens:
            msg = f"trace.reduce.{name} needs a token selection: +trace.reduce.{name}.tokens=image:all"
            raise ConfigError(msg)
        folders, concepts = values.pop("probes", None), values.pop("concepts", None)
        if folders is not None:
            grids = [ProbeGrid.load(folder) for folder in ([folders] if isinstance(folders, str) else folders)]
            values["directions"] = [
                grid.direction(concept, layer)
                for grid in grids
                for concept in concepts or grid.concepts
                for layer in grid.layers
            ]
        try:
            reduction = make(**values)
        except TypeError as error:
            msg = f"trace.reduce.{name}: {str(error).split('() ')[-1]}"
            raise ConfigError(msg) from error
        for selection in [tokens] if isinstance(tokens, str) else tokens:
            by_tokens.setdefault(selection, []).append(reduction)
    return by_tokens


def traced_examples(context: Context) -> ConceptDataset:
    """Return the discovery questions that have candidate answers."""
    return context.discovery.filter(lambda e: bool(e.candidates))


def traced_tokens(context: Context) -> list[str]:
    """Return the token selections of the configuration that exist in some example.

    If no question has a box of its object, as in POPE's files, ``object:…`` would give rows of NaN and is left out.

    Raises
    ------
    ConfigError
        If no selection remains.
    """
    from lvlm.token_selection import TokenSelection

    data = traced_examples(context)
    boxes = [{o.id for o in example.objects if o.box is not None} for example in data]

    def exists(text: str) -> bool:
        selection = TokenSelection.parse(text)
        names = [selection.name or example.subject for example in data]
        return selection.role != "object" or any(name in ids for name, ids in zip(names, boxes, strict=True))

    tokens = context.config.trace.tokens
    chosen = [text for text in tokens if exists(text)]
    if tokens and not chosen:
        msg = (
            f"trace.tokens=[{','.join(tokens)}]: no question of these data has a box of its object; trace 'last' or "
            "'image:mean', or use data with boxes"
        )
        raise ConfigError(msg)
    return chosen


def describe(store: ActivationStore, root: Path) -> str:
    """Return examples, arrays and size of a store in one line."""
    size = sum(p.stat().st_size for p in root.rglob("*.h5")) / 1e6
    skipped = len(store.provenance.get("skipped", {}))
    note = f" ({skipped} skipped, because their images cannot be read)" if skipped else ""
    return f"{format_count(len(store), 'example')}{note}, {format_count(len(store.arrays), 'array')}, {size:.0f} MB"


def unfinished(root: Path, shards: int) -> list[int]:
    """Return the parts of a trace that have not finished."""
    return [n for n in range(shards) if not (root / manifest_name(n)).exists()]


def merge(context: Context, root: Path) -> ActivationStore:
    """Return the complete store of a trace in parts.

    Raises
    ------
    ConfigError
        If parts are missing, or the trace was started with another number of parts.
    """
    from activation_store import ActivationStore

    shards = context.config.trace.shards
    check_parts(root, shards)
    missing = unfinished(root, shards)
    if missing:
        which = ",".join(map(str, missing[:20])) + (",…" if len(missing) > 20 else "")
        msg = (
            f"{len(missing)} of {format_count(shards, 'part')} are not traced: {which}; trace them with groundscope -m "
            f"stages=[examples,trace] trace.shards={shards} trace.shard={which} and the options of this run"
        )
        raise ConfigError(msg)
    # The last part to finish writes the manifest; if it was killed just before, the manifest is written now.
    store = ActivationStore(root) if (root / MANIFEST).exists() else trace_into(context, root, 0)
    count = len(traced_examples(context)) - len(store.provenance.get("skipped", {}))
    if len(store) != count:
        msg = f"'{root}' has {len(store)} of {format_count(count, 'example')}: remove that folder and trace again"
        raise ConfigError(msg)
    return store


def check_parts(root: Path, shards: int) -> None:
    """Raise `ConfigError` if a trace was started with another number of parts."""
    mark = root / SHARDS
    started = read_text(mark, limit=64, error=ConfigError).strip() if is_file(mark) else ""
    if started not in {"", str(shards)} and not (root / MANIFEST).exists():
        msg = (
            f"the trace in '{root}' was started with trace.shards={started}, not {shards}: continue with that number, "
            "or remove that folder to start again"
        )
        raise ConfigError(msg)
