"""Every training-free method and its controls on the embedded model: errors, captions and price.

    python benchmarks/arena.py [--quick] [--save] [--images 1000] [--folder FOLDER] [--price] [--sampling] [--choose]

The data is synthetic: icon scenes of seed 1000, which no method has seen (all questions of conflict, absent and present objects
and captions; neutral and typical ones of the first 200 images). Methods have their published parameters, steering vectors the
strength that a run chooses; with --choose all also have the value of one parameter that is best on 60 other scenes, among equally
many for every row. Heads (the six that a default run selects) and activations come from 240 scenes of seed 0. Main columns are
conflict scenes (answers by prior) and false yes to absent objects that often occur together with what is shown; CHAIR_i of the
embedded model is near its floor. Answers are kept in the folder, so that an interrupted comparison continues; seconds are
measured with --price, on an otherwise idle machine.

better_than_every_control
    number of methods that reduce errors by prior or false yes beyond the paired interval against every control;
best_method
    errors of the best method divided by those of the model alone; the name is in the table.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import groundscope as gs
from benchmarks._harness import RESULTS, Figure, describe_device, figure, finish, option_parser, progress, wide_console
from circuits.patching.outcomes import RIGHT
from concepts import scenes
from concepts.schema import ConceptDataset
from experiments.config import PatchConfig
from experiments.stages.patch import KINDS, MIN_RIGHT
from mitigation.arena.figure import errors_of
from mitigation.arena.result import ArenaResult
from mitigation.arena.rows import ArenaRow, default_rows, make_rows
from mitigation.arena.run import ArenaOptions, run_arena
from mitigation.arena.search import choose_parameters, search_summary
from mitigation.arena.tables import as_text

DERIVATION, NEUTRAL = 240, 200


def derivation_data(model: gs.Lvlm, folder: Path, images: int) -> tuple[gs.DerivationData, ConceptDataset]:
    """Return what methods are made from, and the questions about other images on which parameters are chosen."""
    discovery = scenes.dataset(images + images // 4, seed=0)
    groups = list(dict.fromkeys(e.group for e in discovery))
    first = set(groups[:images])
    own, validation = (
        discovery.filter(lambda e, inside=inside: (e.group in first) == inside) for inside in (True, False)
    )
    with progress("trace"):
        store = gs.trace(model, own, ["z", "resid_post"], ["last"], folder / f"store-{images}", progress=False)
    with progress("patch"):
        heads = default_heads(model, own)
    return gs.DerivationData(model, store, own, heads), validation


def default_heads(model: gs.Lvlm, data: ConceptDataset) -> tuple[gs.Head, ...]:
    """Return the heads that a default run selects: the largest effects, averaged over three kinds of pairs."""
    options, scores = PatchConfig(), []
    for kind in KINDS:
        pairs = gs.counterfactuals.balanced_pairs(data, kind, limit=options.pairs)
        every = gs.patch_heads(model, pairs, min_effect=options.min_effect, progress=False)
        outcomes = gs.pair_outcomes(model, pairs)
        right = {i for i, outcome in zip(outcomes.ids, outcomes.outcomes, strict=True) if outcome == RIGHT}
        enough = sum(i in right for i in every.ids) >= min(MIN_RIGHT, every.n_pairs / 2)
        scores.append(outcomes.select(every) if enough else every)
    return gs.top_heads(scores, options.top)


def main() -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, save=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/arena-benchmark"))
    parser.add_argument("--price", action="store_true", help="measure seconds; the machine must be idle")
    parser.add_argument("--sampling", action="store_true", help="also sample answers, five seeds")
    parser.add_argument("--choose", action="store_true", help="also choose parameters on validation images")
    options = parser.parse_args()
    model = gs.load_lvlm("tiny")
    data, validation = derivation_data(model, options.folder, 40 if options.quick else DERIVATION)
    names = default_rows(data)
    rows = make_rows(names, data)
    chosen: list[ArenaRow] = []
    console = wide_console()
    for name in names if options.choose else []:
        with progress(f"choose {name}"):
            row, tried = choose_parameters(name, data, validation)
        if row is not None and len(tried) > 1:
            chosen.append(row)
        console.print(f"{name}: {search_summary(tried)}")
    settings = ArenaOptions(
        regimes=("greedy", "sampling") if options.sampling else ("greedy",), price_questions=2 if options.price else 0
    )
    test = test_questions(20 if options.quick else options.images)
    with progress("arena"):
        arena = run_arena(model, rows, test, settings, folder=options.folder / "answers", chosen=chosen)
    console.print(as_text(arena, brief=True), soft_wrap=True)
    if options.save:
        arena.save(RESULTS / "arena_rows.json")
    finish("arena", describe_device("torch", "numpy"), figures(arena), save=options.save)


def test_questions(images: int) -> ConceptDataset:
    """Return the test questions; those that ask what every method answers correctly are a sample."""
    data = scenes.dataset(images, seed=1000)
    first = set(list(dict.fromkeys(e.group for e in data))[:NEUTRAL])
    return data.filter(lambda e: e.split not in {"neutral", "typical"} or e.kind == "caption" or e.group in first)


def figures(arena: ArenaResult) -> dict[str, Figure]:
    """Return the figures of the benchmark."""
    rows = [r for r in arena.rows if r.regime == "greedy" and r.problem is None]
    methods = [r for r in rows[1:] if not r.control and not math.isnan(errors_of(r))]
    better = [r for r in methods if not r.not_beaten]
    best = min(methods, key=errors_of)
    images = arena.provenance["images"]
    return {
        "methods": figure(len(methods), n=images),
        "better_than_every_control": figure(len(better), n=images, names=[r.name for r in better]),
        "best_method": figure(errors_of(best) / errors_of(rows[0]), n=images, name=best.name),
        "images": figure(images, ">= 1000", n=images),
    }


if __name__ == "__main__":
    main()
