"""Exports read back by those they are written for: every file, by its consumer's own reader, in the consumer's environment.

Vectors of the embedded model are exported in every format; another Python (with packages that conflict with ours) reads
each file with the consumer's code, applies it to the same saved model where the consumer can, and what it read and answered
is held against the vector and against `SteeringVector.applied`. A consumer that is not installed is listed with the reason.

    python benchmarks/consumers.py [--quick] [--python OTHER/bin/python] [--clones FOLDER]

``--clones`` holds clones of github.com/shengliu66/VTI, likenneth/honest_llama and THU-BPM/ICT, under these names; their code
comes in no package. How to set the environment up: docs/guides/steering.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import logging

from activation_store import trace
from concepts import counterfactuals, scenes
from lvlm import Head, Lvlm, Site, load_lvlm
from lvlm.model import Batch
from mitigation import Contrast, SteeringVector, derive, export
from mitigation.steering.changes import AddChange
from mitigation.steering.export import apply_bias
from mitigation.steering.places import Key

TOLERANCE = 1e-5
READ = Path(__file__).resolve().parent / "_consumers_read.py"
UNREAD = {
    "llama.cpp": "the wheels tried (xllamacpp, cyllama) offer no control vectors; its rules are held by export.gguf.check",
    "vLLM": "hotwire-vllm's kernel runs inside it, on a GPU; its rule (add scale times row) is applied instead",
    "EasySteer": "a fork of vLLM, on a GPU; it reads the file that repeng reads",
}
"""Consumers that were not run, and why."""
HEADS = (Head(1, 3), Head(1, 6), Head(4, 0))


@dataclass(frozen=True)
class Expected:
    """What a consumer must have read, and what its model must answer."""

    directions: Mapping[str, np.ndarray]
    logits: Mapping[str, np.ndarray]
    loose: tuple[str, ...] = ()
    """Logits that are reported without a goal."""


def make_vector(
    model: Lvlm, *keys: Key, shapes: Mapping[Key, tuple[int, ...]] | None = None, **changes: Any
) -> SteeringVector:
    """Make a vector of random directions."""
    rng, entries = np.random.default_rng(0), {}
    for key in keys:
        v = rng.standard_normal((shapes or {}).get(key, (model.head_dim if isinstance(key, Head) else model.width,)))
        entries[key] = AddChange(v / np.linalg.norm(v, axis=-1, keepdims=True), 0.1 if "norm" in changes else 0.5)
    return SteeringVector(entries, "all", 1.5, model.name, model.config_hash, **changes)


def steered(model: Lvlm, batch: Batch, vector: SteeringVector) -> np.ndarray:
    """Return the logits of the model with a vector, by `applied`."""
    with vector.applied(model):
        return model.logits(batch.inputs).numpy()


def rows(model: Lvlm, vector: SteeringVector) -> dict[str, np.ndarray]:
    """Return what a vector adds at each layer, in float64, heads through the output projection."""
    moves: dict[str, np.ndarray] = {}
    for key, move in vector.displacements().items():
        if isinstance(key, Head):
            columns = slice(key.head * model.head_dim, (key.head + 1) * model.head_dim)
            weight = model.output_projection("decoder", key.layer).weight.detach().double().numpy()
            move = weight[:, columns] @ move
        name = f"direction.{key.layer if isinstance(key, Head | Site) else key}"
        moves[name] = moves.get(name, 0) + move
    return moves


def write(model: Lvlm, folder: Path) -> dict[str, Expected]:
    """Save the model, inputs and every export; return what each consumer must find."""
    data = scenes.dataset(10, seed=3)
    batch = next(b for b in model.batches(data.where(kind="existence").examples, 2) if len(b.index) == 2)
    model.hf.save_pretrained(folder / "model")
    embedded = model.read(batch.inputs, ["decoder.L0.resid_pre"])["decoder.L0.resid_pre"]
    arrays: dict[str, Any] = {"embedded": embedded.numpy(), **{k: v.numpy() for k, v in batch.inputs.items()}}
    np.savez(folder / "inputs.npz", **arrays)
    plain = model.logits(batch.inputs).numpy()
    expected = {"model": Expected({}, {"logits": plain, "alone": plain})}

    blocks, heads = make_vector(model, 2, 4), make_vector(model, *HEADS)
    export.gguf(blocks, folder / "v.gguf", model)
    export.steering_vectors(blocks, folder / "blocks.pt", model)
    export.steering_vectors(heads, folder / "heads.pt", model, convert=True)
    export.vllm(blocks, folder / "vllm" / "look.pt", model)
    directions, logits = rows(model, blocks), {"logits": steered(model, batch, blocks)}
    expected |= {name: Expected(directions, {}) for name in ("gguf", "hidden-directions")}
    expected |= {name: Expected(directions, logits) for name in ("repeng", "steering-vectors", "hotwire-vllm")}
    expected["steering-vectors, heads"] = Expected(rows(model, heads), {"logits": steered(model, batch, heads)})

    mixed = make_vector(model, *HEADS, 2, Site("decoder", 3, "mlp_out"))
    export.baked(mixed, folder / "bias.safetensors", model)
    shutil.copy(apply_bias.__file__, folder / "apply_bias.py")
    expected["baked"] = Expected({}, {"logits": steered(model, batch, mixed)})

    answers = {}
    tokens = batch.encodings[0].tokens.sequence["vision"]
    for kind, stack, width in (("text", "decoder", model.width), ("vision", "vision", 0)):
        sites = [Site(stack, layer, "mlp_out") for layer in (0, 2)]  # pyright: ignore[reportArgumentType]  # one of the two
        width = width or model.output_projection("vision", 0).out_features
        shape = (width,) if stack == "decoder" else (tokens, width)
        vector = make_vector(model, *sites, shapes=dict.fromkeys(sites, shape), norm="relative")
        export.vti(vector.scaled(6.0), folder / f"vti_{kind}.pt", model)
        answers[f"logits {kind}"] = answers[f"logits {kind} half"] = steered(model, batch, vector.scaled(6.0))
    expected["VTI"] = Expected({}, answers, tuple(name for name in answers if name.endswith("half")))
    return expected | activations(model, folder)


def activations(model: Lvlm, folder: Path) -> dict[str, Expected]:
    """Write what scripts of ITI and ICT derive from; what they derive must be what `derive` does."""
    data = scenes.dataset(10, seed=5).where(kind="existence")
    store = trace(model, data, ["z", "resid_post", "decoder.L0.resid_pre"], ["last"], folder / "store", progress=False)
    positive = np.array([e.answer == "yes" for e in data])
    contrast = Contrast.from_store(store, positive=positive)
    export.iti_activations(contrast, folder / "features" / "toy", model)
    order = {Head(i, k): float(i * model.n_heads + k) for i in range(model.n_layers) for k in range(model.n_heads)}
    vector = derive.iti(contrast, accuracy=order, top=6, variant="release")
    chosen = sorted([head.layer, head.head] for head in vector.heads)
    (folder / "heads.json").write_text(json.dumps({"heads": model.n_heads, "chosen": chosen}))
    additions = vector.displacements(1.0)
    pushes = {f"direction.{h.layer}.{h.head}": additions[h].astype(np.float32) for h in vector.heads}

    blurred = [p for p in counterfactuals.pairs(scenes.dataset(10, seed=6), kind="blur") if p.clean.named_object()][:8]
    masked = {p.clean.id: p for p in counterfactuals.pairs(scenes.dataset(10, seed=6), kind="mask")}
    both = [(p, masked[p.clean.id]) for p in blurred if p.clean.id in masked]
    blur, mask = (Contrast.from_pairs(model, pairs) for pairs in zip(*both, strict=True))
    paths = export.ict_activations(blur, mask, folder / "vectors")
    clean, wrong = (np.load(path).astype(np.float64) for path in paths[:2])
    ict: dict[str, np.ndarray] = {}
    for layer, head in chosen:
        part = slice(head * (model.width // model.n_heads), (head + 1) * (model.width // model.n_heads))
        theta = clean[:, layer, part].mean(0) - wrong[:, layer, part].mean(0)
        theta /= np.linalg.norm(theta)
        spread = np.std(np.concatenate([clean, wrong])[:, layer, part] @ theta)
        ict[f"direction.{layer}.{head}"] = spread * theta
    return {"honest_llama": Expected(pushes, {}), "ICT": Expected(ict, {})}


def compared(folder: Path, name: str, want: Expected) -> dict[str, Any]:
    """Hold what a consumer read and answered against what it must; differences, absolute and at most."""
    arrays = dict(np.load(folder / f"{name}.out.npz"))
    read = {k for k in arrays if k.startswith("direction")}
    same = {"directions": 0.0} if want.directions else {}
    for key, row in want.directions.items():
        there = key in arrays and arrays[key].shape == row.shape
        same["directions"] = max(same["directions"], float(np.abs(arrays[key] - row).max()) if there else np.inf)
    if read != set(want.directions):
        same["directions"] = np.inf
    for key, row in want.logits.items():
        same[key] = float(np.abs(arrays[key] - row).max()) if key in arrays else np.inf
    checked = [v for k, v in same.items() if k not in want.loose]
    return {"value": max(checked), "holds": max(checked) <= TOLERANCE, "compared": same, "n": len(want.directions)}


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="for make bench; there is nothing to shorten")
    parser.add_argument("--python", default=sys.executable, help="of the consumers' environment; by default this one")
    parser.add_argument("--clones", default="none", help="folder of clones of VTI, honest_llama and ICT")
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = Console()
    console.print("Compares what consumers read and answer with the exported vector and `applied` (float32, 1e-5).")
    figures: dict[str, dict[str, Any]] = {}
    table = Table("consumer", "reader", "version", "largest differences", "result")
    with tempfile.TemporaryDirectory() as name, console.status("exporting, then reading elsewhere"):
        folder = Path(name)
        expected = write(load_lvlm("tiny"), folder)
        command = [options.python, "-W", "ignore", str(READ), str(folder), str(Path(options.clones).resolve())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{options.python} did not run the readers:\n{done.stderr[-2000:]}")  # noqa: EM102  # a check
        answers = json.loads(done.stdout.splitlines()[-1])
        for consumer, want in expected.items():
            answer = answers[consumer]
            figure: dict[str, Any] = {
                **answer,
                "goal": f"<= {TOLERANCE}",
                "value": None,
                "holds": None if "missing" in answer else False,
            }
            if not answer.keys() & {"missing", "error"}:
                figure |= compared(folder, consumer, want)
            figures[consumer] = figure
            differences = ", ".join(f"{k} {v:.1e}" for k, v in figure.get("compared", {}).items())
            result = answer.get("error") or (f"not here: {answer['missing']}" if "missing" in answer else None)
            table.add_row(consumer, answer["reader"], answer["version"], differences, result or str(figure["holds"]))
    for consumer, reason in UNREAD.items():
        table.add_row(consumer, "", "", "", f"not run: {reason}")
    console.print(table)
    device = f"{platform.machine()}, float32, torch {torch.__version__}"
    print(json.dumps({"benchmark": "consumers", "device": device, "figures": figures, "not_run": UNREAD}))
    if any(f["holds"] is False for f in figures.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
