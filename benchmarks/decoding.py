"""Seconds of a decoding step and of a first token: training-free methods against plain greedy decoding.

    python benchmarks/decoding.py [--quick] [--save] [--device cpu]

A LLaVA with random weights (16 layers, hidden size 512, 8,192 words, 256 image tokens, prompt of 32 words) writes 64 tokens
for one question, end tokens ignored. The baseline is the faster of transformers' `generate` and the plain loop of
`lvlm.decoding`, and is measured in alternation with each method; figures are medians of ratios.

step_two_branches_..., goal <= 1.15
    a method with a second branch against plain greedy at twice the batch, because a CPU reads the weights once a row;
step_one_forward_..., goal <= 1.15
    a method with one forward pass a token against plain greedy;
equal_batch_...
    the ratio to plain greedy at equal batch, without a goal;
first_..., goals of single methods
    seconds until the first token, against plain greedy.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.table import Table

from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, progress, wide_console
from benchmarks._medium_llava import build_network, build_processor, make_questions
from groundscope.core.errors import GroundscopeError
from lvlm import Lvlm, wrap_lvlm
from lvlm.decoding.decoder import AnswerRule
from lvlm.decoding.loop import generate
from lvlm.encoding.encode import Batch
from lvlm.generation import greedy
from mitigation.method_data import DerivationData
from mitigation.protocol import Mitigation
from mitigation.training_free.table import training_free_methods

FIRST = {
    **dict.fromkeys(("icd", "avisc"), 2.0), **dict.fromkeys(("vcd", "ritual"), 2.15),
    **dict.fromkeys(("m3id", "pai", "vdd"), 1.15), "sid": 1.8,
}  # fmt: skip
"""Goals of the ratio of the first token."""
STEP = 1.15
OPTIONS = {"icd": {"place": "after image"}, "ad_hh": {"heads": ("L3.H0", "L7.H1")}}
LEFT_OUT = ("beam", "opera", "sumgd", "self_consistency", "dsgd")
"""Methods that write more than one answer or more than one branch a token: they have no single step."""


def seconds(
    model: Lvlm, batch: Batch, tokens: int, mitigation: Mitigation | None, *, loop: bool = True
) -> tuple[float, float]:
    """Return the seconds of the first token and of each further token."""
    with nullcontext() if mitigation is None else mitigation.applied(model), model.without_end_tokens():
        times = []
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


def main() -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, save=True, device=True)
    parser.add_argument("--methods", default="", help="names, separated by commas; all by default")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    tokens, repetitions = (16, 2) if options.quick else (64, options.repetitions)
    model = wrap_lvlm(build_network().to(options.device), build_processor(), name="random LLaVA", validate=False)
    questions = make_questions(2)
    data = DerivationData(model, None, questions, ("L3.H0", "L7.H1"))
    one_row = next(model.batches(questions.examples[:1], 1))
    two_rows = next(model.batches(questions.examples, 2))
    names = [n for n, cls in training_free_methods.usable().items() if not cls.control and n not in LEFT_OUT]
    if options.methods:
        names = options.methods.split(",")
    figures: dict[str, Figure] = {}
    table = Table(
        "method", "first, x plain", "step, x plain", "step, x plain at twice the batch", "branches", title="medians"
    )
    console = wide_console()
    loop, library = [], []
    for _ in range(repetitions + 1):
        loop.append(seconds(model, one_row, tokens, None)[1])
        library.append(seconds(model, one_row, tokens, None, loop=False)[1])
    own = statistics.median(loop[1:]) <= statistics.median(library[1:])
    figures["plain_loop_to_generate"] = figure(
        statistics.median(loop[1:]) / statistics.median(library[1:]), n=repetitions
    )
    with progress("methods", len(names)) as advance:
        for name in names:
            try:
                method = training_free_methods[name].derive(data, **OPTIONS.get(name, {}))
                ratios = measure(model, method, one_row, two_rows, tokens, repetitions, loop=own)
            except GroundscopeError as error:
                console.print(f"{name}: not measured: {error}")
                advance(1)
                continue
            first, equal, twice = (statistics.median(values) for values in zip(*ratios, strict=True))
            branches = int(method.forward_cost.per_token > 1.5)
            table.add_row(name, f"{first:.2f}", f"{equal:.2f}", f"{twice:.2f}", "2" if branches else "1")
            goal = f"<= {FIRST[name]:g}" if name in FIRST else ""
            figures[f"first_{name}"] = figure(first, goal, n=repetitions)
            figures[f"equal_batch_{name}"] = figure(equal, n=repetitions)
            kind, value = ("two_branches", twice) if branches else ("one_forward", equal)
            figures[f"step_{kind}_{name}"] = figure(value, f"<= {STEP:g}", n=repetitions)
            advance(1)
    console.print(table)
    finish("decoding", describe_device("torch", "transformers", device=options.device), figures, save=options.save)


def measure(
    model: Lvlm, method: Mitigation, one_row: Batch, two_rows: Batch, tokens: int, repetitions: int, *, loop: bool
) -> list[tuple[float, float, float]]:
    """Return the ratios of first token, step, and step against twice the batch, for each repetition."""
    ratios = []
    for repetition in range(repetitions + 1):
        plain = seconds(model, one_row, tokens, None, loop=loop)
        ours = seconds(model, one_row, tokens, method)
        twice = seconds(model, two_rows, tokens, None, loop=loop)
        if repetition:
            ratios.append((ours[0] / plain[0], ours[1] / plain[1], ours[1] / twice[1]))
    return ratios


if __name__ == "__main__":
    main()
