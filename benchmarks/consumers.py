"""Exported vectors, read and applied by the code of the programs that they are written for.

    python benchmarks/consumers.py [--python OTHER/bin/python] [--clones FOLDER]

Vectors of the embedded model are exported in every format. Each file is read with the code of its consumer (the program that
uses the format) in the Python environment of ``--python``, because packages of consumers conflict with those of groundscope,
and is applied to the same saved model if the consumer can do that. A figure is the largest absolute difference of directions
and logits from the exported vector and from `SteeringVector.applied`. A consumer that is not installed is listed with the
reason.

``--clones`` is a folder with clones of github.com/shengliu66/VTI, likenneth/honest_llama and THU-BPM/ICT, which are not
distributed as packages. The setup of the environment is described in docs/benchmarks.md.
"""

from __future__ import annotations

import json
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
from rich.table import Table
from transformers import logging

from activation_store import trace
from benchmarks._harness import Figure, describe_device, finish, option_parser, progress, wide_console
from concepts import counterfactuals, scenes
from lvlm import Head, Lvlm, Site, load_lvlm
from lvlm.model import Batch
from mitigation import Contrast, SteeringVector, derive, export
from mitigation.steering.changes import AddChange
from mitigation.steering.export import apply_bias
from mitigation.steering.places import Key

TOLERANCE = 1e-5
READER_SCRIPT = Path(__file__).resolve().parent / "_consumers_read.py"
NOT_RUN = {
    "llama.cpp": "the wheels tried (xllamacpp, cyllama) have no control vectors; export.gguf.check applies its rules",
    "vLLM": "hotwire-vllm's kernel runs inside it, on a GPU; its rule (add scale times row) is applied instead",
    "EasySteer": "a fork of vLLM, on a GPU; it reads the file that repeng reads",
}
"""Consumers that are not run, and the reasons."""
HEADS = (Head(1, 3), Head(1, 6), Head(4, 0))


@dataclass(frozen=True)
class Expected:
    """The directions that a consumer must read, and the logits that its model must return."""

    directions: Mapping[str, np.ndarray]
    logits: Mapping[str, np.ndarray]
    without_goal: tuple[str, ...] = ()
    """Names of logits whose difference is reported without a goal."""


def make_vector(
    model: Lvlm, *keys: Key, shapes: Mapping[Key, tuple[int, ...]] | None = None, **changes: Any
) -> SteeringVector:
    """Return a vector of random directions."""
    rng, entries = np.random.default_rng(0), {}
    for key in keys:
        v = rng.standard_normal((shapes or {}).get(key, (model.head_dim if isinstance(key, Head) else model.width,)))
        entries[key] = AddChange(v / np.linalg.norm(v, axis=-1, keepdims=True), 0.1 if "norm" in changes else 0.5)
    return SteeringVector(entries, "all", 1.5, model.name, model.config_hash, **changes)


def steered_logits(model: Lvlm, batch: Batch, vector: SteeringVector) -> np.ndarray:
    """Return the logits of the steered model."""
    with vector.applied(model):
        return model.logits(batch.inputs).numpy()


def layer_directions(model: Lvlm, vector: SteeringVector) -> dict[str, np.ndarray]:
    """Return the vector that is added to the residual stream at each layer, in float64."""
    moves: dict[str, np.ndarray] = {}
    for key, move in vector.displacements().items():
        if isinstance(key, Head):
            columns = slice(key.head * model.head_dim, (key.head + 1) * model.head_dim)
            weight = model.output_projection("decoder", key.layer).weight.detach().double().numpy()
            move = weight[:, columns] @ move
        name = f"direction.{key.layer if isinstance(key, Head | Site) else key}"
        moves[name] = moves.get(name, 0) + move
    return moves


def write_exports(model: Lvlm, folder: Path) -> dict[str, Expected]:
    """Save the model, inputs and every export; return what is expected of each consumer."""
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
    directions, logits = layer_directions(model, blocks), {"logits": steered_logits(model, batch, blocks)}
    expected |= {name: Expected(directions, {}) for name in ("gguf", "hidden-directions")}
    expected |= {name: Expected(directions, logits) for name in ("repeng", "steering-vectors", "hotwire-vllm")}
    expected["steering-vectors, heads"] = Expected(
        layer_directions(model, heads), {"logits": steered_logits(model, batch, heads)}
    )

    mixed = make_vector(model, *HEADS, 2, Site("decoder", 3, "mlp_out"))
    export.baked(mixed, folder / "bias.safetensors", model)
    shutil.copy(apply_bias.__file__, folder / "apply_bias.py")
    expected["baked"] = Expected({}, {"logits": steered_logits(model, batch, mixed)})

    answers = {}
    tokens = batch.encodings[0].tokens.sequence["vision"]
    for kind, stack, width in (("text", "decoder", model.width), ("vision", "vision", 0)):
        sites = [Site(stack, layer, "mlp_out") for layer in (0, 2)]  # pyright: ignore[reportArgumentType]  # one of the two
        width = width or model.output_projection("vision", 0).out_features
        shape = (width,) if stack == "decoder" else (tokens, width)
        vector = make_vector(model, *sites, shapes=dict.fromkeys(sites, shape), norm="relative")
        export.vti(vector.scaled(6.0), folder / f"vti_{kind}.pt", model)
        answers[f"logits {kind}"] = answers[f"logits {kind} half"] = steered_logits(model, batch, vector.scaled(6.0))
    expected["VTI"] = Expected({}, answers, tuple(name for name in answers if name.endswith("half")))
    return expected | write_activations(model, folder)


def write_activations(model: Lvlm, folder: Path) -> dict[str, Expected]:
    """Write the activations from which scripts of ITI and ICT derive directions; return the directions of `derive`."""
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


def compare_output(folder: Path, name: str, expected: Expected) -> dict[str, Any]:
    """Return the largest absolute differences of a consumer's directions and logits from the expected ones."""
    arrays = dict(np.load(folder / f"{name}.out.npz"))
    read = {k for k in arrays if k.startswith("direction")}
    same = {"directions": 0.0} if expected.directions else {}
    for key, row in expected.directions.items():
        there = key in arrays and arrays[key].shape == row.shape
        same["directions"] = max(same["directions"], float(np.abs(arrays[key] - row).max()) if there else np.inf)
    if read != set(expected.directions):
        same["directions"] = np.inf
    for key, row in expected.logits.items():
        same[key] = float(np.abs(arrays[key] - row).max()) if key in arrays else np.inf
    checked = [v for k, v in same.items() if k not in expected.without_goal]
    return {"value": max(checked), "holds": max(checked) <= TOLERANCE, "compared": same, "n": len(expected.directions)}


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="no effect")
    parser.add_argument(
        "--python", default=sys.executable, help="Python of the consumers' environment (default: this one)"
    )
    parser.add_argument("--clones", default="none", help="folder of the clones of VTI, honest_llama and ICT")
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = wide_console()
    console.print("Compares what consumers read and return with the exported vector and `applied` (float32, 1e-5).")
    figures: dict[str, Figure] = {}
    table = Table("consumer", "reader", "version", "largest differences", "result")
    with tempfile.TemporaryDirectory() as name, progress("exporting and reading"):
        folder = Path(name)
        expected = write_exports(load_lvlm("tiny"), folder)
        clones = str(Path(options.clones).resolve())
        command = [options.python, "-W", "ignore", str(READER_SCRIPT), str(folder), clones]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            parser.error(f"'{options.python}' could not run the readers:\n{done.stderr[-2000:]}")
        outputs = json.loads(done.stdout.splitlines()[-1])
        for consumer, expected_output in expected.items():
            output = outputs[consumer]
            missing = "missing" in output
            entry: Figure = {
                "goal": f"<= {TOLERANCE}",
                "value": None,
                "holds": None if missing else False,
                "n": 0,
                **output,
            }
            if not output.keys() & {"missing", "error"}:
                entry |= compare_output(folder, consumer, expected_output)
            figures[consumer] = entry
            differences = ", ".join(f"{k} {v:.1e}" for k, v in entry.get("compared", {}).items())
            result = f"not installed: {output['missing']}" if missing else output.get("error") or str(entry["holds"])
            table.add_row(consumer, output["reader"], output["version"], differences, result)
    for consumer, reason in NOT_RUN.items():
        table.add_row(consumer, "", "", "", f"not run: {reason}")
    console.print(table)
    finish("consumers", describe_device("torch", dtype="float32"), figures, not_run=NOT_RUN)
    if any(entry["holds"] is False for entry in figures.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
