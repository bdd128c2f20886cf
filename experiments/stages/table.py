"""The stages of a run: one function and one line of `TABLE` each.

A stage's function gets the run's context and its own folder, writes its files there and returns one line for people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from concepts import counterfactuals
from concepts.schema import ConceptDataset, CounterfactualPair
from experiments.run.context import Context
from experiments.run.folder import write_json, write_text
from experiments.stages.probe_plan import probe_plan
from groundscope.core.errors import ConfigError, DataError, PatchError, ProbeError
from groundscope.core.text import nearest

if TYPE_CHECKING:
    from activation_store import ActivationStore
    from circuits import HeadScores


@dataclass(frozen=True)
class Stage:
    """What a stage is made from and how."""

    folder: str
    needs: tuple[str, ...]
    options: Callable[[Context], object]
    """What of the configuration it depends on."""
    work: Callable[[Context, Path], str]
    version: int = 1
    """Raised where the same options would now make something else."""
    check: Callable[[Context], None] = lambda _: None
    """Raises `ConfigError` where its options cannot work; called before any stage works."""
    shared: bool = True
    """Whether runs with the same key may share its files: not where it writes outside its folder, or of the run itself."""
    outside: tuple[str, ...] = ()
    """Files that it writes into the run's own folder."""


def make_examples(context: Context, root: Path) -> str:
    """Write both parts of the data, one record a line."""
    for name, part in (("discovery", context.discovery), ("held_out", context.held_out)):
        write_text(root / f"{name}.jsonl", "".join(json.dumps(example.record()) + "\n" for example in part))
        write_json(
            root / f"{name}.json", {"name": part.name, "digest": part.digest, "provenance": dict(part.provenance)}
        )
    images = [len({e.group for e in part}) for part in context.parts]
    return (
        f"{len(context.discovery)} questions on {images[0]} images to find things on, "
        f"{len(context.held_out)} on {images[1]} to test on"
    )


def make_activations(context: Context, root: Path) -> str:
    """Trace the questions that have answers to choose from; captions are told by `evaluate` alone."""
    from experiments.stages.trace_shards import merge

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
    from lvlm.sites import TokenSelection

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


def _trace_options(context: Context) -> object:
    # In how many parts it is traced changes neither rows nor values.
    options = {k: v for k, v in asdict(context.config.trace).items() if k not in {"shards", "shard"}}
    return [options, context.model_key()]


def make_probes(context: Context, root: Path) -> str:
    """Fit a grid of probes for every array of the plan."""
    from probes import fit_grid, probeable

    options = context.config.probe
    frame: Any = context.store.frame()
    # Splits made to mislead are kept out: probes must not learn the truth from where the model goes wrong.
    rows = frame["split"].isin(["neutral"]) if (frame["split"] == "neutral").any() else frame["split"].notna()
    mask = rows.to_numpy()
    possible = probeable(context.store, folds=options.folds, test_fraction=options.test_fraction, rows=mask)
    plan = probe_plan(context.store, frame[rows], options.concepts, possible)
    if not plan:
        reason = f"no concept has enough images of both classes to fit a probe: {more_data(context)}"
        write_json(root / "left_out.json", {"reason": reason})
        write_json(root / "plan.json", [])
        return f"left out: {reason}"
    fitted, done, left_out = 0, [], {}
    for entry in plan:
        try:
            grid = fit_grid(
                context.store,
                entry.concepts,
                entry.component,
                entry.tokens,
                entry.stack,
                penalties=options.penalties,
                folds=options.folds,
                test_fraction=options.test_fraction,
                seed=options.seed,
                rows=mask,
                skip_unplaceable=True,
            )
        except ProbeError as error:  # none of the concepts can be fitted to these images
            left_out[entry.name] = str(error)
            continue
        unplaced = grid.provenance.get("left_out", {})
        left_out |= {f"{concept} in {entry.name}": reason for concept, reason in unplaced.items()}
        grid.save(root / entry.name)
        fitted += grid.balanced_accuracy.size
        done.append(replace(entry, concepts=grid.concepts))
    write_json(root / "plan.json", [asdict(entry) for entry in done])
    if left_out:
        name, reason = next(iter(left_out.items()))
        write_json(root / "left_out.json", {"reason": reason, "grids": left_out})
        if not done:
            return f"left out: {reason}; {more_data(context)}"
        return f"{fitted} probes and as many controls in {len(done)} grids; left out: {len(left_out)}, {name}: {reason}"
    return f"{fitted} probes and as many controls in {len(done)} grids"


def more_data(context: Context) -> str:
    """Say which options of the configured data give more images to find things on."""
    data = context.config.data
    if data.source == "scenes":
        return f"draw more scenes, data.n_images above {data.n_images}"
    limited = f"raise data.limit={data.limit}, or " if data.limit is not None else ""
    return f"{limited}give questions on more images (data.questions, data.images), or lower data.test_share={data.test_share:g}"


def _check_probe(context: Context) -> None:
    wanted = context.config.probe.concepts
    if wanted is None:
        return
    known = list(dict.fromkeys(c for e in traced(context) for c in e.labels))
    missing = next((c for c in wanted if c not in known), None)
    if missing is not None:
        msg = f"concept '{missing}' is not in the data: there are {', '.join(known)}{nearest(missing, known)}"
        raise ConfigError(msg)


FALLBACK = "blank"
"""The kind of pair every image allows."""


def _check_patch(context: Context) -> None:
    kinds = list(context.config.patch.kinds)
    if not kinds or not set(kinds) <= set(counterfactuals.KINDS):
        msg = f"patch.kinds={kinds}: choose from {', '.join(counterfactuals.KINDS)}"
        raise ConfigError(msg)


def make_head_scores(context: Context, root: Path) -> str:
    """Patch every head on counterfactual pairs of every kind the data can make."""
    from circuits import patch_heads

    options = context.config.patch
    done: dict[str, HeadScores] = {}
    left_out: dict[str, str] = {}
    # Images that cannot be drawn again with one thing changed can still be blanked.
    for kind in dict.fromkeys((*options.kinds, FALLBACK)):
        if kind == FALLBACK and kind not in options.kinds and done:
            continue
        try:
            pairs = patching_pairs(context.discovery, kind, options.pairs)
            done[kind] = patch_heads(
                context.model,
                pairs,
                tokens=cast("Literal['last', 'suffix']", options.tokens),
                min_effect=options.min_effect,
            )
        except (DataError, PatchError) as error:
            left_out[kind] = str(error)
            continue
        done[kind].save(root / f"{kind}.safetensors")
    top = top_heads(done, options.top) if done else []
    write_json(root / "top.json", {"heads": [str(h) for h in top], "left_out": left_out, "kinds": list(done)})
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    if not done:
        return f"no head could be scored{note}: {next(iter(left_out.values()))}"
    counts = ", ".join(f"{s.n_pairs} {kind}" for kind, s in done.items())
    return f"{counts} pairs, every head exactly; top heads {', '.join(map(str, top))}{note}"


def patching_pairs(data: ConceptDataset, kind: str, limit: int) -> list[CounterfactualPair]:
    """Take at most `limit` pairs of a kind, each from another image, from the neutral split where there is one."""
    neutral = data.where(split="neutral")
    pairs = counterfactuals.pairs(neutral if len(neutral) else data, kind)
    chosen: dict[str, CounterfactualPair] = {}
    # Alternate the true answer, so that heads that only push "yes" do not pass for grounding heads.
    wanted: dict[str, int] = {}
    for pair in pairs:
        if pair.group in chosen or wanted.get(pair.clean.answer, 0) > min(wanted.values(), default=0) + 2:
            continue
        chosen[pair.group] = pair
        wanted[pair.clean.answer] = wanted.get(pair.clean.answer, 0) + 1
        if len(chosen) == limit:
            break
    return list(chosen.values())


def top_heads(scores: Mapping[str, HeadScores], count: int) -> Sequence[object]:
    """Rank heads by their mean effect, each kind of pair counting the same."""
    import numpy as np

    from lvlm import Head

    mean = np.mean([s.mean for s in scores.values()], axis=0)
    order = np.argsort(-mean, axis=None, kind="stable")[:count]
    return [Head(int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order]


def _check_steer(context: Context) -> None:
    from experiments.stages.steer import check

    check(context)


def _steer(context: Context, root: Path) -> str:
    from experiments.stages.steer import make_vector

    return make_vector(context, root)


def _evaluate_options(context: Context) -> object:
    from behavior.chair import read_synonyms

    options = asdict(context.config.evaluate)
    file = options.pop("synonyms")  # without it the key is the one of runs that had no such option
    words = {} if file is None else {"synonyms": sorted(read_synonyms(file).items())}
    return [options | words, context.model_key()]


def _evaluate(context: Context, root: Path) -> str:
    from experiments.stages.evaluate import make_behavior

    return make_behavior(context, root)


def _check_export(context: Context) -> None:
    from experiments.stages.export import check

    check(context)


def _export(context: Context, root: Path) -> str:
    from experiments.stages.export import make_exports

    return make_exports(context, root)


def _check_evaluate(context: Context) -> None:
    options = context.config.evaluate
    if options.conditions is not None or options.synonyms is not None:
        from experiments.stages.evaluate import check

        check(context)


def _diagnose(context: Context, root: Path) -> str:
    from experiments.stages.diagnose import make_diagnoses

    return make_diagnoses(context, root)


def _report(context: Context, root: Path) -> str:
    from experiments.report import make_report

    return make_report(context, root)


TABLE: Mapping[str, Stage] = MappingProxyType(
    {
        "examples": Stage(
            "examples",
            (),
            lambda c: [asdict(c.config.data), c.discovery.digest, c.held_out.digest],
            make_examples,
            2,
        ),
        "trace": Stage("activations", ("examples",), _trace_options, make_activations, 3),
        "probe": Stage("probes", ("trace",), lambda c: asdict(c.config.probe), make_probes, 3, _check_probe),
        "patch": Stage(
            "circuits",
            ("examples",),
            lambda c: [asdict(c.config.patch), c.model_key()],
            make_head_scores,
            2,
            check=_check_patch,
        ),
        "steer": Stage(
            "steering",
            ("examples", "trace", "patch"),
            lambda c: [asdict(c.config.steer), c.model_key()],
            _steer,
            4,
            _check_steer,
        ),
        "evaluate": Stage(
            "behavior",
            ("examples", "steer"),
            _evaluate_options,
            _evaluate,
            3,
            _check_evaluate,
        ),
        "diagnose": Stage(
            "diagnosis", ("examples", "trace"), lambda c: [asdict(c.config.diagnose), c.model_key()], _diagnose, 2
        ),
        "export": Stage(
            "export", ("steer",), lambda c: [asdict(c.config.export), c.model_key()], _export, 2, _check_export
        ),
        "report": Stage(
            "report",
            ("examples", "trace", "probe", "patch", "steer", "evaluate", "diagnose", "export"),
            lambda c: [asdict(c.config.report), c.headline(), c.config.diagnose.shown, c.config.steer.max_drop],
            _report,
            3,
            shared=False,
            outside=("report.html",),
        ),
    }
)
"""Stage to its entry, in the order they run."""
