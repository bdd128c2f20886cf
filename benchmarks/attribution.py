"""Cost and accuracy of attribution patching and of attribution to input sources.

    python benchmarks/attribution.py [--quick] [--save [--resume]] [--parts cost,object,attribute,relation,planted]

``cost``: on the random LLaVA of benchmarks/patching.py (256 image and 32 question tokens), divided by the time of a plain
forward pass of the same prompt, in alternating order:

attribution_patching
    attribution patching of all heads, MLPs and embeddings at all positions of a pair;
five_points
    attribution patching of the pair's heads with gradients at five points between the runs;
eap_ig
    edge attribution of all edges of the decoder with gradients at five points (EAP-IG);
sources
    `circuits.input_attribution.split` of four questions, divided by the plain forward passes of its distinct inputs in
    batches of the same size.

``object``, ``attribute``, ``relation``: on the embedded model, with intervals over scenes,

LEVEL_ESTIMATE
    agreement of estimated and exact effects (rank correlation of heads, overlap of the best heads), and how faithful circuits
    of the best heads are on other scenes (CPR: area under the faithfulness curve; CMD: area between the curve and 1), by
    exact patching (``exact``), the estimates, attention to the image (``attention``) and random scores (``random``);
LEVEL_edges_eap_ig, LEVEL_edges_random
    CPR and CMD of circuits of edges;
LEVEL_queries
    relative error and correlation of the estimated effects of queries, without (``plain``) and with (``fixed``) the
    correction of attention scores.

``planted``: the share of the heads of a planted circuit that each method ranks first.

With ``--save`` each part is written when it is done; ``--resume`` skips parts that a full run has written.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.table import Table

from benchmarks._harness import (
    RESULTS,
    Figure,
    alternate,
    describe_device,
    figure,
    option_parser,
    print_figures,
    progress,
    save_record,
    time_call,
    wide_console,
)
from benchmarks._medium_llava import make_questions
from benchmarks.patching import build_lvlm, make_pair
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
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.testing.planted_circuits import plant
from lvlm import Head, Lvlm, Site, load_lvlm

GOALS = {"attribution_patching": "<= 5.0", "five_points": "<= 20.0", "eap_ig": "<= 20.0", "sources": "<= 1.3"}
KINDS = {"object": "object", "attribute": "color", "relation": "relation"}
"""Level to the kind of pair."""
ESTIMATES: dict[str, dict[str, Any]] = {
    "run": {},
    "source": {"point": "source"},
    "path": {"point": "path"},
    "dropped": {"drop": True},
}
"""Name of each estimate to the options of `attribution.heads`."""
EDGE_PAIRS = 24
"""Pairs for which edges are scored."""
QUERY_PAIRS = 16
"""Pairs for which queries are patched."""
ATTENTION_EXAMPLES = 64
"""Examples over which attention to the image is averaged."""
CIRCUIT_PAIRS = 10
"""Pairs on which circuits of edges are evaluated."""
PARTS = ("cost", *KINDS, "planted")


# -- cost ------------------------------------------------------------------------------------------------------------------


def measure_cost(n: int) -> dict[str, Figure]:
    """Time estimates and splits against plain forward passes."""
    model, pair = build_lvlm(), make_pair()
    inputs = model.collate([model.encode(pair.corrupt)])
    figures: dict[str, Figure] = {}

    def repeat(work: Callable[[], object], count: int) -> Callable[[], object]:
        return lambda: [work() for _ in range(count)]

    def add(name: str, ratios: list[float], of: str) -> None:
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        figures[name] = figure(statistics.median(ratios), GOALS[name], len(ratios), of=of, range=spread)

    options: dict[str, Any] = {"min_effect": 0, "progress": False}
    methods: dict[str, Callable[[], object]] = {
        "attribution_patching": lambda: attribution.nodes(model, [pair], **options),
        "five_points": lambda: attribution.heads(model, [pair], tokens="image:all", point="path", steps=5, **options),
        "eap_ig": lambda: attribution.edges(model, [pair], steps=5, **options),
    }
    for name, method in methods.items():
        with progress(f"cost of {name}"):
            times = alternate(repeat(lambda: model.logits(inputs), 4), method, n)
        add(name, [candidate / (plain / 4) for plain, candidate in times], "plain forwards")

    questions = list(make_questions(4))
    matched = {q.id: [q.question.replace("cat", "dog")] for q in questions}

    def split() -> input_attribution.Sources:
        return input_attribution.split(model, questions, matched_texts=matched, progress=False, batch_size=8)

    with progress("cost of sources"):
        distinct = sum(shares.forwards for shares in split().examples)
        batch = model.collate([model.encode(e) for e in questions] * 2)
        times = alternate(repeat(lambda: model.logits(batch), distinct // 8), split, n)
    add("sources", [candidate / plain for plain, candidate in times], f"forwards of {distinct} inputs")
    return figures


# -- accuracy on the embedded model ----------------------------------------------------------------------------------------


def measure_accuracy(level: str, images: int) -> dict[str, Figure]:
    """Compare estimated with exact effects, and the faithfulness of the heads and edges that each ranks first."""
    model = load_lvlm("tiny")
    data, other_data = (scenes.dataset(n_images=images, seed=seed) for seed in (0, 1))
    pairs = counterfactuals.pairs(data, kind=KINDS[level], limit=images)
    rankings, agreement = rank_heads(model, pairs, max_edge_pairs=min(images, EDGE_PAIRS))
    figures = {f"{level}_{name}": entry for name, entry in agreement.items()}
    examples = [e for e in other_data if e.level == level and e.candidates][:images]
    attention = attention_to_image(model, examples[:ATTENTION_EXAMPLES], all_heads(model)).image_mass.mean(0)
    rankings["attention"] = attention.reshape(model.n_layers, model.n_heads)
    rankings["random"] = np.random.Generator(np.random.PCG64(0)).normal(size=attention.size).reshape(model.n_layers, -1)
    for name, ranking in rankings.items():
        signed = faithfulness.curve(model, examples, ranking, order="signed", progress=False)
        absolute = faithfulness.curve(model, examples, ranking, order="absolute", progress=False)
        entry = figures.setdefault(f"{level}_{name}", {})
        entry |= {"cpr": str(signed.interval("cpr")), "cmd": str(absolute.interval("cmd"))}
    other_pairs = counterfactuals.pairs(other_data, kind=KINDS[level], limit=CIRCUIT_PAIRS)
    graph = attribution.edges(model, pairs[: min(images, EDGE_PAIRS)], progress=False)
    random_scores = np.random.Generator(np.random.PCG64(0)).normal(size=graph.scores.shape)
    random_graph = replace(graph, scores=np.where(graph.shape.there, random_scores, 0))
    for name, scored in (("edges_eap_ig", graph), ("edges_random", random_graph)):
        curve = faithfulness.edges(model, other_pairs, scored, order="absolute", progress=False)
        figures[f"{level}_{name}"] = {
            "pairs": len(other_pairs), "cpr": str(curve.interval("cpr")), "cmd": str(curve.interval("cmd"))
        }  # fmt: skip
    figures[f"{level}_queries"] = measure_queries(model, pairs[: min(images, QUERY_PAIRS)])
    return figures


def rank_heads(
    model: Lvlm, pairs: Sequence[CounterfactualPair], *, max_edge_pairs: int
) -> tuple[dict[str, HeadScores | np.ndarray], dict[str, Figure]]:
    """Score heads exactly and by each estimate.

    Returns
    -------
    rankings
        Name of the method to scores of heads.
    agreement
        Name of the estimate to its agreement with exact patching. Edges are scored pair by pair, for intervals, and for at most
        `max_edge_pairs` pairs.
    """
    exact = patch_heads(model, pairs, tokens="suffix:all", progress=False)
    rankings: dict[str, HeadScores | np.ndarray] = {"exact": exact}
    five_percent = max(1, round(0.05 * exact.mean.size))
    for estimate, more in ESTIMATES.items():
        rankings[estimate] = attribution.heads(model, pairs, tokens="suffix:all", progress=False, **more)
    edge_pairs = [pair for pair in pairs if pair.clean.id in set(exact.ids)][:max_edge_pairs]
    by_pair = [attribution.edges(model, [pair], min_effect=0, progress=False).heads for pair in edge_pairs]
    exact_of_edge_pairs = exact.select(np.arange(len(edge_pairs)))
    rankings["eap_ig"] = replace(exact_of_edge_pairs, effects=np.stack(by_pair).astype(np.float32))
    agreement: dict[str, Figure] = {}
    for estimate, scores in rankings.items():
        if isinstance(scores, HeadScores) and estimate != "exact":
            reference = exact_of_edge_pairs if estimate == "eap_ig" else exact
            comparison = compare(reference, scores, k=(five_percent, 5))
            agreement[estimate] = {
                "rank_correlation": str(comparison.rank_correlation),
                "overlap_at_5_percent": str(comparison.overlap[five_percent]),
                "overlap_at_5": str(comparison.overlap[5]),
                "pairs": reference.n_pairs,
            }
    return rankings, agreement


@torch.no_grad()
def measure_queries(model: Lvlm, pairs: Sequence[CounterfactualPair]) -> Figure:
    """Patch each head's query at the last token, and return the errors of estimates without and with the correction."""
    effects_by_pair = []
    for pair in pairs:
        clean, corrupt = (model.encode(getattr(pair, side)) for side in ("clean", "corrupt"))
        rows = model.collate([corrupt] * model.n_heads)
        ids = [model.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt)]
        run_logits = [model.logits(model.collate([encoding]))[0] for encoding in (clean, corrupt)]
        corrupt_margin, clean_margin = (float(x[ids[0]] - x[ids[1]]) for x in run_logits[::-1])
        effects = np.empty((model.n_layers, model.n_heads))
        for layer in range(model.n_layers):
            site = Site("decoder", layer, "q")
            clean_query, corrupt_query = (
                model.read(model.collate([encoding]), [site])[str(site)][:, -1] for encoding in (clean, corrupt)
            )
            # Row h: the corrupt run's queries, with the query of head h from the clean run.
            by_head = corrupt_query.repeat(model.n_heads, 1).unflatten(-1, (model.n_heads, -1)).clone()
            heads = torch.arange(model.n_heads)
            by_head[heads, heads] = clean_query.unflatten(-1, (model.n_heads, -1))[0]
            with intervened(model, [Intervention(site, Replace(by_head.flatten(1)[:, None]), "last")]):
                logits = model.logits(rows)
            margins = (logits[:, ids[0]] - logits[:, ids[1]]).numpy()
            effects[layer] = (margins - corrupt_margin) / (clean_margin - corrupt_margin)
        effects_by_pair.append(effects)
    entry: Figure = {"pairs": len(pairs)}
    exact = np.stack(effects_by_pair)
    for name, fix in (("plain", False), ("fixed", True)):
        estimate = attribution.inputs(model, pairs, "q", tokens="last", fix=fix, min_effect=0, progress=False).effects
        entry[f"error_{name}"] = round(float(np.abs(estimate - exact).sum() / np.abs(exact).sum()), 3)
        entry[f"correlation_{name}"] = round(float(np.corrcoef(estimate.ravel(), exact.ravel())[0, 1]), 3)
    return entry


# -- planted circuits ------------------------------------------------------------------------------------------------------


def measure_planted(count: int) -> dict[str, Figure]:
    """Return the mean share of the heads, and of the edges, of planted circuits that each method ranks first."""
    figures: dict[str, Figure] = {}
    for circuit in ("direct", "two_step"):
        shares: dict[str, list[float]] = {}
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
                shares.setdefault(name, []).append(len(set(best) & set(truth)) / len(truth))
            edges = {e.name for e in graph.greedy(len(truth) + 1).edges}
            share = len(edges & name_chain_edges(truth)) / (len(truth) + 1)
            shares.setdefault("edges_of_the_circuit", []).append(share)
        figures[f"planted_{circuit}"] = {name: round(statistics.mean(x), 3) for name, x in shares.items()} | {
            "n": count
        }
    return figures


def name_chain_edges(heads: Sequence[Head]) -> set[str]:
    """Return the names of the edges of a chain of heads, each of which reads the previous one's output with its values."""
    names = [f"L{head.layer}.H{head.head}" for head in heads]
    return {f"{a} -> {b}.v" for a, b in zip(("input", *names), names, strict=False)} | {f"{names[-1]} -> logits"}


# -- main ------------------------------------------------------------------------------------------------------------------


def measure_part(part: str, *, quick: bool) -> dict[str, Figure]:
    """Return the figures of one part."""
    if part == "cost":
        return measure_cost(1 if quick else 9)
    with progress(f"accuracy: {part}"):
        return measure_planted(2 if quick else 25) if part == "planted" else measure_accuracy(part, 10 if quick else 80)


def print_part(part: str, figures: dict[str, Figure]) -> None:
    """Print the tables of one part."""
    console = wide_console()
    if part == "cost":
        print_figures(figures, "time, divided by that of plain forward passes")
        return
    if part == "planted":
        table = Table(
            "circuit", *next(iter(figures.values())), title="share of the planted heads that are ranked first"
        )
        for name, entry in figures.items():
            table.add_row(name, *(str(value) for value in entry.values()))
        console.print(table)
        return
    columns = {
        "rank_correlation": "rank correlation with exact", "overlap_at_5_percent": "overlap of best 5 %",
        "overlap_at_5": "overlap of best 5", "cpr": "CPR", "cmd": "CMD",
    }  # fmt: skip
    query_columns = {
        "pairs": "pairs", "error_plain": "error, plain", "error_fixed": "error, corrected",
        "correlation_plain": "correlation, plain", "correlation_fixed": "correlation, corrected",
    }  # fmt: skip
    table = Table("scores of heads", *columns.values(), title="embedded model")
    query_table = Table("effects of queries", *query_columns.values())
    for name, entry in figures.items():
        if name.endswith("queries"):
            query_table.add_row(name, *(str(entry[key]) for key in query_columns))
        else:
            table.add_row(name, *(str(entry.get(key, "")) for key in columns))
    console.print(table)
    console.print(query_table)


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="few repetitions and images, about a minute", save=True)
    parser.add_argument("--resume", action="store_true", help="with --save: skip parts that a full run has written")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, separated by commas (default: all)")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    wide_console().print("Compares attribution with plain forward passes (cost) and with exact patching (accuracy).")
    path = RESULTS / "attribution.json"
    record: dict[str, Any] = json.loads(path.read_text()) if options.save and path.is_file() else {}
    finished = record.get("parts", {})
    for part in parts:
        if options.resume and finished.get(part, {}).get("quick") is False:
            continue
        figures: dict[str, Figure] = {}
        seconds = time_call(lambda part=part, figures=figures: figures.update(measure_part(part, quick=options.quick)))
        print_part(part, figures)
        details = {"quick": options.quick, "threads": torch.get_num_threads(), "seconds": round(seconds)}
        record = {
            "benchmark": "attribution",
            "device": describe_device("torch"),
            "parts": {**record.get("parts", {}), part: details},
            "figures": {**record.get("figures", {}), **figures},
        }
        if options.save:
            save_record(record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
