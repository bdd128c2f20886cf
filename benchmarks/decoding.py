"""Seconds of a decoding step and of a first token: training-free methods against plain greedy decoding.

    python benchmarks/decoding.py [--methods vcd,spin] [--repetitions 3] [--folder FOLDER] [--quick] [--save] [--device cpu]

A LLaVA with random weights (16 layers, hidden size 512, 4,096 words, so that the unembedding has 4 % of the decoder's weights;
256 image tokens, prompt of 32 words) writes 64 tokens for one question, end tokens ignored. The baseline is the faster of
transformers' `generate` and the plain loop of `lvlm.decoding`, and is measured in alternation with each method; figures are
medians of ratios. Methods that write a description or keywords first write 16 tokens of it.

first_..., goals of single methods
    seconds until the first token, against plain greedy;
step_two_branches_..., goal <= 1.15
    a step of a method with a second branch against plain greedy at twice the batch, because a CPU reads the weights once a row;
step_one_forward_..., goal <= 1.15
    a step of a method with one forward pass a token against plain greedy; <= 1.05 for VISTA's logits of earlier layers alone;
equal_batch_...
    the ratio of a step to plain greedy at equal batch, without a goal for methods with several rows;
rows_...
    rows of the decoder for a prompt and for a token, counted.

The result of each method is written to the folder when it is measured, and read from there by a later run with the same options.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.table import Table

from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, progress, wide_console
from benchmarks._medium_llava import build_network, build_processor, make_questions
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.files import write_text
from lvlm import Lvlm, wrap_lvlm
from lvlm.active_interventions import mark_observer
from lvlm.decoding.decoder import AnswerRule
from lvlm.decoding.loop import generate
from lvlm.encoding.encode import Batch
from lvlm.generation import greedy
from mitigation.method_data import DerivationData
from mitigation.protocol import Mitigation
from mitigation.training_free.registry import training_free_methods

FIRST = {
    **dict.fromkeys(("icd", "avisc"), 2.0), **dict.fromkeys(("vcd", "ritual"), 2.15),
    **dict.fromkeys(("m3id", "pai", "vdd"), 1.15), "sid": 1.8,
}  # fmt: skip
"""Goals of the ratio of the first token."""
STEP = 1.15
STEPS = {"vista_logits": 1.05}
"""Goals of the ratio of a step that differ from `STEP`."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "icd": {"place": "after image"},
    "ad_hh": {"heads": ("L3.H0", "L7.H1")},
    "code": {"max_new_tokens": 16},
    "vdgd": {"max_new_tokens": 16},
    "counterfactual_keywords": {"max_new_tokens": 16},
    "steering": {"derivation": "amplify"},
    "vista_logits": {"strength": 0},
}
"""Parameters that differ from the defaults."""
VARIANTS = {"vista_logits": "vista"}
"""Rows that are another form of a method."""
LEFT_OUT = {
    "augment": "its texts enter as a table, and then it decodes as plain greedy",
    "dsgd": "writes and judges sentences, not tokens (benchmarks/self_judgment.py)",
    "fgsd": "judges a finished answer",
    "self_consistency": "compares several finished answers",
    "sumgd": "goes back and writes words again, so it has no single step",
    "vdd_calibration": "changes the first token only, as vdd does",
}
"""Methods without a decoding step of their own, and why."""
Result = dict[str, Any]


def main() -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, save=True, device=True)
    parser.add_argument("--methods", default="", help="names, separated by commas; all by default")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each method; default 3")
    parser.add_argument("--tokens", type=int, default=64, help="length of an answer; default 64")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_decoding"), help="results of each method")
    options = parser.parse_args()
    tokens, repetitions = (16, 2) if options.quick else (options.tokens, options.repetitions)
    console = wide_console()
    names = options.methods.split(",") if options.methods else all_methods()
    unknown = [name for name in names if VARIANTS.get(name, name) not in training_free_methods]
    if unknown:
        msg = f"unknown method '{unknown[0]}'; choose from {', '.join(all_methods())}"
        raise ConfigError(msg)
    device = describe_device("torch", "transformers", device=options.device)
    key = {"device": device, "tokens": tokens, "repetitions": repetitions}
    results: dict[str, Result] = {}

    @cache
    def model() -> Lvlm:
        network = build_network(words=4096).to(options.device)
        return wrap_lvlm(network, build_processor(), name="random LLaVA", validate=False)

    def measured(name: str, work: Callable[[], Result]) -> Result:
        path = options.folder / f"{name}.json"
        result = stored(path, key)
        if result is None:
            result = work()
            options.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({**key, **result}) + "\n")
        return result

    with progress("methods", len(names)) as advance:
        baseline = measured("_baseline", lambda: measure_baseline(model(), tokens, repetitions))
        loop = statistics.median(baseline["ratios"]) <= 1
        for name in names:
            results[name] = measured(name, lambda name=name: measure(model(), name, tokens, repetitions, loop=loop))
            advance(1)
    figures, table = summary(results, repetitions)
    figures = {"plain_loop_to_generate": figure(statistics.median(baseline["ratios"]), n=repetitions), **figures}
    console.print(table)
    for name, reason in {**({} if options.methods else LEFT_OUT), **problems(results)}.items():
        console.print(f"{name}: not measured: {reason}")
    goals = [entry for entry in figures.values() if entry["goal"]]
    console.print(f"{sum(entry['holds'] for entry in goals)} of {len(goals)} goals are met")
    finish("decoding", device, figures, save=options.save, tokens=tokens)


def all_methods() -> list[str]:
    """Return the names of all rows."""
    methods = [n for n, cls in training_free_methods.usable().items() if not cls.control and n not in LEFT_OUT]
    return [*methods, *VARIANTS]


def stored(path: Path, key: Mapping[str, Any]) -> Result | None:
    """Return a result of an earlier run with the same options, or None."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if all(result.get(name) == value for name, value in key.items()) else None


# -- measuring -------------------------------------------------------------------------------------------------------------


def measure_baseline(model: Lvlm, tokens: int, repetitions: int) -> Result:
    """Return the ratio of a step of the plain loop to one of transformers' `generate`, at each repetition."""
    one_row = next(model.batches(make_questions(1).examples, 1))
    ratios = []
    for _ in range(repetitions + 1):
        loop, library = (seconds(model, one_row, tokens, None, loop=which)[1] for which in (True, False))
        ratios.append(loop / library)
    return {"ratios": ratios[1:]}  # the first is a warm-up


def measure(model: Lvlm, name: str, tokens: int, repetitions: int, *, loop: bool) -> Result:
    """Return the ratios of a method at each repetition, or the problem that prevents them."""
    questions = make_questions(8)
    one_row = next(model.batches(questions.examples[:1], 1))
    two_rows = next(model.batches(questions.examples[:2], 2))
    try:
        data = DerivationData(model, None, questions, ("L3.H0", "L7.H1"))
        method = training_free_methods[VARIANTS.get(name, name)].derive(data, **OPTIONS.get(name, {}))
        prompts, rows = count_rows(model, method, one_row)
    except GroundscopeError as error:
        return {"problem": str(error)}
    ratios: dict[str, list[float]] = {"first": [], "step": [], "twice": []}
    seconds(model, one_row, min(tokens, 3), None)
    for _ in range(repetitions):
        plain = seconds(model, one_row, tokens, None, loop=loop)
        ours = seconds(model, one_row, tokens, method)
        ratios["first"].append(ours[0] / plain[0])
        ratios["step"].append(ours[1] / plain[1])
        if 1.5 < rows < 2.5:
            ratios["twice"].append(ours[1] / seconds(model, two_rows, tokens, None, loop=loop)[1])
    return {"rows": rows, "prompts": prompts, **ratios}


def seconds(
    model: Lvlm, batch: Batch, tokens: int, mitigation: Mitigation | None, *, loop: bool = True
) -> tuple[float, float]:
    """Return the seconds of the first token and of each further token."""
    times = []
    with nullcontext() if mitigation is None else mitigation.applied(model), model.without_end_tokens():
        for count in (1, tokens):
            start = time.perf_counter()
            if mitigation is not None:
                model.generate_batch(batch, count)
            elif loop:
                generate(model, batch, AnswerRule(), count)
            else:
                greedy(model, batch.inputs, count, images=batch.images)
            times.append(time.perf_counter() - start)
    return times[0], (times[1] - times[0]) / (tokens - 1)


def count_rows(model: Lvlm, method: Mitigation, batch: Batch) -> tuple[float, float]:
    """Return the rows of the decoder until the first token, and for each further token; also a warm-up."""
    counts = []
    with method.applied(model), model.without_end_tokens(), counted_rows(model) as rows:
        for tokens in (1, 3):
            rows.clear()
            model.generate_batch(batch, tokens)
            counts.append(sum(rows))
    return counts[0], (counts[1] - counts[0]) / 2


@contextmanager
def counted_rows(model: Lvlm) -> Iterator[list[int]]:
    """Record the number of rows of each forward pass of a model while the context is open."""
    rows: list[int] = []

    @mark_observer
    def count(_module: Any, _args: Any, inputs: Mapping[str, Any]) -> None:
        rows.append(len(inputs["input_ids"]))

    handle = model.hf.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


# -- reporting -------------------------------------------------------------------------------------------------------------


def problems(results: Mapping[str, Result]) -> dict[str, str]:
    """Return why methods could not be measured."""
    return {name: result["problem"] for name, result in results.items() if "problem" in result}


def summary(results: Mapping[str, Result], repetitions: int) -> tuple[dict[str, Figure], Table]:
    """Return the figures and one table of all methods."""
    columns = (
        "method",
        "step, x plain",
        "step, x plain at twice the batch",
        "first token, x plain",
        "rows a prompt, a token",
    )
    table = Table(*columns, "goals", title="medians")
    figures: dict[str, Figure] = {}
    for name, result in sorted(results.items()):
        if "problem" in result:
            continue
        first, step, twice = (statistics.median(result[which] or [0.0]) for which in ("first", "step", "twice"))
        goal = f"<= {FIRST[name]:g}" if name in FIRST else ""
        mine = {f"first_{name}": figure(first, goal, n=repetitions), f"equal_batch_{name}": figure(step, n=repetitions)}
        bound = f"<= {STEPS.get(name, STEP):g}"
        if result["twice"]:
            mine[f"step_two_branches_{name}"] = figure(twice, bound, n=repetitions)
        elif result["rows"] < 1.5:
            mine[f"step_one_forward_{name}"] = figure(step, bound, n=repetitions)
        mine[f"rows_{name}"] = figure(result["rows"], n=1, prompts=result["prompts"])
        verdicts = [
            f"{key.rsplit('_' + name, 1)[0]} {entry['goal']}: {'met' if entry['holds'] else 'missed'}"
            for key, entry in mine.items()
            if entry["goal"]
        ]
        rows = f"{result['prompts']:g}, {result['rows']:g}"
        middle = f"{twice:.2f}" if result["twice"] else ""
        table.add_row(name, f"{step:.2f}", middle, f"{first:.2f}", rows, "; ".join(verdicts))
        figures |= mine
    return figures, table


if __name__ == "__main__":
    main()
