"""What the stages of a run share: configuration, folder, data, and models that are loaded at their first use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rich.console import Console

from concepts.schema import ConceptDataset
from experiments.config import RunConfig
from experiments.data import describe_data, load_parts
from experiments.run.folder import RunFolder, file_digest
from experiments.run.interrupts import load_torch

if TYPE_CHECKING:
    from activation_store import ActivationStore
    from lvlm import Lvlm

T = TypeVar("T")
ACTIVATIONS = "activations"
"""Folder of the traced activations inside a run."""


def headline(config: RunConfig, folder: Path) -> str:
    """Return model, data and folder of a run in one line."""
    return f"model {config.model.path}, {describe_data(config.data)}, folder {folder}"


@dataclass(frozen=True)
class Context:
    """A run while its stages run."""

    config: RunConfig
    folder: RunFolder
    console: Console
    _computed: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Return what `compute` returned at the first call with this name: a check and its stage read files once."""
        if name not in self._computed:
            self._computed[name] = compute()
        return cast("T", self._computed[name])

    def headline(self) -> str:
        """Return model, data and folder of the run in one line."""
        return headline(self.config, self.folder.path)

    @cached_property
    def parts(self) -> tuple[ConceptDataset, ConceptDataset]:
        """Discovery and test examples; no group is in both.

        Raises
        ------
        ConfigError, DataError
            If the data cannot be loaded or divided.
        """
        return load_parts(self.config.data)

    @property
    def discovery(self) -> ConceptDataset:
        """The examples for probes, patching, derivation and diagnosis."""
        return self.parts[0]

    @property
    def held_out(self) -> ConceptDataset:
        """The examples on which the correction is tested."""
        return self.parts[1]

    @cached_property
    def model(self) -> Lvlm:
        """The model under study."""
        return self._load(self.config.model.path)

    @cached_property
    def outline(self) -> Lvlm:
        """The model under study without its weights, or the model itself if it is already loaded."""
        if "model" in self.__dict__:
            return self.model
        from lvlm.loading import outline_lvlm

        load_torch(self.config.threads)
        m = self.config.model
        return outline_lvlm(
            m.path,
            spec=m.spec,
            dtype=m.dtype,
            min_pixels=m.min_pixels,
            max_pixels=m.max_pixels,
            revision=m.revision,
            cache_dir=m.cache_dir,
            trust_remote_code=m.trust_remote_code,
        )

    @cached_property
    def twin(self) -> Lvlm | None:
        """The control model; None if the configuration names none."""
        return self._load(self.config.model.twin) if self.config.model.twin else None

    @cached_property
    def store(self) -> ActivationStore:
        """The traced activations."""
        from activation_store import ActivationStore

        return ActivationStore(self.folder.path / ACTIVATIONS)

    def _load(self, path: str) -> Lvlm:
        from lvlm import load_lvlm

        load_torch(self.config.threads)
        m = self.config.model
        return load_lvlm(
            path,
            spec=m.spec,
            dtype=m.dtype,
            device=m.device,
            device_map=m.device_map,
            max_memory=m.max_memory,
            quantization_config=m.quantization_config,
            attn_implementation=m.attn_implementation,
            min_pixels=m.min_pixels,
            max_pixels=m.max_pixels,
            revision=m.revision if path == m.path else None,
            cache_dir=m.cache_dir,
            trust_remote_code=m.trust_remote_code,
            validate=m.validate,
        )

    def model_key(self) -> object:
        """Return what identifies the models without loading them: their options and the `fingerprint` of their files."""
        m = self.config.model
        options = {k: v for k, v in asdict(m).items() if k not in _WITHOUT_EFFECT}
        # An option that earlier versions did not have is in the key only if it is set, and `auto` as the type that it means.
        options = {k: v for k, v in options.items() if k not in _ADDED or v is not None}
        if m.dtype == "auto":
            from lvlm.load_options import checkpoint_dtype

            options["dtype"] = checkpoint_dtype(m.path)
        spec = file_digest(Path(m.spec)) if m.spec is not None and Path(m.spec).is_file() else None
        files = fingerprint(m.path, m.revision, m.cache_dir)
        return [options, spec, files, fingerprint(m.twin, None, m.cache_dir) if m.twin else None]

    def has_model_files(self) -> bool:
        """Return whether the files of the models are on this machine."""
        m = self.config.model
        models = ((m.path, m.revision), (m.twin, None))
        return all(fingerprint(name, commit, m.cache_dir) != name for name, commit in models if name)


_WITHOUT_EFFECT = frozenset({"trust_remote_code", "validate", "cache_dir", "max_memory"})
"""Options of a model that change no value: permission to run its code, checks at load, places of files and weights."""
_ADDED = frozenset({"device_map", "quantization_config", "attn_implementation", "min_pixels", "max_pixels", "revision"})
"""Options of a model that earlier versions did not have."""
_LARGE = 1 << 28
"""Size in bytes from which a file is sampled: the digest of a large model takes longer than the trace of a few examples."""
_SMALL = 1 << 20
"""Size in bytes up to which a file is digested at each call."""


def fingerprint(path: str, revision: str | None = None, cache_dir: str | None = None) -> object:
    """Return what identifies the files of a model: a digest of each file of a folder, or the commit of a Hugging Face id.

    Every file of the folder counts, because many of them affect prompts, tokens, pixels or code: chat templates in several
    forms, ``merges.txt``, ``tokenizer.model``, processor and generation configurations, modules with code.
    """
    from lvlm.embedded_models import folder_of
    from lvlm.model_files import deciding_files, resolved_revision

    root = folder_of(path)
    if not root.is_dir():
        commit = resolved_revision(path, revision, cache_dir)
        return [path, commit] if commit else path
    return [[str(file.relative_to(root)), _file_key(file)] for file in deciding_files(root)]


def _file_key(file: Path) -> object:
    """Return the digest of a file; for a large file its size, its modification time and a digest of a sample."""
    about = file.stat()
    if about.st_size < _SMALL:
        return file_digest(file)
    if about.st_size < _LARGE:  # every stage of a run needs it
        return _known_digest(str(file), about.st_size, about.st_mtime_ns)
    sample = hashlib.sha256()
    with file.open("rb") as content:
        for at in range(0, about.st_size, about.st_size // 256):
            content.seek(at)
            sample.update(content.read(4096))
    return [about.st_size, about.st_mtime_ns, sample.hexdigest()]


@lru_cache(4096)
def _known_digest(file: str, _size: int, _changed: int) -> str:
    return file_digest(Path(file))
