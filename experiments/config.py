"""The options of a run as dataclasses: names, meanings and default values. `groundscope help` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from omegaconf import MISSING

STAGES = (
    "examples", "trace", "probe", "patch", "steer", "evaluate", "diagnose", "representation", "export", "arena", "card", "report"
)  # fmt: skip
"""The stages of a run, in order."""
DEFAULT_STAGES = ("examples", "trace", "probe", "patch", "steer", "evaluate", "diagnose", "export", "report")
"""The stages that run if none are chosen: all but representation and behavior (`groundscope representation`), the comparison of
many methods (`groundscope arena`) and the evaluation card (`groundscope card`)."""
SWEEPS = "sweeps"
"""Folder of all sweeps, below the root folder of runs."""
RENAMED: Mapping[str, str] = MappingProxyType({"probe.penalties": "probe.C"})
"""Option name in earlier versions to its present name."""
SYNONYMS: Mapping[str, str] = MappingProxyType({"data.path": "data.questions"})
"""Second name of an option to its name."""
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"patch.tokens": MappingProxyType({"suffix": "suffix:all"})}
)
"""Option to its values in earlier versions, with their present spelling."""
ADDED: Mapping[str, Any] = MappingProxyType(
    {
        "data.canvas": None,
        "data.suffix": None,
        "data.system": None,
        "data.choices": None,
        "trace.layers": None,
        "trace.heads": None,
        "trace.reduce": {},
        "trace.unembedding": False,
        "evaluate.generate": False,
        "evaluate.score": "first_token",
        "evaluate.parser": None,
        "evaluate.match": "normalized",
        "evaluate.max_new_tokens": 40,
        "evaluate.temperature": 0.0,
        "evaluate.top_p": 1.0,
        "evaluate.seeds": 1,
        "evaluate.seed": 0,
    }
)
"""Option that a later version added to the value at which a stage makes what earlier versions made: with it, the key of the
stage does not contain the option."""
OneOrMore = Any
"""One text, or a list of texts."""


@dataclass
class ModelConfig:
    """The model under study."""

    path: str = MISSING
    """`tiny`, `tiny-unbiased`, a Hugging Face id, or a folder with a model in Hugging Face layout."""
    twin: str | None = "tiny-unbiased"
    """A control model that answers the same questions, for example one without the prior; null for no control model."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`, or `auto` for the number type of the checkpoint (float32 for the embedded models)."""
    device: str = "cpu"
    """Device on which it runs, as torch names it."""
    device_map: Any = None
    """How to distribute the model over GPUs, main memory and disk: `auto`, `balanced`, `sequential`, or modules with devices."""
    max_memory: Any = None
    """Largest memory of each device of a distributed model, such as `{0: 20GiB, cpu: 60GiB}`."""
    quantization_config: Any = None
    """`8bit` or `4bit` (bitsandbytes), or the settings of another quantization of transformers."""
    attn_implementation: str | None = None
    """`sdpa` or `eager`, or another name of transformers; null for the family's."""
    min_pixels: int | None = None
    """Smallest number of pixels to which an image is resized (Qwen-VL, GLM-4V); null for the model's own."""
    max_pixels: int | None = None
    """Largest number of pixels to which an image is resized (Qwen-VL, GLM-4V); null for the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; null for its main branch."""
    cache_dir: str | None = None
    """Folder of downloaded files; null for that of Hugging Face."""
    trust_remote_code: bool = False
    """Allow the model folder to run its own code."""
    validate: bool = True
    """At load, verify with forward passes of one example that tensors are where the family says; false saves time."""
    spec: str | None = None
    """A YAML file with the fields of `lvlm.FamilySpec`, for a model of an unknown family; null for a known family."""


@dataclass
class DataConfig:
    """Images and questions, in two parts without common images: discovery (probes, patching, steering, diagnosis) and test."""

    source: OneOrMore = "scenes"
    """`scenes` for icon scenes with exact truth, a format of `concepts.loaders.LOADERS`, with images on disk, or a function of
    yours that returns a `ConceptDataset`: `package.module:function` or `folder/file.py:function`. A list has the format of each
    file of `questions`; `data=[pope,gqa]` means the same."""
    n_images: int = 300
    """Discovery scenes."""
    seed: int = 0
    """Seed of the discovery scenes."""
    test_images: int = 500
    """Test scenes."""
    test_seed: int = 1000
    """Seed of the test scenes; must differ from `seed`."""
    questions: OneOrMore = None
    """File with questions or annotations, the first argument of the loader, or a list of files that are used together, such as
    the nine files of POPE (all sources except `scenes`); `data.path` means the same."""
    images: OneOrMore = None
    """Folder with its images, or a list with the folder of each file (all sources except `scenes`; `data=table` needs none)."""
    test_share: float = 0.5
    """Share of the images in the test part (all sources except `scenes`): 1 evaluates all of them and leaves none for the other
    stages, 0 tests none."""
    limit: int | None = None
    """Read at most this many questions of each file, or images if the loader makes the questions (not of `scenes`)."""
    canvas: str | None = None
    """Put all images on one canvas of `WxH` pixels, such as `672x672`, resized in proportion: for models whose number of image
    tokens depends on the size of the image, so that all pairs of images can be patched (all sources except `scenes`)."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Further files and options of the loader, by the names of its arguments: `+data.loader.captions=FILE` for `source=coco`.
    With several formats, by format: `+data.loader.coco.captions=FILE`."""
    suffix: str | None = None
    """Text of the prompt after each question, on a new line unless it begins with a space:
    "data.suffix='Answer the question using a single word or phrase.'"; null for none."""
    system: str | None = None
    """System prompt; null for that of the model's chat template, if it has one."""
    choices: list[str] | None = None
    """Candidate answers of the questions that have none, such as `[red,green,blue]`; null leaves these questions open: the model
    writes its answer."""


@dataclass
class TraceConfig:
    """Which activations are stored."""

    sites: list[str] = field(
        default_factory=lambda: ["resid_post", "z", "mlp_out", "vision.resid_post", "projector.out"]
    )
    """Components of the decoder, or of a named stack, or single sites such as `decoder.L3.z`."""
    tokens: list[str] = field(default_factory=lambda: ["last", "image:mean", "object:mean"])
    """Token selections."""
    layers: list[int] | None = None
    """Layers of the decoder of which components are stored, such as `[8,16,24]`; null for all. Sites of a single layer, of the
    vision tower and of the projector are stored as `sites` says."""
    heads: list[int] | None = None
    """Heads of the decoder of which `z`, `q` and `pattern` are stored in each traced layer, such as `[2,7]`; null for all."""
    reduce: dict[str, Any] = field(default_factory=dict)
    """Values of each token that are stored instead of its activations, by reduction (`margin`, `log_p`, `rank`, or a registered
    one), each with `tokens` and its options: `+trace.reduce.rank.tokens=image:all +trace.reduce.rank.words=[dog,cat]`,
    `+trace.reduce.margin.tokens=image:all +trace.reduce.margin.probes=runs/a/probes/decoder.resid_post@image-mean`."""
    unembedding: bool = False
    """Also store the final norm and the unembedding, in the type of the model's weights, for the logit lens on the store
    (`probes.logit_lens`)."""
    batch_size: int = 32
    """Examples per forward pass."""
    shard_size: int = 512
    """Examples per file of the store."""
    dtype: str = "float32"
    """Type of the stored activations: `float32`, `float16` or `bfloat16`."""
    on_error: str = "raise"
    """What an image that cannot be read does: `raise` stops the stage, `skip` leaves out, names and counts its examples."""
    shards: int = 1
    """Number of parts in which the data are traced, each by a separate process."""
    shard: int | None = None
    """Trace only this part, counted from 0; null traces everything (`shards=1`) or completes the store from finished parts."""


@dataclass
class ProbeConfig:
    """Linear probes."""

    concepts: list[str] | None = None
    """Concepts to decode, or label columns of a table; null for `named` of each level, every attribute and relation, and every
    label of your own with enough examples."""
    C: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0])
    """Inverse regularization strengths, as in scikit-learn; cross-validation on the training part chooses one."""
    folds: int = 4
    """Folds of this cross-validation; all examples of an image are in one fold."""
    test_fraction: float = 0.3
    """Share of the images held out for the reported accuracy."""
    seed: int = 0
    """Seed of splits and label shuffles."""


@dataclass
class PatchConfig:
    """Activation patching of heads on counterfactual pairs."""

    kinds: list[str] | None = None
    """Kinds of pairs; kinds that the data do not allow are left out and named. Null for object, color and relation, and for
    photographs with such questions also attribute and action."""
    methods: list[str] | None = None
    """How photographs are changed: `given`, `swap`, `mirror`, `recolor`, `inpaint`, or a registered method; for each kind, the
    first of these that makes enough pairs. Null for all, in this order."""
    placebo: bool = True
    """Also patch as many placebo pairs of photographs of each kind: the same change, after which the true answer is the same."""
    pairs: int = 60
    """Largest number of pairs of each kind."""
    tokens: str = "last"
    """Where a head is patched: `last`, or `suffix:all` for every token after the image."""
    min_effect: float = 0.5
    """Pairs whose two images change the log-odds of the answer by less than this are excluded and counted."""
    top: int = 6
    """Number of heads that the next stages use."""


@dataclass
class SteerConfig:
    """The correction."""

    method: str = "discriminant"
    """How the vector is made: an entry of `mitigation.mitigations`."""
    doubt: float = 0.5
    """`method=discriminant`: log-odds of yes at the decision threshold; above 0, weak evidence counts as no."""
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0])
    """Strengths to choose from, on the discovery images."""
    decay: float = 0.5
    """Factor on the strength for each token that the model generates; 1 for a constant strength. With 0.5 one-word answers are
    corrected fully, and captions hardly change. Only for vectors at `last+generated`."""
    site: str | None = None
    """Where the vector acts: a site such as `decoder.L3.resid_post`, a component of every layer such as `mlp_out`, or a head
    (`L4.H7`); null for the heads that patching selects, or the method's own places."""
    positions: str | None = None
    """Token positions that the vector acts on, such as `all` or `last+generated`; null for the method's own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of single methods: `+steer.options.phrase=apple` (`project_away`), `+steer.options.example=ID` (`vsv`),
    `+steer.options.optimize.passes=12` (arguments of `derive.optimize`)."""
    compare: bool = True
    """Also evaluate all other methods at the same strengths, for the figure of the report."""
    max_drop: float = 0.015
    """Largest loss that a strength may cause in answers to questions: recall on present objects, accuracy on neutral questions,
    on typical colors, and on all other questions. It is the limit of these guards."""
    guards: dict[str, float | None] = field(
        default_factory=lambda: {
            "yes_ratio": 0.03,
            "chair": 0.01,
            "caption_recall": 0.02,
            "caption_length": 0.1,
            "plain_text": 0.2,
        }
    )
    """Limit of each other guard, an entry of `mitigation.guards`: the largest loss that a strength may cause, as a share; null
    for no limit. `yes_ratio`: share of yes beyond the true share; `chair`: invented objects in captions (CHAIR_i);
    `caption_recall`; `caption_length`: relative change of words; `plain_text`: tokens of a text without an image that change."""
    exportable: list[str] = field(default_factory=lambda: ["optimize"])
    """Methods that are tried for the vector that other software can hold: one addition per place at every token. The best within
    all guards is written in every format that can hold it; [] for none."""
    exportable_sites: list[str] = field(default_factory=list)
    """Sites at which each of them is tried; [] for the residual stream of the two layers in the middle of the decoder. Several
    sites of one vector are separated by commas."""
    exportable_positions: str = "all"
    """Token positions of that vector: `all`, or `generated:all`, which only vLLM supports."""
    exportable_strengths: list[float] = field(default_factory=lambda: [0.6, 0.8, 1.0])
    """Strengths to choose from."""


@dataclass
class EvaluateConfig:
    """Answers on the test images."""

    conditions: list[str] | None = None
    """Conditions: `before`, `after` (steered), `exportable` (steered with the exportable vector), names of controls, `twin`; null
    for all. `before` is always included."""
    batch_size: int = 64
    """Questions per forward pass."""
    generate: bool = False
    """Let the model write its answers and parse them, as the released evaluations do; false compares the log-probabilities of the
    candidate answers, which needs one forward pass and no parser."""
    score: str = "first_token"
    """How the candidate answers of a question are compared: `first_token` (one forward pass), or by their whole texts, which
    candidates with the same first token need: `text` (log-probability; prefers short texts) or `text_per_token` (divided by the
    number of tokens), one forward pass for each candidate."""
    parser: str | None = None
    """Rule that reads yes or no from a written answer, by its name in `behavior.PARSERS`; null for that of the benchmark."""
    match: str = "normalized"
    """How the answer to an open question is compared with the true answer and its aliases: `normalized` (case, punctuation,
    articles and number words do not count), `contains` (the answer is among the words) or `exact`."""
    max_new_tokens: int = 40
    """Largest number of tokens of a written answer or a caption."""
    temperature: float = 0.0
    """Temperature at which written answers and captions are drawn; 0 takes the most likely token."""
    top_p: float = 1.0
    """Probability of the most likely tokens among which the next one is drawn."""
    seeds: int = 1
    """Number of drawn answers to each question; figures are over all of them."""
    seed: int = 0
    """Seed of the draws."""
    synonyms: str | None = None
    """CHAIR for `data=coco`: file with the synonyms of each category, such as `data/synonyms.txt` of the released scorer, which
    published results use; null for `behavior.chair.COCO_SYNONYMS`."""


@dataclass
class RepresentationConfig:
    """Alignment, information along the path, and ceilings of behavior (`groundscope representation`)."""

    images: int = 300
    """Largest number of images that are compared with their captions or questions."""
    rows: int = 400
    """Largest number of questions whose information is measured along the path."""
    families: list[str] = field(default_factory=lambda: ["linear", "nonlinear"])
    """Readers of information (`probes.predictive_families`); the nonlinear one takes most of the time."""
    permutations: int = 199
    """Permutations of the nulls of alignment: 0 for none, or at least 199."""
    resamples: int = 200
    """Draws of the bootstrap of the regression, at least 20; that of the ceilings has ten times as many."""
    batch_size: int = 32
    """Examples per forward pass."""
    seed: int = 0
    """Seed of folds, permutations and draws."""


@dataclass
class ArenaConfig:
    """Training-free methods compared on the test images (`groundscope arena`)."""

    methods: list[str] | None = None
    """Methods by name, with parameters that differ from the published ones: `[vcd,"pai(alpha=0.3)",discriminant]`. Methods of
    `steer.method` are steering vectors; those that act on heads need the stages `trace` and `patch`. null for every method that
    needs neither. Controls are always added."""
    answer_files: dict[str, str] = field(default_factory=dict)
    """Further rows from files with answers to the test questions, by name: methods that need third models, another checkpoint, or
    other images: `+arena.answer_files.Woodpecker=FILE`."""
    regimes: list[str] = field(default_factory=lambda: ["greedy"])
    """How answers are written: `greedy`, and `sampling` for methods whose release samples."""
    seeds: int = 5
    """Number of sampled answers to each question."""
    temperature: float = 1.0
    """Temperature of sampled answers."""
    top_p: float = 1.0
    """Probability of the most likely tokens among which a sampled token is drawn."""
    generate: bool = False
    """Let the model write greedy answers to questions with candidates too, and parse them."""
    parser: str | None = None
    """Rule that reads yes or no from a written answer; null for that of the benchmark."""
    max_new_tokens: int = 40
    """Largest number of tokens of an answer."""
    batch_size: int = 32
    """Questions per forward pass."""
    limit: int | None = None
    """Number of test images; null for all."""
    choose: bool = False
    """Also choose the main parameter of each method on discovery images, among equally many values for every method."""
    choose_images: int = 60
    """Number of discovery images on which parameters are chosen; vectors are derived from the others."""
    max_drop: float = 0.02
    """Largest increase of denied present objects at which a parameter may be chosen, as a share of the questions."""
    price_questions: int = 2
    """Questions on which seconds and rows of the decoder are measured, alone on the machine; 0 measures no price."""
    price_tokens: int = 64
    """Tokens of an answer whose price is measured."""


@dataclass
class CardConfig:
    """The evaluation card: what models get wrong, how often and how severely (`groundscope card`)."""

    conditions: list[str] | None = None
    """Conditions of `evaluate` that are models of the card; null for `before`, `after` and `twin`, as far as the run has them; []
    for none, and then stage `evaluate` is not needed."""
    answer_files: dict[str, str] = field(default_factory=dict)
    """Further models, such as closed ones, by files with their answers to the test questions:
    `+card.answer_files.GPT-4o=FILE`."""
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    """Answers to benchmarks in their released files: for each `model`, `benchmark` (a name of `behavior.benchmarks`), `answers`,
    and optionally `label`, `files`, `verdicts`, `variant`, `format`, `by_place`: `card.benchmarks=[{model: GPT-4o, benchmark:
    r_bench, answers: FILE, files: {questions: FILE}}]`. With `images` instead of `answers`, the model of the run is asked the
    questions (and writes `answers`, if that is given too): `card.benchmarks=[{benchmark: mme, images: FOLDER, files: {questions:
    FOLDER}}]`, optionally with `mitigation` (`'vcd(alpha=0.5)'`, or the file of a steering vector), `limit`, `prompt`, `suffix`,
    `max_new_tokens`."""
    profiles: list[str] | None = None
    """Severity profiles by name: `driving`, `medical`, `assistive`; `uniform` is always included. null for all."""
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    """Your own profiles: name to weights from 0 to 1 by kind of question or by level:
    `+card.weights.mine={existence: 1, color: 0.2}`."""
    reworded: int = 60
    """Largest number of questions that the models of the run are asked in other words and other forms of answer, evenly over
    levels and splits; 0 for none."""
    rewordings: list[str] | None = None
    """Rules by their names in `behavior.card.REWORDINGS`; null for all."""
    safety: dict[str, str] = field(default_factory=dict)
    """Model to a file of verdicts `id, refused, unsafe` on its answers."""
    differences: str = "first"
    """Which models are compared: `first` (every other with the first) or `all`."""


@dataclass
class ReportConfig:
    """The HTML report."""

    title: str | None = None
    """Title; null for a title with the name of the model."""


@dataclass
class SweepConfig:
    """Several runs from one command (`-m`). Their folders, table and report are in `<root>/sweeps/<name>`."""

    name: str | None = None
    """Name of the sweep; null for the name of the run."""
    by: list[str] = field(default_factory=list)
    """Options that differ between the jobs and name their folders; set by the command."""


@dataclass
class ExportConfig:
    """Files with the correction for other software."""

    formats: list[str] | None = None
    """Formats by their names in `mitigation.exports`: `safetensors`, `baked`, `gguf`, `steering_vectors`,
    `vllm`, `vti`. By default every format that can hold the vector, or else the exportable one, is written."""
    convert: bool = False
    """Map head directions through the output projection for formats without heads; the card states where this is approximate."""


@dataclass
class DiagnoseConfig:
    """Causes of wrong answers."""

    limit: int = 60
    """Largest number of wrong answers to diagnose, balanced over levels and splits; 0 for none."""
    sources: bool = True
    """Also split the log-odds of the true answer against the model's into lean, form, knowledge and image."""
    compared: int = 60
    """Number of right answers that are split for comparison, balanced over levels and splits."""
    seed: int = 0
    """Seed of the choice of answers, the split of the probes, and the choice of other nouns in questions."""
    shown: int = 6
    """Number of wrong answers that the report shows in detail."""
    fit: str | None = None
    """Format of other data that the probes are fitted to, such as `coco` for questions of `pope`, which have no boxes; images
    that the run's own data have are left out. Null for the run's own data."""
    fit_questions: str | None = None
    """File of these data, as `data.questions`."""
    fit_images: str | None = None
    """Folder with their images."""
    fit_limit: int | None = None
    """Read at most this many questions or images of them, as `data.limit`."""
    fit_loader: dict[str, Any] = field(default_factory=dict)
    """Further files and options of their loader, as `data.loader`."""


@dataclass
class RunConfig:
    """One run: `groundscope key=value …`; nested options are written `data.n_images=200`."""

    name: str = "default"
    """Name of the run; its folder is `<root>/<name>`."""
    root: str = "runs"
    """Folder of all runs."""
    stages: list[str] = field(default_factory=lambda: list(DEFAULT_STAGES))
    """Stages to run; the stages that they need must have run before."""
    force: bool = False
    """Run stages again even if nothing changed."""
    threads: int | None = None
    """CPU threads; null for the number that torch chooses."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    steer: SteerConfig = field(default_factory=SteerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    arena: ArenaConfig = field(default_factory=ArenaConfig)
    card: CardConfig = field(default_factory=CardConfig)
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
    options = {k: v for k, v in options.items() if f"{group}.{k}" not in ADDED or ADDED[f"{group}.{k}"] != v}
    former = {new: old.partition(".")[2] for old, new in RENAMED.items()}
    result = {former.get(f"{group}.{name}", name): value for name, value in options.items()}
    for name, value in result.items():
        spellings = {new: old for old, new in RENAMED_VALUES.get(f"{group}.{name}", {}).items()}
        if isinstance(value, str):
            result[name] = spellings.get(value, value)
    return result
