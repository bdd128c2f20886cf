"""Load a model: the embedded ones by name, any other from a Hugging Face id or folder, or one in memory."""

from __future__ import annotations

import json
import logging as records
from pathlib import Path
from typing import Any

import torch

from concepts.scenes.questions import as_example, existence
from concepts.scenes.scene import TEST, generator, sample_scene
from groundscope.core.errors import DataError, ModelError
from groundscope.core.user_files import read_text
from lvlm.access.weights import empty
from lvlm.embedded_models import EMBEDDED, folder_of
from lvlm.encoding.processor import assemble
from lvlm.family.registry import family
from lvlm.family.specification import FamilySpec
from lvlm.load_checks import check_device, check_loading, check_pixels, check_sizes, unwrapped
from lvlm.model import Lvlm
from lvlm.model_files import resolved_revision
from lvlm.spec_validation import validate_once

_LOG = records.getLogger(__name__)
_DTYPES = {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16", "float64")}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
_WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_lvlm(
    source: str | Path,
    *,
    spec: FamilySpec | str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    validate: bool = True,
    revision: str | None = None,
) -> Lvlm:
    """Load a model and prove that its tensors are where the family says.

    Parameters
    ----------
    source
        ``tiny``, ``tiny-unbiased``, a folder in Hugging Face layout, or a Hugging Face id.
    spec
        Where things are: a `FamilySpec`, or a yaml file with its fields; by default the entry of `lvlm.family.registry` for the
        model's type.
    dtype
        ``float32``, ``bfloat16`` or ``float16``.
    device
        Where to put it, as torch names devices; ``auto`` spreads it over the GPUs there are, and what they cannot hold over
        main memory and disk (needs accelerate).
    trust_remote_code
        Allow the model folder's own code to run.
    validate
        Run `lvlm.spec_validation.validate` on one small example, unless this process has proved the same family on the same
        configuration already.
    revision
        Branch, tag or commit of a Hugging Face id; by default its main branch. All files are read from one commit, which
        `Lvlm.revision` and provenance name.

    Raises
    ------
    ModelError
        Where there is no such model or device, it cannot be read, weights are missing from its checkpoint, its family is
        unknown, or a check fails. Tensors of the checkpoint that the model does not use are a warning of the logger
        ``lvlm.loading``, and recorded in provenance.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    number = _DTYPES.get(dtype)
    if number is None:
        msg = f"dtype '{dtype}': choose float32, bfloat16 or float16"
        raise ModelError(msg)
    check_device(device)
    name = str(source)
    folder = folder_of(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        msg = f"model folder '{folder}' has no config.json: it is not in Hugging Face layout"
        raise ModelError(msg)
    local = folder.is_dir()
    if not local and (name in EMBEDDED or name.startswith((".", "/", "~"))):
        msg = f"no model folder '{folder}'"
        raise ModelError(msg)
    if local and revision is not None:
        msg = f"revision='{revision}': '{folder}' is a folder, and only a Hugging Face id has revisions"
        raise ModelError(msg)
    where = str(folder) if local else name
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local, "revision": revision}
    if local or revision is None:
        options.pop("revision")
    commit: str | None = None
    unused: tuple[str, ...] = ()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(where, **options)
        commit = None if local else resolved_revision(name, revision)
        if commit is not None:
            options["revision"] = commit
            config = AutoConfig.from_pretrained(where, **options)
        check_sizes(config, name)
        known = _spec(spec) or family(config.model_type)
        spread = {"device_map": "auto"} if device == "auto" else {}
        # Weights of another shape are not ignored: check_loading refuses them by name.
        loaded = _auto_class(config).from_pretrained(
            where, output_loading_info=True, ignore_mismatched_sizes=True, **_in_number(number), **spread, **options
        )
        model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
        unused = check_loading(model, info, name)
        processor = _processor(where, config, known, options)
    except ModelError:
        raise
    except Exception as error:  # damaged files fail in as many ways as there are readers below
        exists = "" if local else f"; it is no folder here either, and the embedded models are {', '.join(EMBEDDED)}"
        if not trust_remote_code and "trust_remote_code" in str(error):
            exists = "; it runs with trust_remote_code=True: read its code first"
        msg = f"model '{name}' cannot be loaded: {_damaged_settings(folder) or _first_line(error)}{exists}"
        raise ModelError(msg) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if unused:
        _LOG.warning(
            "model '%s': its checkpoint has %d tensors that the model does not use, %s among them; all weights of the "
            "model itself were loaded",
            name,
            len(unused),
            unused[0],
        )
    placed = model if device == "auto" else _placed(model, device, name)
    return _wrapped(placed, processor, known, name, validate=validate, revision=commit, unused=unused)


def wrap_lvlm(
    model: Any,
    processor: Any,
    *,
    spec: FamilySpec | str | Path | None = None,
    name: str | None = None,
    validate: bool = True,
) -> Lvlm:
    """Take a Hugging Face model and processor that are in memory; see `load_lvlm`.

    A model inside ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile`` is taken out of it.
    """
    return _wrapped(model, processor, _spec(spec), name, validate=validate)


def _wrapped(
    model: Any,
    processor: Any,
    spec: FamilySpec | None,
    name: str | None,
    *,
    validate: bool,
    revision: str | None = None,
    unused: tuple[str, ...] = (),
) -> Lvlm:
    model = unwrapped(model)
    if not isinstance(model, torch.nn.Module):
        msg = f"the model is a {type(model).__name__}: give a Hugging Face model with a config"
        raise ModelError(msg)
    if empty(model):
        msg = "the model is on the 'meta' device: it has no weights; load it onto 'cpu' or a GPU"
        raise ModelError(msg)
    if getattr(processor, "image_token", None) is None:
        msg = f"{type(processor).__name__} has no image token; set processor.image_token to the placeholder of an image"
        raise ModelError(msg)
    check_pixels(processor, name or type(model).__name__)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        msg = f"{type(model).__name__} has no config.model_type: give a Hugging Face model"
        raise ModelError(msg)
    wrapped = Lvlm(
        model,
        processor,
        spec or family(model_type, model),
        name or type(model).__name__,
        revision=revision,
        unused_weights=unused,
    )
    if validate:
        scene = sample_scene(generator(TEST, 0, 0), "check", count=2)
        validate_once(wrapped, wrapped.encode(as_example(scene, existence(scene, "apple"), "check")))
    return wrapped


def outline_lvlm(
    source: str | Path,
    *,
    spec: FamilySpec | str | Path | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Lvlm:
    """Return a model without weights, on the device ``meta``: it encodes examples and knows every site, and cannot run.

    Parameters
    ----------
    source, spec, dtype, trust_remote_code
        As in `lvlm.load_lvlm`; of a folder the weights are not read, of a Hugging Face id not downloaded.

    Raises
    ------
    ModelError
        Where there is no such model, its configuration or processor cannot be read, or its family is unknown.
    """
    from transformers import AutoConfig

    folder = folder_of(str(source))
    local = folder.is_dir()
    where = str(folder) if local else str(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    try:
        config = AutoConfig.from_pretrained(where, **options)
        check_sizes(config, str(source))
        known = _spec(spec) or family(config.model_type)
        with torch.device("meta"):
            model = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        processor = _processor(where, config, known, options)
        check_pixels(processor, str(source))
    except ModelError:
        raise
    except Exception as error:  # as for loading
        reason = _damaged_settings(folder) or _first_line(error)
        msg = f"the configuration of model '{source}' cannot be read: {reason}"
        raise ModelError(msg) from error
    return Lvlm(model.to(getattr(torch, dtype)), processor, known, str(source))


def has_weights(source: str | Path) -> bool:
    """Whether a model's weights are on this machine: in its folder, or in the Hugging Face cache."""
    folder = folder_of(str(source))
    if folder.is_dir():
        return any(p.suffix in _WEIGHT_SUFFIXES for p in folder.iterdir())
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(str(source), name), str) for name in _WEIGHT_NAMES)


def _processor(where: str, config: Any, spec: FamilySpec, options: dict[str, Any]) -> Any:
    """Return the processor of a folder or id: its own, or one put together from its tokenizer and image processor."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(where, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        processor = None  # it wants torchvision, or there is only a tokenizer and an image processor
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "tokenizer"):
        processor = assemble(where, config, spec, options)
    return processor


def _auto_class(config: Any) -> Any:
    """Return what loads a model: what its own code names where it brings some, else transformers' class for such models."""
    import transformers

    own = getattr(config, "auto_map", None) or {}
    names = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
    wanted = next((name for name in names if name in own), None)
    # The first is there from release 4.45 on, the second until release 5.
    found = wanted or next(name for name in names if hasattr(transformers, name))
    return getattr(transformers, found)


def _placed(model: Any, device: str, name: str) -> Any:
    """Move a model to a device; raises `ModelError` where it has no room there."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        msg = f"model '{name}' cannot be put on device '{device}': {_first_line(error)}"
        raise ModelError(msg) from error


def _in_number(number: torch.dtype) -> dict[str, torch.dtype]:
    """Return the option that says in which numbers to load, by its name in this release of transformers."""
    import transformers

    return {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": number}


def _spec(given: FamilySpec | str | Path | None) -> FamilySpec | None:
    return FamilySpec.from_yaml(given) if isinstance(given, str | Path) else given


_SETTINGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "model.safetensors.index.json",
)
"""Files of a model's folder that hold one JSON object each."""


def _damaged_settings(folder: Path) -> str | None:
    """Return which file of settings in a folder is no JSON object, in words; None where all are, and for no folder."""
    for file in (folder / name for name in _SETTINGS):
        try:
            if not file.exists() or isinstance(json.loads(read_text(file)), dict):
                continue
            return f"'{file}' must hold a JSON object"
        except DataError as error:
            return str(error)
        except (OSError, ValueError, RecursionError) as error:
            return f"'{file}' is not JSON ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
