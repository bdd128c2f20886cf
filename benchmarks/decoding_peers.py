"""Seconds of an answer next to those of mitigv, which has some of the same methods.

    python benchmarks/decoding_peers.py --peer FOLDER [--quick] [--save]

FOLDER is where ``pip install --no-deps --target FOLDER mitigv==0.1.7`` put it. Both run the same LLaVA with random weights (16
layers, hidden size 512, 8,192 words, 256 image tokens), one question, 64 tokens, end tokens ignored, in alternation; figures are
medians of the ratio of its seconds to ours, so more than 1 means that ours is faster. PAI is compared with its causal mode (eager
attention); under sdpa, its default, it is not causal. The two ICD sentences differ in length by a few words.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, print_figures
from benchmarks._medium_llava import build_network, build_processor, make_questions
from lvlm import Lvlm, wrap_lvlm
from lvlm.access.eager_attention import attention
from mitigation.method_data import DerivationData
from mitigation.training_free.table import training_free_methods

GOALS = {"vcd": 1.3, "icd": 1.3, "m3id": 1.3, "only": 1.6, "opera": 2.0, "pai": None}
OPTIONS = {"icd": {"place": "after image"}}


def peer_answers(module: Any, model: Lvlm, name: str, image: Any, prompt: str, tokens: int) -> Callable[[], object]:
    """Return a function that writes one answer with the peer's method."""
    tokenizer = model.processor.tokenizer
    mitigator = module.load_mitigator(
        name, model=model.hf, processor=model.processor, model_type="llava", max_new_tokens=tokens
    )

    def write() -> None:
        before, tokenizer.eos_token = tokenizer.eos_token, None
        try:
            if name == "pai":
                with attention(model, "eager"):
                    mitigator(image, prompt)
            else:
                mitigator(image, prompt)
        finally:
            tokenizer.eos_token = before

    return write


def main() -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, save=True)
    parser.add_argument("--peer", required=True, help="folder in which mitigv is installed")
    options = parser.parse_args()
    sys.path.append(options.peer)
    module = import_module("mitigv")
    tokens, repetitions = (16, 2) if options.quick else (64, 5)
    model = wrap_lvlm(build_network(), build_processor(), name="random LLaVA", validate=False)
    questions = make_questions(1)
    data = DerivationData(model, None, questions)
    batch = next(model.batches(questions.examples, 1))
    image, prompt = questions[0].image.load(), model.prompt(questions[0].request)
    figures: dict[str, Figure] = {}
    for name, goal in GOALS.items():
        try:
            theirs = peer_answers(module, model, name, image, prompt, tokens)
            method = training_free_methods[name].derive(data, **OPTIONS.get(name, {}))
            ratios = []
            for repetition in range(repetitions + 1):
                start = time.perf_counter()
                theirs()
                middle = time.perf_counter()
                with method.applied(model), model.without_end_tokens():
                    model.generate_batch(batch, tokens)
                end = time.perf_counter()
                if repetition:
                    ratios.append((middle - start) / (end - middle))
        except Exception as error:  # noqa: BLE001 - one method of the peer that fails leaves the others
            print(f"{name}: not measured: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        figures[name] = figure(statistics.median(ratios), f">= {goal:g}" if goal else "", n=repetitions)
    print_figures(figures, "seconds of mitigv 0.1.7 / ours")
    finish("decoding_peers", describe_device("torch", "transformers"), figures, save=options.save)


if __name__ == "__main__":
    main()
