"""Benchmarks that need a judge model: write requests for the judge, read and score its verdicts.

This module calls no judge. `write_requests` writes one JSON line per answer for any judge, a person or a model;
`read_verdicts` reads one JSON line per verdict and scores them. It is the general form, for answers to any questions; the
files of a benchmark's own release, and of its judge, are read by `behavior.benchmarks`, which shares its rules with it. The
instructions paraphrase what each benchmark asks its judge to rate; figures are comparable with published ones only with the
benchmark's own prompt and judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from behavior.benchmarks.mmhal import read_rating
from behavior.benchmarks.rates import average, raw_mean
from behavior.result import BehaviorResult
from concepts.reading.record import Record, is_text
from concepts.reading.records import read_json_records
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.files import write_whole
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, estimate, ratio
from groundscope.core.text import format_count

VARIANTS = ("release", "judged_only")
"""Treatment of an unreadable verdict: as in the benchmark's release, or excluded."""


@dataclass(frozen=True)
class Item:
    """One answer to be judged.

    Examples
    --------
    >>> from behavior.judge_files import Item
    >>> item = Item("q1", "What is on the table?", "A cup.", reference="A cup and a book.", image_content="table, cup, book")
    >>> item.reference
    'A cup and a book.'
    """

    id: str
    question: str
    answer: str
    """What the model wrote."""
    reference: str = ""
    """A correct answer, by a person or another model."""
    image_content: str = ""
    """Description of the image, for judges that do not see it."""
    kind: str = ""
    """Kind of the question; figures are also computed for each kind."""
    group: str = ""
    """The image; if empty, the item's id is used."""


@dataclass(frozen=True)
class Verdict:
    """A judge's ratings of one answer.

    Examples
    --------
    >>> from behavior.judge_files import Item, Verdict
    >>> Verdict(Item("q1", "What is on the table?", "A cup."), {"rating": 4.0}).values["rating"]
    4.0
    """

    item: Item
    values: Mapping[str, float]


@dataclass(frozen=True)
class JudgedResult:
    """Figures of a judged benchmark, with 95 % intervals clustered by image.

    Examples
    --------
    >>> from behavior.judge_files import JudgedResult
    >>> from groundscope.core.statistics import Estimate
    >>> result = JudgedResult("mmhal", {"score": Estimate(3.5, 3.0, 4.0, 96)}, kinds={}, unjudged=0)
    >>> result.figures["score"].value
    3.5
    """

    benchmark: str
    figures: Mapping[str, Estimate]
    kinds: Mapping[str, Mapping[str, Estimate]]
    """The figures by kind of question, if the requests name kinds."""
    unjudged: int
    """Answers whose verdict is null or whose reply is unreadable. They are excluded from the figures, except in
    MMHal-Bench under variant ``release``, which rates them 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", MappingProxyType(dict(self.figures)))
        object.__setattr__(self, "kinds", MappingProxyType(dict(self.kinds)))


@dataclass(frozen=True)
class Benchmark:
    """A judged benchmark: the fields of its verdicts, and the figures computed from them.

    Examples
    --------
    >>> from behavior.judge_files import BENCHMARKS
    >>> mmhal = BENCHMARKS["mmhal"]
    >>> dict(mmhal.values), mmhal.needs
    ({'rating': (0, 6)}, ('reference', 'image_content'))
    """

    source: str
    instruction: str
    values: Mapping[str, tuple[float, float]]
    """Fields of a verdict with their lowest and highest value."""
    needs: tuple[str, ...]
    """Fields of an item that must not be empty."""
    figures: Callable[[Sequence[Verdict]], dict[str, Estimate]]
    parts: Mapping[str, str] = field(default_factory=dict)
    """Field of a verdict to another field that is its upper bound."""
    optional: tuple[str, ...] = ()
    """Fields of a verdict that may be missing: all of them, and in every verdict."""
    accepted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Field to a wider accepted scale, because judges do not always stay within the requested scale."""
    unreadable: Mapping[str, float] | None = None
    """Values that the release assigns to an answer without a readable verdict; None if it excludes the answer."""
    read_reply: Callable[[str], dict[str, float] | None] | None = None
    """Function that parses the judge's reply as the release does; returns None for an unreadable reply."""


def items_of(answers: BehaviorResult, image_content: Mapping[str, str] | None = None) -> tuple[Item, ...]:
    """Return answers as items for a judge; the true answer is the reference.

    Parameters
    ----------
    answers
        Answers with text.
    image_content
        Group to a description of its image.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("q1", "image 1", "neutral", "object", "", "What is on the table?", "A cup.", ())
    >>> answer = gs.Answer(*about, given=None, correct=None, text="A red cup.")
    >>> answers = gs.BehaviorResult((answer,), gs.Cost(None, None, 1))
    >>> (item,) = gs.behavior.judge_files.items_of(answers, {"image 1": "table, cup"})
    >>> item.answer, item.reference, item.image_content
    ('A red cup.', 'A cup.', 'table, cup')
    """
    content = image_content or {}
    return tuple(
        Item(a.id, a.question, a.text or "", a.answer, content.get(a.group, ""), a.kind, a.group)
        for a in answers.answers
    )


def write_requests(path: Path | str, benchmark: str, items: Iterable[Item]) -> int:
    """Write requests to a judge, one JSON object per line; return their number.

    Raises
    ------
    ConfigError
        For an unknown benchmark.
    DataError
        Names the item: for a repeated id, or an empty field that the benchmark requires.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from behavior.judge_files import Item, write_requests
    >>> item = Item("q1", "Describe the image.", "A cup on a table.", image_content="table, cup")
    >>> path = Path(tempfile.mkdtemp()) / "requests.jsonl"
    >>> write_requests(path, "gavie", [item])
    1
    >>> json.loads(path.read_text())["verdict"]
    {'accuracy': '0 to 10', 'relevancy': '0 to 10'}
    """
    spec = _benchmark(benchmark)
    ids: set[str] = set()
    lines: list[str] = []
    for item in items:
        empty = [name for name in spec.needs if not getattr(item, name).strip()]
        if item.id in ids or empty:
            what = f"has no {empty[0]}, which the judge of {benchmark} needs" if empty else "occurs twice"
            fix = "give each item that field" if empty else "give each item another id, such as its number"
            msg = f"item '{item.id}' {what}; {fix}"
            raise DataError(msg)
        ids.add(item.id)
        scale = {name: f"{low:g} to {high:g}" for name, (low, high) in spec.values.items()}
        header = {"id": item.id, "benchmark": benchmark, "instruction": spec.instruction, "verdict": scale}
        lines.append(json.dumps({**header, **_item_fields(item)}, ensure_ascii=False) + "\n")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "".join(lines).encode())
    return len(lines)


def read_verdicts(path: Path | str, requests: Path | str, *, variant: str = "release") -> JudgedResult:
    """Read a judge's verdicts on a file of requests, and score them.

    Parameters
    ----------
    path
        JSON lines or one list: ``id``, and either the benchmark's fields, or ``reply`` with the judge's text
        (MMHal-Bench only), or ``verdict: null`` for an unreadable verdict.
    requests
        The file that `write_requests` wrote.
    variant
        ``release``: an unreadable verdict counts as in the release (MMHal-Bench: rating 0); ``judged_only``: it is
        excluded.

    Raises
    ------
    DataError
        Names the file, record and field: for a verdict without a request, two verdicts on one request, a request
        without a verdict, or a value that is not a number, outside its scale or above its upper bound; also if all
        verdicts are null.
    ConfigError
        For an unknown variant.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from behavior.judge_files import Item, read_verdicts, write_requests
    >>> item = Item("q1", "Describe the image.", "A cup on a table.", image_content="table, cup")
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = write_requests(folder / "requests.jsonl", "gavie", [item])
    >>> _ = (folder / "verdicts.jsonl").write_text('{"id": "q1", "accuracy": 8, "relevancy": 5}')
    >>> result = read_verdicts(folder / "verdicts.jsonl", folder / "requests.jsonl")
    >>> result.figures["accuracy"].value, result.figures["relevancy"].value
    (8.0, 5.0)
    """
    if variant not in VARIANTS:
        msg = f"unknown variant '{variant}'; choose from {', '.join(VARIANTS)}"
        raise ConfigError(msg)
    items: dict[str, Item] = {}
    names: dict[str, None] = {}
    for record in read_json_records(Path(requests)):
        names.setdefault(record.text("benchmark"))
        number = record.identifier("id")
        if number in items:
            msg = f"{record.where}: field 'id': an earlier request already has id '{number}'"
            raise DataError(msg)
        items[number] = _item(record)
    if len(names) != 1:
        msg = f"{requests}: expected requests of one benchmark, found {', '.join(names) or 'none'}"
        raise DataError(msg)
    name = next(iter(names))
    benchmark = _benchmark(name)
    verdicts: dict[str, Verdict | None] = {}
    reference: dict[str, float] | None = None
    for record in read_json_records(Path(path)):
        number = record.identifier("id")
        if number not in items or number in verdicts:
            what = "was already judged" if number in verdicts else "matches no request"
            msg = f"{record.where}: field 'id': '{number}' {what}"
            raise DataError(msg)
        values = _values(record, benchmark)
        if values is not None and reference is not None and values.keys() != reference.keys():
            name = sorted(values.keys() ^ reference.keys())[0]
            msg = (
                f"{record.where}: only some verdicts have the field '{name}'; write it in all verdicts or in no verdict"
            )
            raise DataError(msg)
        reference = values if reference is None else reference
        verdicts[number] = None if values is None else Verdict(items[number], values)
    missing = [number for number in items if number not in verdicts]
    if missing:
        msg = (
            f"{path}: no verdict on '{missing[0]}' ({len(missing)} of {format_count(len(items), 'request')} have no "
            "verdict); write verdict: null for an unreadable verdict"
        )
        raise DataError(msg)
    unjudged = sum(verdict is None for verdict in verdicts.values())
    if unjudged == len(verdicts):
        msg = f"{path}: every verdict is null; at least one must be readable"
        raise DataError(msg)
    fallback = benchmark.unreadable if variant == "release" else None
    judged = [
        verdict or Verdict(items[number], fallback or {})
        for number, verdict in verdicts.items()
        if verdict is not None or fallback is not None
    ]
    kinds = [k for k in dict.fromkeys(v.item.kind for v in judged) if k]
    parts = {kind: benchmark.figures([v for v in judged if v.item.kind == kind]) for kind in kinds}
    return JudgedResult(name, benchmark.figures(judged), parts, unjudged)


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        msg = f"unknown judged benchmark '{name}'; choose from {', '.join(BENCHMARKS)}"
        raise ConfigError(msg)
    return BENCHMARKS[name]


def _item_fields(item: Item) -> dict[str, str]:
    return {f: getattr(item, f) for f in ("question", "answer", "reference", "image_content", "kind", "group")}


def _item(record: Record) -> Item:
    fields: dict[str, str] = {}
    for name in _item_fields(Item("", "", "")):
        value = record.field(name)
        if not is_text(value):
            msg = f"{record.where}: field '{name}' must hold text, not {ascii(value)[:60]}"
            raise DataError(msg)
        fields[name] = value
    return Item(record.identifier("id"), **fields)


def _values(record: Record, benchmark: Benchmark) -> dict[str, float] | None:
    """Return the values of a verdict; None if it is null or its reply is unreadable."""
    if "verdict" in record.values and record.values["verdict"] is None:
        return None
    if benchmark.read_reply is not None and "reply" in record.values:
        other = next((name for name in benchmark.values if name in record.values), None)
        if other is not None:
            msg = f"{record.where}: the verdict may be field 'reply' or field '{other}'; remove one of the two fields"
            raise DataError(msg)
        reply = record.values["reply"]
        if not is_text(reply):
            msg = f"{record.where}: field 'reply' must hold text, not {ascii(reply)[:60]}"
            raise DataError(msg)
        return benchmark.read_reply(reply)
    omitted = set() if any(name in record.values for name in benchmark.optional) else set(benchmark.optional)
    scales = {name: scale for name, scale in benchmark.values.items() if name not in omitted}
    values = dict(zip(scales, record.numbers(*scales), strict=True))
    for name, scale in scales.items():
        low, high = benchmark.accepted.get(name, scale)
        if not low <= values[name] <= high:
            msg = f"{record.where}: field '{name}' is {values[name]:g}, but must be from {low:g} to {high:g}"
            raise DataError(msg)
    for part, whole in benchmark.parts.items():
        if part in values and values[part] > values[whole]:
            msg = (
                f"{record.where}: field '{part}' is {values[part]:g}, but must not exceed '{whole}', {values[whole]:g}"
            )
            raise DataError(msg)
    return values


# -- figures from verdicts --------------------------------------------------------------------------------------------


def _groups(verdicts: Sequence[Verdict]) -> list[str]:
    return [v.item.group or v.item.id for v in verdicts]


def _column(verdicts: Sequence[Verdict], name: str) -> list[float]:
    return [v.values[name] for v in verdicts]


def _mean(verdicts: Sequence[Verdict], name: str, top: float) -> Estimate:
    """Return the mean of a rating from 0 to `top`."""
    return average(_column(verdicts, name), _groups(verdicts), 0, top)


def _mmhal(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    wrong = [value < 3 for value in _column(verdicts, "rating")]
    return {"score": _mean(verdicts, "rating", 6), "hallucination_rate": estimate(wrong, _groups(verdicts))}


def _mmhal_reply(reply: str) -> dict[str, float] | None:
    rating = read_rating(reply)
    return None if rating is None else {"rating": float(rating)}


def _llava_bench(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    own, other = _column(verdicts, "rating"), _column(verdicts, "reference_rating")
    if not sum(other):
        return {"relative_score": Estimate(math.nan, math.nan, math.nan, len(verdicts))}
    low, high = cluster_bootstrap(list(zip(own, other, strict=True)), _groups(verdicts), ratio)
    few = len(set(_groups(verdicts))) < FEW_GROUPS
    return {"relative_score": Estimate(100 * sum(own) / sum(other), 100 * low, 100 * high, len(verdicts), few)}


def _gavie(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    return {name: _mean(verdicts, name, 10) for name in ("accuracy", "relevancy")}


def _cceval(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    mentioned = _column(verdicts, "mentioned")
    hallucinated = _column(verdicts, "hallucinated")
    groups = _groups(verdicts)
    words = [len(v.item.answer.split(" ")) for v in verdicts]  # as in the release: two spaces enclose an empty word
    figures = {
        "chair_i": estimate(hallucinated, groups, mentioned),
        "chair_s": estimate([w > 0 for w in hallucinated], groups),
        "objects_per_caption": raw_mean(mentioned, groups),
        "words_per_caption": raw_mean(words, groups),
    }
    if "covered" in verdicts[0].values:
        figures["coverage"] = estimate(_column(verdicts, "covered"), groups, _column(verdicts, "objects"))
    return figures


_NO_LIMIT = 1e6
BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "mmhal": Benchmark(
            "MMHal-Bench (Sun et al. 2023, arXiv 2309.14525)",
            "Rate the answer to a question about an image from 0 to 6: 6, 5, 4, 3 for an answer without anything that is "
            "not in the image, from very informative with analysis or reasoning, over very and somewhat, to not "
            "informative; 2, 1, 0 likewise for an answer that says something untrue of the image. You are given what is "
            "in the image and a good answer. A guess that is marked as one is not untrue.",
            {"rating": (0, 6)},
            ("reference", "image_content"),
            _mmhal,
            unreadable=MappingProxyType({"rating": 0.0}),
            read_reply=_mmhal_reply,
        ),
        "llava_bench": Benchmark(
            "LLaVA-Bench (Liu et al. 2023, arXiv 2304.08485)",
            "Two answers to a question about an image that is described to you: the reference and another. Rate each from "
            "1 to 10 for how helpful, relevant, accurate and detailed it is, whichever comes first.",
            {"reference_rating": (1, 10), "rating": (1, 10)},
            ("reference", "image_content"),
            _llava_bench,
            accepted=MappingProxyType({"reference_rating": (0, 10), "rating": (0, 10)}),
        ),
        "gavie": Benchmark(
            "GAVIE (Liu et al. 2023, arXiv 2306.14565)",
            "You are told what is in an image, with boxes. Rate the answer from 0 to 10 twice: accuracy, whether it says "
            "nothing that is not in the image; relevancy, whether it does what the instruction asks.",
            {"accuracy": (0, 10), "relevancy": (0, 10)},
            ("image_content",),
            _gavie,
        ),
        "cceval": Benchmark(
            "CCEval (Zhai et al. 2023, arXiv 2310.01779)",
            "Count in a caption the objects it mentions and those of them that are not among the objects of the image; "
            "and of the objects of the image those that the caption covers. Synonyms count as the same object.",
            {
                "mentioned": (0, _NO_LIMIT),
                "hallucinated": (0, _NO_LIMIT),
                "objects": (0, _NO_LIMIT),
                "covered": (0, _NO_LIMIT),
            },
            ("image_content",),
            _cceval,
            MappingProxyType({"hallucinated": "mentioned", "covered": "objects"}),
            optional=("objects", "covered"),
        ),
    }
)
"""Benchmarks by name."""
