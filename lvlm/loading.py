"""Load a model: an embedded one by name, another one from a Hugging Face id or folder, or wrap one in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from concepts.scenes.questions import as_example, existence
from concepts.scenes.scene import TEST, generator, sample_scene
from groundscope.core.errors import DataError, ModelError
from groundscope.core.text import nearest
from groundscope.core.user_files import read_text
from lvlm.access.weights import empty
from lvlm.embedded_models import EMBEDDED, folder_of
from lvlm.encoding.processor import assemble
from lvlm.family.registry import family
from lvlm.family.specification import FamilySpec
from lvlm.identity_checks import validate_once
from lvlm.load_checks import check_loading, check_pixels, check_sizes, unwrap
from lvlm.load_options import (
    AUTO,
    DTYPES,
    check_attention,
    checkpoint_dtype,
    dtype_name,
    limit_pixels,
    placement,
    quantization,
)
from lvlm.model import Lvlm
from lvlm.model_files import resolved_revision
from lvlm.prompting import check_placeholder

_LOG = logging.getLogger(__name__)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
_WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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
"""Files of a model's folder that contain one JSON object each."""


def load_lvlm(
    source: str | Path,
    *,
    spec: FamilySpec | str | Path | None = None,
    dtype: str | torch.dtype = AUTO,
    device: str = "cpu",
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    validate: bool = True,
) -> Lvlm:
    """Load a model, and check with one forward pass that its activations are where its family's spec says.

    Parameters
    ----------
    source
        ``tiny``, ``tiny-unbiased``, a folder in Hugging Face layout, or a Hugging Face id.
    spec
        Spec of the family, or a yaml file with its fields; by default the entry of `lvlm.families` for the model's type.
    dtype
        ``float32``, ``bfloat16``, ``float16``, ``float64``, or ``auto`` for the number type of the checkpoint (float32 for the
        embedded models).
    device
        Device, by torch's names; ``auto`` is ``device_map="auto"``. Weights are loaded onto the device directly if accelerate
        is installed.
    device_map
        How to distribute the model over GPUs, main memory and disk, as in transformers: ``auto``, ``balanced``,
        ``balanced_low_0``, ``sequential``, or module names with their devices. Requires accelerate.
    max_memory
        Largest memory of each device of a distributed model, such as ``{0: "20GiB", "cpu": "60GiB"}``.
    quantization_config
        ``8bit`` or ``4bit`` (bitsandbytes), or settings or an object of a quantization of transformers. What runs on a quantized
        model is in the guide of model families.
    attn_implementation
        ``sdpa``, ``eager`` or another name of transformers; by default the family's.
    min_pixels, max_pixels
        Smallest and largest number of pixels to which an image is resized, for families that read images at their own
        resolution (Qwen-VL, GLM-4V); by default the model's own.
    revision
        Branch, tag or commit of a Hugging Face id; by default its main branch. All files are read from one commit, which is in
        `Lvlm.revision` and in provenance.
    cache_dir
        Folder of downloaded files; by default that of Hugging Face.
    trust_remote_code
        Whether to run the code in the model's folder.
    validate
        Whether to run `lvlm.identity_checks.validate` on one small example, unless this process has already checked the same
        spec with the same configuration.

    Raises
    ------
    ModelError
        If there is no such model, dtype, device or attention, two options contradict each other, the model cannot be read, its
        checkpoint lacks weights, its family is unknown, or a check fails. Tensors of the checkpoint that the model does not use
        cause a warning of the logger ``lvlm.loading``, and are recorded in provenance.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.load_lvlm("tiny")
    Lvlm('tiny', llava: 6 layers x 8 heads of 24, vision 4 layers, torch.float32, cpu)
    >>> gs.load_lvlm("tiny", dtype="int8")
    Traceback (most recent call last):
    groundscope.core.errors.ModelError: unknown dtype 'int8'; choose from auto, float32, bfloat16, float16, float64
    """
    dtype = dtype_name(dtype)
    check_attention(attn_implementation)
    quantized = quantization(quantization_config)
    places = placement(device, device_map, max_memory, quantized=quantized is not None)
    name, folder = str(source), folder_of(source)
    local = folder.is_dir()
    _check_source(name, folder, revision)
    where = str(folder) if local else name
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    if cache_dir is not None:
        options["cache_dir"] = str(cache_dir)
    commit: str | None = None
    with _quiet_transformers(local=local), _explained(f"model '{name}' cannot be loaded", name, folder, options):
        from transformers import AutoConfig

        if revision is not None:
            options["revision"] = revision
        config = AutoConfig.from_pretrained(where, **options)
        commit = None if local else resolved_revision(name, revision, cache_dir)
        if commit is not None:
            options["revision"] = commit
            config = AutoConfig.from_pretrained(where, **options)
        check_sizes(config, name)
        family_spec = _read_spec(spec) or family(config.model_type)
        dtype = checkpoint_dtype(source, config) if dtype == AUTO else dtype
        if getattr(config, "quantization_config", None) is not None:  # a checkpoint that is stored quantized
            places = placement(device, device_map, max_memory, quantized=True)
        extra = {"quantization_config": quantized, "attn_implementation": attn_implementation}
        # Weights of another shape are not an error here, because check_loading reports them by name.
        loaded = _auto_class(config).from_pretrained(
            where,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_dtype_option(DTYPES.get(dtype, AUTO)),
            **{key: value for key, value in extra.items() if value is not None},
            **places,
            **options,
        )
        model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
        unused = check_loading(model, info, name)
        processor = _processor(where, config, family_spec, options)
    limit_pixels(processor, family_spec.view, name, min_pixels, max_pixels)
    if unused:
        _LOG.warning(
            "model '%s': its checkpoint has %d tensors that the model does not use, for example %s; all weights of the "
            "model were loaded",
            name,
            len(unused),
            unused[0],
        )
    on_device = model if places else _move(model, device, name)
    return _wrap(on_device, processor, family_spec, name, validate=validate, revision=commit, unused=unused)


def wrap_lvlm(
    model: Any,
    processor: Any,
    *,
    spec: FamilySpec | str | Path | None = None,
    name: str | None = None,
    validate: bool = True,
) -> Lvlm:
    """Wrap a Hugging Face model and processor in memory; see `load_lvlm`.

    A model inside ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile`` is unwrapped.

    Parameters
    ----------
    model
        A Hugging Face model, with weights.
    processor
        Its processor, with a tokenizer, an image processor and an image token.
    spec, validate
        As in `load_lvlm`.
    name
        Name in results and messages; by default the model's class.

    Raises
    ------
    ModelError
        If the model has no configuration or no weights, the processor no image token, its family is unknown, or a check fails.

    Examples
    --------
    >>> import groundscope as gs
    >>> loaded = gs.load_lvlm("tiny")
    >>> gs.wrap_lvlm(loaded.hf, loaded.processor, name="mine").name
    'mine'
    """
    return _wrap(model, processor, _read_spec(spec), name, validate=validate)


def _wrap(
    model: Any,
    processor: Any,
    spec: FamilySpec | None,
    name: str | None,
    *,
    validate: bool,
    revision: str | None = None,
    unused: tuple[str, ...] = (),
) -> Lvlm:
    model = unwrap(model)
    if not isinstance(model, torch.nn.Module):
        msg = f"the model is a {type(model).__name__}; give a Hugging Face model with a config"
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
        msg = f"{type(model).__name__} has no config.model_type; give a Hugging Face model"
        raise ModelError(msg)
    lvlm = Lvlm(
        model,
        processor,
        spec or family(model_type, model),
        name or type(model).__name__,
        revision=revision,
        unused_weights=unused,
    )
    check_placeholder(lvlm)
    if validate:
        scene = sample_scene(generator(TEST, 0, 0), "check", count=2)
        validate_once(lvlm, lvlm.encode(as_example(scene, existence(scene, "apple"), "check")))
    return lvlm


def outline_lvlm(
    source: str | Path,
    *,
    spec: FamilySpec | str | Path | None = None,
    dtype: str | torch.dtype = AUTO,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Lvlm:
    """Return a model without weights, on the device ``meta``: it encodes examples and locates sites, and cannot run.

    Parameters
    ----------
    source, spec, dtype, min_pixels, max_pixels, revision, cache_dir, trust_remote_code
        As in `load_lvlm`. Weights of a folder are not read, and those of a Hugging Face id are not downloaded.

    Raises
    ------
    ModelError
        If there is no such model, its configuration or processor cannot be read, or its family is unknown.

    Examples
    --------
    >>> from lvlm.loading import outline_lvlm
    >>> outline_lvlm("tiny").n_layers
    6
    """
    dtype = dtype_name(dtype)
    name, folder = str(source), folder_of(source)
    local = folder.is_dir()
    where = str(folder) if local else name
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    options |= {k: v for k, v in (("revision", revision), ("cache_dir", cache_dir)) if v is not None}
    with _explained(f"the configuration of model '{name}' cannot be read", "", folder, options):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(where, **options)
        check_sizes(config, name)
        family_spec = _read_spec(spec) or family(config.model_type)
        with torch.device("meta"):
            model = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        processor = _processor(where, config, family_spec, options)
        check_pixels(processor, name)
    limit_pixels(processor, family_spec.view, name, min_pixels, max_pixels)
    dtype = checkpoint_dtype(source, config) if dtype == AUTO else dtype
    return Lvlm(model.to(DTYPES.get(dtype, torch.float32)), processor, family_spec, name)


def has_weights(source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> bool:
    """Whether a model's weights are in its folder or in the Hugging Face cache.

    Examples
    --------
    >>> from lvlm.loading import has_weights
    >>> has_weights("tiny")
    True
    """
    folder = folder_of(source)
    if folder.is_dir():
        return any(p.suffix in _WEIGHT_SUFFIXES for p in folder.iterdir())
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(str(source), name, cache_dir, revision) for name in _WEIGHT_NAMES)
    return any(isinstance(path, str) for path in cached)


def _check_source(name: str, folder: Path, revision: str | None) -> None:
    """Raise `ModelError` for a folder that is not a model's, and for a revision of a folder."""
    if not folder.is_dir():
        if name in EMBEDDED or name.startswith((".", "/", "~")):
            msg = f"no model folder '{folder}'"
            raise ModelError(msg)
        return
    if not (folder / "config.json").is_file():
        msg = f"model folder '{folder}' has no config.json, so it is not in Hugging Face layout"
        raise ModelError(msg)
    if revision is not None:
        msg = f"revision='{revision}': '{folder}' is a folder, and only a Hugging Face id has revisions"
        raise ModelError(msg)


@contextmanager
def _quiet_transformers(*, local: bool) -> Iterator[None]:
    """Suppress transformers' log messages while the context is open, and for a folder its progress bars."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if local:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _explained(problem: str, name: str, folder: Path, options: dict[str, Any]) -> Iterator[None]:
    """Raise errors of transformers as `ModelError` with a damaged file or the error's first line, and a hint if `name` is set."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # readers of damaged files raise many classes
        hint = ""
        if name and not options["trust_remote_code"] and "trust_remote_code" in str(error):
            hint = "; it runs with trust_remote_code=True: read its code first"
        elif name and not folder.is_dir():
            hint = (
                f"; there is no such folder, and the embedded models are {', '.join(EMBEDDED)}{nearest(name, EMBEDDED)}"
            )
        msg = f"{problem}: {_damaged_file(folder) or _first_line(error)}{hint}"
        raise ModelError(msg) from error


def _read_spec(spec: FamilySpec | str | Path | None) -> FamilySpec | None:
    return FamilySpec.from_yaml(spec) if isinstance(spec, str | Path) else spec


def _auto_class(config: Any) -> Any:
    """Return the transformers class that loads a model: the one that its own code names, or the class for such models."""
    import transformers

    own = getattr(config, "auto_map", None) or {}
    names = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
    in_own_code = next((name for name in names if name in own), None)
    # The first exists from release 4.45 on, the second up to release 4.
    return getattr(transformers, in_own_code or next(name for name in names if hasattr(transformers, name)))


def _dtype_option(dtype: torch.dtype | str) -> dict[str, torch.dtype | str]:
    """Return the argument of ``from_pretrained`` for the dtype, by its name in this release of transformers."""
    import transformers

    return {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": dtype}


def _processor(where: str, config: Any, spec: FamilySpec, options: dict[str, Any]) -> Any:
    """Return the processor of a folder or id; if it cannot be loaded, one assembled from tokenizer and image processor."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(where, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        processor = None  # it needs torchvision, or the folder has only a tokenizer and an image processor
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "tokenizer"):
        processor = assemble(where, config, spec, options)
    return processor


def _move(model: Any, device: str, name: str) -> Any:
    """Move a model to a device; raises `ModelError` if it does not fit."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        msg = f"model '{name}' cannot be moved to device '{device}': {_first_line(error)}"
        raise ModelError(msg) from error


def _damaged_file(folder: Path) -> str | None:
    """Return the problem of the first settings file in a folder that is not a JSON object; None if there is no such file."""
    for file in (folder / name for name in _SETTINGS):
        try:
            if not file.exists() or isinstance(json.loads(read_text(file)), dict):
                continue
            return f"'{file}' must be a JSON object"
        except DataError as error:
            return str(error)
        except (OSError, ValueError, RecursionError) as error:
            return f"'{file}' is not JSON ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
