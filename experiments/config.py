"""Every option of a run, as dataclasses: what they are called, what they mean, what they are by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from omegaconf import MISSING

STAGES = ("examples", "trace", "probe", "patch", "steer", "evaluate", "diagnose", "export", "report")
"""The stages of a run, in order."""
SWEEPS = "sweeps"
"""Folder of all sweeps, below the root folder of runs."""
RENAMED: Mapping[str, str] = MappingProxyType({"probe.penalties": "probe.C"})
"""Option name in earlier versions to its present name."""
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"patch.tokens": MappingProxyType({"suffix": "suffix:all"})}
)
"""Option to its values in earlier versions, with their present spelling."""


@dataclass
class ModelConfig:
    """The model under study."""

    path: str = MISSING
    """`tiny`, `tiny-unbiased`, a Hugging Face id, or a folder in its layout."""
    twin: str | None = "tiny-unbiased"
    """A control model asked the same questions (one without the prior, say); none for null."""
    dtype: str = "float32"
    """`float32`, `bfloat16` or `float16`."""
    device: str = "cpu"
    """Where it runs, as torch names devices."""
    trust_remote_code: bool = False
    """Let the model folder's own code run."""
    validate: bool = True
    """Prove at load, with forwards of one example, that tensors are where the family says; false saves that time."""
    spec: str | None = None
    """A yaml file with the fields of `lvlm.FamilySpec`, for a family that is not in the table; null for one that is."""


@dataclass
class DataConfig:
    """What the model is shown. Two parts that share no image: one to find things on, one to test them on."""

    source: str = "scenes"
    """`scenes`: icon scenes with exact truth; else a format of `concepts.loaders.LOADERS`, with images on disk."""
    n_images: int = 300
    """Scenes to find things on."""
    seed: int = 0
    """Seed of those scenes."""
    test_images: int = 500
    """Scenes to test on."""
    test_seed: int = 1000
    """Seed of those; must differ from `seed`."""
    questions: str | None = None
    """File of questions or annotations, the loader's first argument (all sources but `scenes`)."""
    images: str | None = None
    """Folder of its images (all sources but `scenes`)."""
    test_share: float = 0.5
    """Share of the images kept for testing (all sources but `scenes`)."""
    limit: int | None = None
    """Read at most this many questions, or images where the loader makes the questions (all sources but `scenes`)."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Further files and options of the loader, by its own names: `+data.loader.captions=FILE` for `source=coco`."""


@dataclass
class TraceConfig:
    """Which activations are kept."""

    sites: list[str] = field(
        default_factory=lambda: ["resid_post", "z", "mlp_out", "vision.resid_post", "projector.out"]
    )
    """Components of the decoder, or of a named stack, or single sites such as `decoder.L3.z`."""
    tokens: list[str] = field(default_factory=lambda: ["last", "image:mean", "object:mean"])
    """Token selections."""
    batch_size: int = 32
    """Examples a forward."""
    dtype: str = "float32"
    """How they are stored: `float32`, `float16` or `bfloat16`."""
    on_error: str = "raise"
    """`raise` or `skip`: whether an image that cannot be read ends the stage, or its examples are left out, named and counted."""
    shards: int = 1
    """Parts in which the data are traced, each by a process of its own."""
    shard: int | None = None
    """Trace this part alone, from 0; null traces all (`shards=1`) or makes the finished parts whole."""


@dataclass
class ProbeConfig:
    """Linear probes."""

    concepts: list[str] | None = None
    """Concepts to decode; by default the asked one of each level, and every attribute and relation with enough examples."""
    C: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0])
    """Inverse regularization strengths, as in scikit-learn; cross-validation on the training part chooses one."""
    folds: int = 4
    """Folds of that choice; images are never divided."""
    test_fraction: float = 0.3
    """Share of the images held out for the reported accuracy."""
    seed: int = 0
    """Seed of splits and label shuffles."""


@dataclass
class PatchConfig:
    """Activation patching of heads on counterfactual pairs."""

    kinds: list[str] = field(default_factory=lambda: ["object", "color", "relation"])
    """Kinds of pairs; those the data cannot make are left out and named."""
    pairs: int = 60
    """Pairs of each kind at most."""
    tokens: str = "last"
    """Where a head is patched: `last`, or `suffix:all` for every token after the image."""
    min_effect: float = 0.5
    """Pairs whose two images change the answer's log-odds by less than this are left out, and counted."""
    top: int = 6
    """Heads to carry on with."""


@dataclass
class SteerConfig:
    """The correction."""

    method: str = "discriminant"
    """How the vector is made: an entry of `mitigation.mitigations`."""
    doubt: float = 0.5
    """`method=discriminant`: log-odds of yes that count as neither yes nor no; above 0, weak evidence speaks for no."""
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0])
    """Strengths to choose from on a validation part of the images things are found on."""
    decay: float = 0.5
    """Factor by which the correction gets weaker with every token that the model writes; 1 leaves it as strong. Half leaves
    answers of a word as they are corrected, and captions as they were."""
    compare: bool = True
    """Try every other method at the same strengths as well, for the report's plot."""
    max_drop: float = 0.015
    """Largest loss of accuracy on neutral questions, and on typical colors, that a strength may cost there; data without such
    questions (POPE): of recall on present objects."""


@dataclass
class EvaluateConfig:
    """What the model says on images that nothing was found on."""

    conditions: list[str] | None = None
    """Answer under these: `before`, `after` (corrected), controls by their names, `twin`; by default all. `before` always is."""
    batch_size: int = 64
    """Questions a forward."""
    synonyms: str | None = None
    """CHAIR on `data=coco`: file with the words for each category, such as `data/synonyms.txt` of the released scorer, which
    published figures use; null for the list of `behavior.chair.COCO_SYNONYMS`."""


@dataclass
class ReportConfig:
    """The page that tells what was found."""

    title: str | None = None
    """Its title; by default it names the model."""


@dataclass
class SweepConfig:
    """Several runs from one command (`-m`). Their folders, table and page lie in `<root>/sweeps/<name>`."""

    name: str | None = None
    """Name of the sweep; by default that of the run."""
    by: list[str] = field(default_factory=list)
    """Options that the jobs differ in, which name their folders; filled in by the command."""


@dataclass
class ExportConfig:
    """Files that other code loads the correction from."""

    formats: list[str] | None = None
    """Formats by their names in `mitigation.exports`: `safetensors`, `baked`, `gguf`, `steering_vectors`,
    `vllm`, `vti`. By default every format that can hold the vector is written."""
    convert: bool = False
    """Carry heads through the output projection for formats that know no heads; the card says where that is approximate."""


@dataclass
class DiagnoseConfig:
    """Why answers are wrong."""

    limit: int = 60
    """Wrong answers diagnosed at most, spread over levels and splits; 0 for none."""
    sources: bool = True
    """Also split each of them into image, prompt and prior."""
    compared: int = 60
    """Right answers that are split too, to compare with; spread over levels and splits."""
    seed: int = 0
    """Decides which, the probes' split, and which neutral questions are asked."""
    shown: int = 6
    """Wrong answers told in full in the report."""


@dataclass
class RunConfig:
    """One run: `groundscope key=value …`; nested options are written `data.n_images=200`."""

    name: str = "default"
    """Name of the run; its folder is `<root>/<name>`."""
    root: str = "runs"
    """Folder of all runs."""
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Stages to run; the others must have run before."""
    force: bool = False
    """Run stages again even where nothing changed."""
    threads: int | None = None
    """CPU threads; by default what torch chooses."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    steer: SteerConfig = field(default_factory=SteerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)


def rename_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return nested options with the names and values of earlier versions replaced by the present ones."""
    renamed = {group: dict(values) if isinstance(values, dict) else values for group, values in options.items()}
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        values = renamed.get(group)
        if isinstance(values, dict) and name in values:
            value = values.pop(name)
            values.setdefault(new.partition(".")[2], value)
    for key, spellings in RENAMED_VALUES.items():
        group, _, name = key.partition(".")
        values = renamed.get(group)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            values[name] = spellings.get(values[name], values[name])
    return renamed


def key_options(group: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group as they enter the key of a stage.

    Keys hold the names and values of earlier versions, so that a stage of an earlier version is recognized as unchanged.
    """
    former = {new: old.partition(".")[2] for old, new in RENAMED.items()}
    result = {former.get(f"{group}.{name}", name): value for name, value in options.items()}
    for name, value in result.items():
        spellings = {new: old for old, new in RENAMED_VALUES.get(f"{group}.{name}", {}).items()}
        if isinstance(value, str):
            result[name] = spellings.get(value, value)
    return result
