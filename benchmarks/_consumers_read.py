"""Run by benchmarks/consumers.py in another Python environment: read each export with its consumer's code, and apply it.

    OTHER/bin/python benchmarks/_consumers_read.py FOLDER CLONES

Imports nothing of groundscope. Writes ``FOLDER/NAME.out.npz`` for each consumer, and prints one JSON object: name to version,
reader, and the error if there was one.
"""

from __future__ import annotations

# pyright: reportMissingImports=false
# They are in the consumers' environment.
import ast
import copy
import importlib.metadata
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = dict[str, Any]
FOLDER, CLONES = Path(sys.argv[1]), Path(sys.argv[2])


class NotInstalledError(Exception):
    """The consumer's code is not available."""


def load_inputs() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x) for name, x in np.load(FOLDER / "inputs.npz").items()}


def load_llava() -> Any:
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration, logging

    logging.set_verbosity_error()
    model: Any = LlavaForConditionalGeneration.from_pretrained(FOLDER / "model", attn_implementation="sdpa").eval()
    inner = getattr(model.model.vision_tower, "vision_model", None)
    if inner is not None:  # up to release 4 a CLIP tower had one more name in it, and its weights are not found without
        tensors = {
            n.partition("vision_tower.")[2]: x for n, x in load_file(FOLDER / "model" / "model.safetensors").items()
        }
        inner.load_state_dict({n: x for n, x in tensors.items() if n})
    return model


@torch.no_grad()
def run_logits(model: Any) -> np.ndarray:
    inputs = {name: x for name, x in load_inputs().items() if name != "embedded"}
    return model(**inputs, use_cache=False).logits[:, -1].numpy()


def extract_decoder(whole: Any) -> Any:
    """Return the decoder of a LLaVA as a separate language model."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(whole.config.text_config).eval()
    inner = whole.get_decoder() if hasattr(whole, "get_decoder") else whole.language_model
    model.model.load_state_dict(getattr(inner, "language_model", inner).state_dict())
    model.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())
    return model


def extract_functions(clone: str, path: str, *names: str, **globals_: Any) -> Any:
    """Extract functions and classes from a script of a repository, without its unneeded imports."""
    where = CLONES / clone / path
    if not where.is_file():
        msg = f"no {clone}/{path} in the folder of clones"
        raise NotInstalledError(msg)
    nodes = [n for n in ast.parse(where.read_text()).body if getattr(n, "name", None) in names]
    scope: dict[str, Any] = {"np": np, "torch": torch, "tqdm": lambda x, **_: x, **globals_}
    exec(compile(ast.Module(nodes, []), str(where), "exec"), scope)  # noqa: S102  # the consumer's own code
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def plain() -> Arrays:
    whole = load_llava()
    with torch.no_grad():
        alone = extract_decoder(whole)(inputs_embeds=load_inputs()["embedded"], use_cache=False).logits[:, -1].numpy()
    return {"logits": run_logits(whole), "alone": alone}


def gguf_reader() -> Arrays:
    from gguf import GGUFReader

    return {f"direction.{t.name.split('.')[1]}": np.array(t.data) for t in GGUFReader(FOLDER / "v.gguf").tensors}


def repeng() -> Arrays:
    from repeng import ControlModel, ControlVector

    vector = ControlVector.import_gguf(FOLDER / "v.gguf")
    model = ControlModel(extract_decoder(load_llava()), sorted(vector.directions))
    model.set_control(vector, 1.0)
    with torch.no_grad():
        logits = torch.cat(
            [model(inputs_embeds=row[None], use_cache=False).logits[:, -1] for row in load_inputs()["embedded"]]
        )
    return {"logits": logits.numpy(), **{f"direction.{i}": np.array(x) for i, x in vector.directions.items()}}


def _steering_vectors(name: str) -> Arrays:
    from steering_vectors import SteeringVector

    document = torch.load(FOLDER / name, weights_only=True)  # noqa: TID251  # as the consumer does
    vector = SteeringVector(document["layer_activations"], document["layer_type"])
    model = load_llava()
    with vector.apply(model, layer_config=document["layer_config"]):
        logits = run_logits(model)
    rows = {f"direction.{i}": x.numpy() for i, x in vector.layer_activations.items()}
    return {"logits": logits, **rows}


def hotwire() -> Arrays:
    """Read with hotwire's store and bank of vectors; its kernel needs a GPU, so its rule is applied with hooks."""
    from hotwire._state import SteerState, parse_spec

    model = load_llava()
    layers = extract_decoder(model)
    width, count = layers.config.hidden_size, layers.config.num_hidden_layers
    state = SteerState(count, width, 4096, torch.device("cpu"), torch.float32, 16)
    state.load_store(str(FOLDER / "vllm"))
    arrays: Arrays = {}
    for entry in parse_spec(json.loads((FOLDER / "vllm" / "look.pt.json").read_text())["hotwire"]) or []:
        slot = state.slot_for(entry["id"], int(entry["layer"]), float(entry.get("scale", 1.0)))
        if slot is None:
            msg = f"no slot for {entry}"
            raise ValueError(msg)
        push = state.bank.scales[slot] * state.bank.bank[slot]
        arrays[f"direction.{entry['layer']}"] = push.numpy().copy()

        def steer(_m: Any, _a: Any, out: Any, push: torch.Tensor = push) -> Any:
            return (out[0] + push, *out[1:]) if isinstance(out, tuple) else out + push

        layers.model.layers[entry["layer"]].register_forward_hook(steer)
    with torch.no_grad():
        arrays["logits"] = layers(inputs_embeds=load_inputs()["embedded"], use_cache=False).logits[:, -1].numpy()
    return arrays


def hidden_directions() -> Arrays:
    from hidden_directions.calibrate.dose import vector_norms
    from hidden_directions.import_vector import load_any, to_layer_matrix

    path = FOLDER / "vllm" / "look.pt"
    matrix = np.array(to_layer_matrix(load_any(path)))
    norms = vector_norms(path)
    np.testing.assert_allclose([norms[i] for i in range(len(matrix))], np.linalg.norm(matrix, axis=-1), rtol=1e-5)
    return {f"direction.{i}": row for i, row in enumerate(matrix) if row.any()}


def baked() -> Arrays:
    sys.path.insert(0, str(FOLDER))
    from apply_bias import apply

    model = load_llava()
    apply(model, FOLDER / "bias.safetensors")
    return {"logits": run_logits(model)}


def vti() -> Arrays:
    import torch.nn.functional as F  # noqa: N812  # its name there

    names = ("VTILayer", "get_nested_attr", "find_longest_modulelist", "find_module", "get_layers_path", "get_layers")
    typed = {"nn": torch.nn, "F": F, "Tensor": torch.Tensor, "PreTrainedModel": object}
    code = extract_functions("VTI", "vti_utils/llm_layers.py", *names, "add_vti_layers", **typed)
    arrays: Arrays = {}
    tensor: Any = torch.Tensor
    own = tensor.half
    for kind, stack in (("text", "language_model"), ("vision", "vision_tower")):
        directions = torch.load(FOLDER / f"vti_{kind}.pt", weights_only=True)  # noqa: TID251  # as the consumer does
        alpha = json.loads((FOLDER / f"vti_{kind}.pt.json").read_text())["alpha"]
        for name, half in ((kind, lambda x: x), (f"{kind} half", own)):
            model = copy.deepcopy(load_llava())
            code.add_vti_layers(getattr(model.model, stack), directions, alpha=[alpha])
            tensor.half = half  # its layer rounds to float16 whatever the model is; without, and with that
            try:
                arrays[f"logits {name}"] = run_logits(model)
            finally:
                tensor.half = own
    return arrays


def _by_heads(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], heads, -1)  # rearrange(x, 'b l (h d) -> b l h d', h=heads)


def honest_llama() -> Arrays:
    names = ("layer_head_to_flattened_idx", "get_com_directions", "get_interventions_dict")
    code = extract_functions("honest_llama", "utils.py", *names)
    heads = json.loads((FOLDER / "heads.json").read_text())
    z = _by_heads(np.load(FOLDER / "features" / "toy_head_wise.npy"), heads["heads"])
    labels = np.load(FOLDER / "features" / "toy_labels.npy")
    separate, rows = [x[None] for x in z], np.arange(len(z))
    com = code.get_com_directions(
        z.shape[1], z.shape[2], rows, np.array([], int), separate, [np.array([y]) for y in labels]
    )
    chosen = [tuple(head) for head in heads["chosen"]]
    return _name_directions(code.get_interventions_dict(chosen, None, z, z.shape[2], True, False, com))


def ict() -> Arrays:
    names = ("layer_head_to_flattened_idx", "get_interventions_dict")
    code = extract_functions("ICT", "ICT/val_ict_pope.py", *names)
    heads = json.loads((FOLDER / "heads.json").read_text())
    arrays = {n: _by_heads(np.load(FOLDER / "vectors" / f"{n}.npy"), heads["heads"]) for n in ("base", "hallucinated")}
    both = np.concatenate(list(arrays.values()))
    com = [a - b for a, b in zip(*(x.mean(0).reshape(-1, x.shape[-1]) for x in arrays.values()), strict=True)]
    chosen = [tuple(head) for head in heads["chosen"]]
    return _name_directions(code.get_interventions_dict(chosen, None, both, both.shape[2], True, False, com))


def _name_directions(interventions: dict[str, list[Any]]) -> Arrays:
    """Name the directions that scripts of ITI and ICT return by module as (head, direction, deviation)."""
    arrays: Arrays = {}
    for module, items in interventions.items():
        layer = next(part for part in module.split(".") if part.isdecimal())
        for head, direction, deviation in items:
            arrays[f"direction.{layer}.{head}"] = direction * deviation
    return arrays


CONSUMERS: dict[str, tuple[str, str, Callable[[], Arrays]]] = {
    "model": ("transformers", "from_pretrained", plain),
    "gguf": ("gguf", "GGUFReader", gguf_reader),
    "repeng": ("repeng", "ControlVector.import_gguf, ControlModel", repeng),
    "steering-vectors": (
        "steering-vectors",
        "SteeringVector.apply",
        lambda: _steering_vectors("blocks.pt"),
    ),
    "steering-vectors, heads": (
        "steering-vectors",
        "SteeringVector.apply",
        lambda: _steering_vectors("heads.pt"),
    ),
    "hotwire-vllm": ("hotwire-vllm", "SteerState.load_store, slot_for", hotwire),
    "hidden-directions": ("hidden-directions", "load_any, to_layer_matrix, vector_norms", hidden_directions),
    "baked": ("safetensors", "apply_bias.apply", baked),
    "VTI": ("", "add_vti_layers", vti),
    "honest_llama": ("", "np.load, get_com_directions, get_interventions_dict", honest_llama),
    "ICT": ("", "np.load, get_interventions_dict", ict),
}


def main() -> None:
    """Run every consumer; a failure does not stop the others."""
    readers: dict[str, dict[str, str]] = {}
    for name, (package, reader, run) in CONSUMERS.items():
        readers[name] = {"reader": reader, "version": ""}
        try:
            readers[name]["version"] = importlib.metadata.version(package) if package else "clone"
            np.savez(FOLDER / f"{name}.out.npz", **run())
        except (ImportError, NotInstalledError) as error:
            readers[name]["missing"] = f"{error}".splitlines()[0]
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the finding
            readers[name]["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(readers))


if __name__ == "__main__":
    main()
