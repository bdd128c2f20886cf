"""Seconds of an answer next to those of mitigv, which has some of the same methods, and differences of its results.

    python benchmarks/decoding_peers.py --peer FOLDER [--methods vcd,pai] [--tokens 64] [--repetitions 3] [--quick] [--save]

FOLDER is where ``pip install --no-deps --target FOLDER mitigv==0.1.7`` put it; it needs nothing else than torch and transformers.
Both run the same LLaVA with random weights (16 layers, hidden size 512, 8,192 words, 256 image tokens), one question, 64 tokens,
end tokens ignored, in alternation.

NAME
    Median of the ratio of its seconds to ours, so more than 1 means that ours is faster. PAI is compared with its causal mode
    (eager attention). The two ICD sentences differ in length by a few words.
difference_NAME
    Largest difference of its log-probabilities in four steps from ours in float64, for its tokens, at tokens that both allow; for
    the methods that draw nothing and whose prompts are equal. ``pai_sdpa`` is its default, under which its patched layers receive
    no mask, so that prompts attend to later tokens.

mitigv 0.1.7 looks for the decoder's layers in ``model.language_model`` and in ``model.model.language_model``. Its adapter has the
own attribute ``model``, and the LLaVA of transformers 5 only the second path, so PAI, ONLY and OPERA end with an error;
this script sets the first attribute on the adapter.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, print_figures, progress
from benchmarks._medium_llava import build_network, build_processor, make_questions
from concepts import ConceptDataset
from concepts.schema import Example
from lvlm import Lvlm, wrap_lvlm
from lvlm.access.eager_attention import attention
from lvlm.decoding.loop import DecodingRun, prompts_of
from lvlm.encoding.encode import Batch
from mitigation.method_data import DerivationData
from mitigation.protocol import Mitigation
from mitigation.training_free.registry import training_free_methods

GOALS = {"vcd": 1.3, "icd": 1.3, "m3id": 1.3, "only": 1.6, "opera": 2.0, "pai": None}
OPTIONS = {"icd": {"place": "after image"}}
COMPARED = {"m3id": "m3id", "pai": "pai", "pai_sdpa": "pai", "only": "only"}
"""Methods whose results are compared, and the name of the peer's method."""
STEPS = 4
"""Steps whose results are compared."""


def main() -> None:
    """Run the benchmark."""
    parser = option_parser(__doc__, save=True)
    parser.add_argument("--peer", required=True, help="folder in which mitigv is installed")
    parser.add_argument("--methods", default=",".join(GOALS), help="names, separated by commas; all by default")
    parser.add_argument("--tokens", type=int, default=64, help="length of an answer; default 64")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each method; default 3")
    options = parser.parse_args()
    sys.path.append(options.peer)
    module = import_module("mitigv")
    tokens, repetitions = (8, 1) if options.quick else (options.tokens, options.repetitions)
    names = options.methods.split(",")
    model = wrap_lvlm(build_network(), build_processor(), name="random LLaVA", validate=False)
    exact = wrap_lvlm(deepcopy(model.hf).double(), model.processor, name="random LLaVA in float64", validate=False)
    example = make_questions(1)[0]
    figures: dict[str, Figure] = {}

    def attempt(name: str, work: Callable[[], Figure]) -> None:
        try:
            figures[name] = work()
        except Exception as error:  # noqa: BLE001 - one method of the peer that fails leaves the others
            print(f"{name}: not measured: {type(error).__name__}: {error}", file=sys.stderr)

    with progress("methods", len(names)) as advance:
        for name in names:
            attempt(name, lambda name=name: ratio(module, model, name, example, tokens, repetitions))
            advance(1)
        for name, method in COMPARED.items():
            if method in names:
                attempt(f"difference_{name}", lambda name=name: difference(module, model, exact, name, example))
    print_figures(figures, "seconds of mitigv 0.1.7 / ours, and differences of log-probabilities")
    finish("decoding_peers", describe_device("torch", "transformers"), figures, save=options.save, tokens=tokens)


def ratio(module: Any, model: Lvlm, name: str, example: Example, tokens: int, repetitions: int) -> Figure:
    """Return the median ratio of the seconds of both."""
    mitigator = peer_of(module, model, name, tokens)
    method, batch = ours_of(model, name, example)
    ratios = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        answer(mitigator, model, name, example)
        middle = time.perf_counter()
        with method.applied(model), model.without_end_tokens():
            model.generate_batch(batch, tokens)
        end = time.perf_counter()
        if repetition or repetitions == 1:
            ratios.append((middle - start) / (end - middle))
    goal = GOALS[name]
    return figure(statistics.median(ratios), f">= {goal:g}" if goal else "", n=repetitions)


def difference(module: Any, model: Lvlm, exact: Lvlm, name: str, example: Example) -> Figure:
    """Return the largest difference of the peer's log-probabilities from ours in float64, for its tokens."""
    mitigator = peer_of(module, model, COMPARED[name], STEPS)
    theirs: list[Tensor] = []
    chosen: list[Tensor] = []
    sample = mitigator._sample_next

    def record(logits: Tensor, config: Any) -> Tensor:
        theirs.append(logits.detach().clone())
        chosen.append(sample(logits, config).detach().clone())
        return chosen[-1]

    mitigator._sample_next = record
    answer(mitigator, model, name, example)
    method, batch = ours_of(exact, COMPARED[name], example)
    with torch.no_grad(), method.applied(exact):
        decoder: Any = exact.decoder
        run = DecodingRun(exact, prompts_of(batch), decoder.start(exact, batch))
        ours = [run.start(), *(run.next(token[:, 0].clone()) for token in chosen[:-1])]
    largest = 0.0
    for a, b in zip(theirs, ours, strict=True):
        both = ~(a.isinf() | b.isinf())
        x, y = (logits.double().masked_fill(~both, -torch.inf).log_softmax(-1)[both] for logits in (a, b))
        largest = max(largest, float((x - y).abs().max()))
    return figure(largest, n=STEPS)


def ours_of(model: Lvlm, name: str, example: Example) -> tuple[Mitigation, Batch]:
    """Return our method, and the prompt."""
    data = DerivationData(model, None, ConceptDataset("one question", (example,)))
    method = training_free_methods[name].derive(data, **OPTIONS.get(name, {}))
    return method, next(model.batches([example], 1))


def peer_of(module: Any, model: Lvlm, name: str, tokens: int) -> Any:
    """Return the peer's method; it finds the decoder's layers by the attribute that it looks for."""
    mitigator = module.load_mitigator(
        name, model=model.hf, processor=model.processor, model_type="llava", max_new_tokens=tokens
    )
    mitigator.model.language_model = model.hf.model.language_model
    return mitigator


def answer(mitigator: Any, model: Lvlm, name: str, example: Example) -> None:
    """Write one answer with the peer's method."""
    image, prompt = example.image.load(), model.prompt(example.request)
    tokenizer = model.processor.tokenizer
    before, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with attention(model, "eager") if name == "pai" else nullcontext():
            mitigator(image, prompt)
    finally:
        tokenizer.eos_token = before


if __name__ == "__main__":
    main()
