"""What estimating instead of patching costs and what it is worth; what splitting an answer by source costs.

Cost, on the random LLaVA of middle size of benchmarks/trace.py (256 image and 32 question tokens), in turns with plain
forwards of the same prompts: attribution patching of all heads, MLPs and embeddings at all positions of a pair; of its
heads with gradients at five points between the runs; all edges of the decoder with gradients at five points (EAP-IG);
`circuits.input_attribution.split` of four questions, over plain forwards of its distinct coalitions in batches of the same
size.

Worth, on the embedded model and on models with planted circuits: how the estimates rank heads compared with exact patching, with
intervals over scenes, for each level; how near estimates of patched queries come to patching them, with and without the
query/key fix; and how faithful the best heads alone are (CPR) and how closely they match the model (CMD) by exact patching,
by the estimates, by attention to the image and by chance; and circuits of edges by EAP-IG and by chance.

    python benchmarks/attribution.py [--quick] [--save [--resume]] [--parts cost,object,attribute,relation,planted]

With ``--save`` each part is written when it is finished; ``--resume`` leaves out those that a whole run has written.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.patching import build, pair_of
from benchmarks.trace import alternate, questions
from circuits import (
    HeadScores,
    Intervention,
    Replace,
    all_heads,
    attention_to_image,
    attribution,
    compare,
    faithfulness,
    input_attribution,
    intervened,
    patch_heads,
)
from concepts import counterfactuals, scenes
from concepts.schema import CounterfactualPair
from groundscope.testing.planted_circuits import plant
from lvlm import Head, Lvlm, Site, load_lvlm

RESULTS = Path(__file__).parent / "results" / "attribution.json"
GOALS = {"attribution_patching": 5.0, "five_points": 20.0, "eap_ig": 20.0, "sources": 1.3}
KINDS = {"object": "object", "attribute": "color", "relation": "relation"}
ESTIMATES: dict[str, dict[str, Any]] = {
    "run": {},
    "source": {"point": "source"},
    "path": {"point": "path"},
    "dropped": {"drop": True},
}
"""What each estimate is called and asked for with."""
EDGE_PAIRS, QUERY_PAIRS, WATCHED, CIRCUIT_PAIRS = 24, 16, 64, 10
"""Of how many pairs edges are scored one by one and queries patched, on how many examples attention is watched, and on how many
pairs circuits of edges are run."""
PARTS = ("cost", *KINDS, "planted")


def cost(n: int) -> dict[str, dict[str, Any]]:
    """Time estimates and splits against plain forwards, in turns."""
    model, cpu = build(), torch.device("cpu")
    pair = pair_of()
    inputs = model.collate([model.encode(pair.corrupt)])
    figures: dict[str, dict[str, Any]] = {}

    def forwards(work: Callable[[], object], count: int) -> Callable[[], object]:
        return lambda: [work() for _ in range(count)]

    options: dict[str, Any] = {"min_effect": 0, "progress": False}
    methods: dict[str, Callable[[], object]] = {
        "attribution_patching": lambda: attribution.nodes(model, [pair], **options),
        "five_points": lambda: attribution.heads(model, [pair], tokens="image:all", point="path", steps=5, **options),
        "eap_ig": lambda: attribution.edges(model, [pair], steps=5, **options),
    }
    for name, method in methods.items():
        times = alternate(forwards(lambda: model.logits(inputs), 4), method, n, cpu)
        figures[name] = _figure(name, [duration / (plain / 4) for plain, duration in times], "plain forwards")

    examples_ = list(questions(4))
    neutral = [examples_[0].question.replace("cat", "dog")]

    def split() -> input_attribution.Sources:
        return input_attribution.split(model, examples_, neutral_questions=neutral, progress=False, batch_size=8)

    sources = split()
    distinct = sum(work.forwards for work in sources.examples)
    batch = model.collate([model.encode(e) for e in examples_] * 2)
    times = alternate(
        forwards(lambda: model.logits(batch), distinct // 8),
        split,
        n,
        cpu,
    )
    figures["sources"] = _figure(
        "sources", [duration / plain for plain, duration in times], f"forwards of {distinct} inputs"
    )
    return figures


def _figure(name: str, ratios: list[float], of: str) -> dict[str, Any]:
    value = round(statistics.median(ratios), 2)
    spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
    goal = GOALS[name]
    return {"value": value, "of": of, "range": spread, "goal": f"<= {goal}", "holds": value <= goal, "n": len(ratios)}


def worth(level: str, images: int) -> dict[str, dict[str, Any]]:
    """Compare estimated with exact effects, and how faithful the heads are that each ranks first."""
    model, figures = load_lvlm("tiny"), {}
    data, held_out = (scenes.dataset(n_images=images, seed=seed) for seed in (0, 1))
    pairs = counterfactuals.pairs(data, kind=KINDS[level], limit=images)
    rankings = compared(model, pairs, level, figures, most=min(images, EDGE_PAIRS))
    examples = [e for e in held_out if e.level == level and e.candidates][:images]
    attention = attention_to_image(model, examples[:WATCHED], all_heads(model)).image_mass.mean(0)
    rankings["attention"] = attention.reshape(model.n_layers, model.n_heads)
    rankings["random"] = np.random.Generator(np.random.PCG64(0)).normal(size=attention.size).reshape(model.n_layers, -1)
    for name, ranking in rankings.items():
        figure = figures.setdefault(f"{level}_{name}", {})
        signed = faithfulness.curve(model, examples, ranking, order="signed", progress=False)
        absolute = faithfulness.curve(model, examples, ranking, order="absolute", progress=False)
        figure |= {"cpr": str(signed.interval("cpr")), "cmd": str(absolute.interval("cmd"))}
    other = counterfactuals.pairs(held_out, kind=KINDS[level], limit=CIRCUIT_PAIRS)
    graph = attribution.edges(model, pairs[: min(images, EDGE_PAIRS)], progress=False)
    draw = np.random.Generator(np.random.PCG64(0)).normal(size=graph.scores.shape)
    random_graph = replace(graph, scores=np.where(graph.shape.there, draw, 0))
    for name, scored in (("edges_eap_ig", graph), ("edges_random", random_graph)):
        curve = faithfulness.edges(model, other, scored, order="absolute", progress=False)
        figures[f"{level}_{name}"] = {
            "pairs": len(other), "cpr": str(curve.interval("cpr")), "cmd": str(curve.interval("cmd"))
        }  # fmt: skip
    figures[f"{level}_queries"] = queries(model, pairs[: min(images, QUERY_PAIRS)])
    return figures


def compared(
    model: Lvlm, pairs: Sequence[CounterfactualPair], name: str, figures: dict[str, dict[str, Any]], most: int
) -> dict[str, HeadScores | np.ndarray]:
    """Rank heads exactly and by each estimate, and note how alike; of edges, pair by pair for intervals, `most` pairs."""
    exact = patch_heads(model, pairs, tokens="suffix:all", progress=False)
    rankings: dict[str, HeadScores | np.ndarray] = {"exact": exact}
    few = max(1, round(0.05 * exact.mean.size))
    for estimate, more in ESTIMATES.items():
        rankings[estimate] = attribution.heads(model, pairs, tokens="suffix:all", progress=False, **more)
    chosen = [pair for pair in pairs if pair.clean.id in set(exact.ids)][:most]
    by_pair = [attribution.edges(model, [pair], min_effect=0, progress=False).heads for pair in chosen]
    first = exact.select(np.arange(len(chosen)))
    rankings["eap_ig"] = replace(first, effects=np.stack(by_pair).astype(np.float32))
    for estimate, scores in rankings.items():
        if isinstance(scores, HeadScores) and estimate != "exact":
            reference = first if estimate == "eap_ig" else exact
            comparison = compare(reference, scores, k=(few, 5))
            figures[f"{name}_{estimate}"] = {
                "rank_correlation": str(comparison.rank_correlation),
                "overlap_at_5_percent": str(comparison.overlap[few]),
                "overlap_at_5": str(comparison.overlap[5]),
                "pairs": reference.n_pairs,
            }
    return rankings


@torch.no_grad()
def queries(model: Lvlm, pairs: Sequence[CounterfactualPair]) -> dict[str, Any]:
    """Patch each head's query at the last token, and say how near estimates with and without the fix come."""
    exact = []
    for pair in pairs:
        clean, corrupt = (model.encode(getattr(pair, side)) for side in ("clean", "corrupt"))
        rows = model.collate([corrupt] * model.n_heads)
        ids = [model.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt)]
        ends = [model.logits(model.collate([example]))[0] for example in (clean, corrupt)]
        low, high = (float(x[ids[0]] - x[ids[1]]) for x in ends[::-1])
        effects = np.empty((model.n_layers, model.n_heads))
        for layer in range(model.n_layers):
            site = Site("decoder", layer, "q")
            source, run = (
                model.read(model.collate([example]), [site])[str(site)][:, -1] for example in (clean, corrupt)
            )
            by_head = run.repeat(model.n_heads, 1).unflatten(-1, (model.n_heads, -1)).clone()
            own = torch.arange(model.n_heads)
            by_head[own, own] = source.unflatten(-1, (model.n_heads, -1))[0]
            with intervened(model, [Intervention(site, Replace(by_head.flatten(1)[:, None]), "last")]):
                logits = model.logits(rows)
            effects[layer] = ((logits[:, ids[0]] - logits[:, ids[1]]).numpy() - low) / (high - low)
        exact.append(effects)
    result: dict[str, Any] = {"pairs": len(pairs)}
    truth = np.stack(exact)
    for name, fix in (("plain", False), ("fixed", True)):
        estimate = attribution.inputs(model, pairs, "q", tokens="last", fix=fix, min_effect=0, progress=False).effects
        result[f"error_{name}"] = round(float(np.abs(estimate - truth).sum() / np.abs(truth).sum()), 3)
        result[f"correlation_{name}"] = round(float(np.corrcoef(estimate.ravel(), truth.ravel())[0, 1]), 3)
    return result


def in_planted(count: int) -> dict[str, dict[str, Any]]:
    """Look for the circuits of models in which they were put: how often each method ranks their heads first."""
    figures: dict[str, dict[str, Any]] = {}
    for circuit in ("direct", "two_step"):
        hits: dict[str, list[float]] = {}
        for seed in range(count):
            planted = plant(seed, circuit)
            pairs = planted.pairs(3)
            truth = [head for head in (planted.grounding, planted.mover, planted.reader) if head is not None]
            graph = attribution.edges(planted.model, pairs, progress=False)
            rankings = {
                "exact": patch_heads(planted.model, pairs, tokens="suffix:all", progress=False).mean,
                "eap_ig": graph.heads,
            }
            for name, more in ESTIMATES.items():
                rankings[name] = attribution.heads(
                    planted.model, pairs, tokens="suffix:all", progress=False, **more
                ).mean
            for name, scores in rankings.items():
                best = faithfulness.ranked(planted.model, scores)[: len(truth)]
                hits.setdefault(name, []).append(len(set(best) & set(truth)) / len(truth))
            edges = {e.name for e in graph.greedy(len(truth) + 1).edges}
            hits.setdefault("edges_of_the_circuit", []).append(len(edges & circuit_edges(truth)) / (len(truth) + 1))
        figures[f"planted_{circuit}"] = {name: round(statistics.mean(x), 3) for name, x in hits.items()} | {"n": count}
    return figures


def circuit_edges(heads: Sequence[Head]) -> set[str]:
    """Name the edges of a chain of heads that each read, by their values, what the one before wrote."""
    names = [f"L{head.layer}.H{head.head}" for head in heads]
    return {f"{a} -> {b}.v" for a, b in zip(("input", *names), names, strict=False)} | {f"{names[-1]} -> logits"}


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions and images, about a minute")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results, part by part")
    parser.add_argument("--resume", action="store_true", help="leave out parts that a whole run has written")
    parser.add_argument("--parts", default=",".join(PARTS), help="of these; saved figures of the others stay")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    console = Console()
    console.print("Compares attribution patching and source attribution with plain forwards, and with exact patching.")
    outcome = json.loads(RESULTS.read_text()) if options.save and RESULTS.is_file() else {}
    done = outcome.get("parts", {})
    for part in parts:
        if options.resume and done.get(part, {}).get("quick") is False:
            continue
        started = time.perf_counter()
        figures = measured(part, quick=options.quick)
        show(console, part, figures)
        about = {
            "quick": options.quick,
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - started),
        }
        outcome = {
            "benchmark": "attribution",
            "device": f"{platform.machine()}, torch {torch.__version__}",
            "parts": {**outcome.get("parts", {}), part: about},
            "figures": {**outcome.get("figures", {}), **figures},
        }
        if options.save:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


def measured(part: str, *, quick: bool) -> dict[str, dict[str, Any]]:
    """Return the figures of one part."""
    if part == "cost":
        return cost(1 if quick else 9)
    if part == "planted":
        return in_planted(2 if quick else 25)
    return worth(part, 10 if quick else 80)


def show(console: Console, part: str, figures: dict[str, dict[str, Any]]) -> None:
    """Print the tables of one part."""
    if part == "cost":
        table = Table("figure", "times", "of", "range", "goal", "holds", "n")
        for name, f in figures.items():
            table.add_row(name, *(str(f[k]) for k in ("value", "of", "range", "goal", "holds", "n")))
        console.print(table)
        return
    if part == "planted":
        table = Table("planted circuits: share of their heads found first", *next(iter(figures.values())))
        for name, f in figures.items():
            table.add_row(name, *(str(value) for value in f.values()))
        console.print(table)
        return
    table = Table(
        "embedded model, level and ranking", "rank correlation with exact", "of the best 5 %", "best 5", "CPR", "CMD"
    )
    query_table = Table(
        "patched queries", "pairs", "error, plain", "error, fixed", "correlation, plain", "correlation, fixed"
    )
    for name, f in figures.items():
        if name.endswith("queries"):
            columns = ("pairs", "error_plain", "error_fixed", "correlation_plain", "correlation_fixed")
            query_table.add_row(name, *(str(f[k]) for k in columns))
        else:
            columns = ("rank_correlation", "overlap_at_5_percent", "overlap_at_5", "cpr", "cmd")
            table.add_row(name, *(str(f.get(k, "")) for k in columns))
    console.print(table)
    console.print(query_table)


if __name__ == "__main__":
    main()
