"""Stage `trace`: activations of the discovery questions, in one process or in parts (`trace_shards`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from activation_store.format.schema import MANIFEST, manifest_name
from concepts.schema import ConceptDataset
from experiments.run.context import Context
from experiments.run.folder import SHARDS
from groundscope.core.errors import ConfigError
from groundscope.core.paths import is_file
from groundscope.core.user_files import read_text

if TYPE_CHECKING:
    from activation_store import ActivationStore


def make_activations(context: Context, root: Path) -> str:
    """Trace the questions that have answers to choose from; captions are told by `evaluate` alone."""
    options = context.config.trace
    return told(trace_into(context, root) if options.shards == 1 else merge(context, root), root)


def trace_into(context: Context, root: Path, worker: int = 0) -> ActivationStore:
    """Trace into a folder, all of the data or one of its parts."""
    from activation_store import trace

    options = context.config.trace
    return trace(
        context.model,
        traced(context),
        sites=options.sites,
        tokens=traced_tokens(context),
        out=root,
        batch_size=options.batch_size,
        dtype=options.dtype,
        worker=worker,
        workers=options.shards,
        on_error=cast('Literal["raise", "skip"]', options.on_error),
    )


def traced(context: Context) -> ConceptDataset:
    """Return the questions that are traced."""
    return context.discovery.filter(lambda e: bool(e.candidates))


def traced_tokens(context: Context) -> list[str]:
    """Return the token selections of the configuration that some example has tokens for.

    Without a box of the object that a question is about (POPE's files hold none), ``object:…`` would be rows of NaN.

    Raises
    ------
    ConfigError
        Where no selection is left.
    """
    from lvlm.token_selection import TokenSelection

    data = traced(context)
    boxes = [{o.id for o in example.objects if o.box is not None} for example in data]

    def fits(text: str) -> bool:
        selection = TokenSelection.parse(text)
        names = [selection.name or example.subject for example in data]
        return selection.role != "object" or any(name in own for name, own in zip(names, boxes, strict=True))

    tokens = context.config.trace.tokens
    chosen = [text for text in tokens if fits(text)]
    if tokens and not chosen:
        msg = (
            f"trace.tokens=[{','.join(tokens)}]: no example of this data has a box of the object it asks about; trace 'last' "
            "or 'image:mean', or give data with boxes"
        )
        raise ConfigError(msg)
    return chosen


def told(store: ActivationStore, root: Path) -> str:
    """Say what a store holds."""
    size = sum(p.stat().st_size for p in root.rglob("*.h5")) / 1e6
    skipped = len(store.provenance.get("skipped", {}))
    left_out = f" ({skipped} left out, as their images cannot be read)" if skipped else ""
    return f"{len(store)} examples{left_out}, {len(store.arrays)} arrays, {size:.0f} MB"


def unfinished(root: Path, shards: int) -> list[int]:
    """Return the parts of a store's folder that have not finished."""
    return [n for n in range(shards) if not (root / manifest_name(n)).exists()]


def merge(context: Context, root: Path) -> ActivationStore:
    """Return the whole store of a trace in parts.

    Raises
    ------
    ConfigError
        Where parts are missing, or the folder was begun in another number of parts.
    """
    from activation_store import ActivationStore

    shards = context.config.trace.shards
    check_parts(root, shards)
    left = unfinished(root, shards)
    if left:
        which = ",".join(map(str, left[:20])) + (",…" if len(left) > 20 else "")
        msg = (
            f"{len(left)} of {shards} parts are not traced: {which}; trace them with groundscope -m "
            f"stages=[examples,trace] trace.shards={shards} trace.shard={which} and the options of this run"
        )
        raise ConfigError(msg)
    # The last part to finish writes the manifest; one that was killed just before is asked to do it again.
    store = ActivationStore(root) if (root / MANIFEST).exists() else trace_into(context, root, 0)
    wanted = len(traced(context)) - len(store.provenance.get("skipped", {}))
    if len(store) != wanted:
        msg = f"'{root}' holds {len(store)} of {wanted} examples: remove that folder and trace again"
        raise ConfigError(msg)
    return store


def check_parts(root: Path, shards: int) -> None:
    """Raise `ConfigError` where a folder was begun in another number of parts."""
    mark = root / SHARDS
    begun = read_text(mark, limit=64, error=ConfigError).strip() if is_file(mark) else ""
    if begun not in {"", str(shards)} and not (root / MANIFEST).exists():
        msg = (
            f"'{root}' was begun in {begun} parts, not {shards}: go on with trace.shards={begun}, "
            f"or remove that folder to start anew"
        )
        raise ConfigError(msg)
