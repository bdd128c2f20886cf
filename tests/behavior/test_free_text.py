"""Descriptions in free text: the parser against annotated sentences, files of spans, agreement, verdicts and markup."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

import groundscope as gs
from behavior.free_text.markup import description_html
from concepts.annotated_object import AnnotatedObject, Box
from groundscope.core.errors import DataError

SENTENCES = Path(__file__).resolve().parents[1] / "toys" / "free_text" / "sentences.jsonl"
GOALS = {"object": 0.9, "attribute": 0.8, "relation": 0.7}


def half(name: str) -> list[gs.Description]:
    """Return the annotated sentences of one half.

    The held-out half was annotated before the parser was written, and neither read nor used until it was finished.
    """
    records = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    ids = {record["id"] for record in records if record["half"] == name}
    return [row for row in gs.read_descriptions(SENTENCES) if row.id in ids]


def heads(row: gs.Description, level: str) -> Counter[tuple[object, ...]]:
    """Return the spans of a level by the places of their last words: a reference for the default comparison."""
    ends = [tuple(end for _, end in span.arguments) for span in row.spans if span.level == level]
    spans = [span for span in row.spans if span.level == level]
    return Counter((span.end if level == "object" else span.place, *e) for span, e in zip(spans, ends, strict=True))


def test_the_halves_have_150_sentences_each_of_different_images() -> None:
    records = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    assert Counter(record["half"] for record in records) == {"development": 150, "held_out": 150}
    assert len({record["image"] for record in records}) == len({record["text"] for record in records}) == 300
    assert len({re.sub(r".*_(.*)\.json", r"\1", record["source"]) for record in records}) == 5


@pytest.mark.parametrize("name", ["development", "held_out"])
def test_the_parser_reaches_its_goals_on_both_halves(name: str) -> None:
    reference = half(name)
    parsed = [gs.parse_description(row.text, id=row.id) for row in reference]
    agreement = gs.compare_spans(reference, parsed)
    for row in agreement.levels:
        assert row.f1.value >= GOALS[row.level], row


def test_equal_spans_are_counted_as_a_multiset_intersection_counts_them() -> None:
    reference = half("held_out")
    parsed = [gs.parse_description(row.text, id=row.id) for row in reference]
    exact = gs.compare_spans(reference, parsed, exact=True)
    for level in GOALS:
        both = sum(
            (Counter((s.place, s.arguments) for s in a.spans if s.level == level)
             & Counter((s.place, s.arguments) for s in b.spans if s.level == level)).total()
            for a, b in zip(reference, parsed, strict=True)
        )  # fmt: skip
        row = exact.level(level)
        total = sum(sum(s.level == level for s in d.spans) for d in (*reference, *parsed))
        assert (row.both, row.f1.value) == (both, pytest.approx(2 * both / total))
        assert both <= gs.compare_spans(reference, parsed).level(level).both
    objects = sum((heads(a, "object") & heads(b, "object")).total() for a, b in zip(reference, parsed, strict=True))
    assert gs.compare_spans(reference, parsed).level("object").both == objects


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("", []),
        ("   \n", []),
        ("no dogs", []),
        ("There is no dog, but two red cars.", ["cars", "two cars", "red cars"]),
        ("A man riding a wave on a surfboard.", ["man", "wave", "surfboard", "man riding wave", "man on surfboard"]),
        ("On the table, there is a cup.", ["table", "cup", "cup On table"]),
        ("A woman who is holding a cat.", ["woman", "cat", "woman holding cat"]),
        ("The sky is clear and blue.", ["sky", "clear sky", "blue sky"]),
        ("He is wearing a hat.", ["hat"]),
        ("A slice of pizza and a glass of red wine", ["pizza", "glass", "red wine", "glass of red wine"]),
        ("A dog.A cat. A bus", ["dog", "cat", "bus"]),
        ("Ein Hund auf der Straße 😀 and a dog", ["dog"]),
    ],
)
def test_what_is_marked(text: str, phrases: list[str]) -> None:
    row = gs.parse_description(text)
    assert list(row.phrases()) == phrases
    assert all(row.text[s.start : s.end] == s.words(row.text) != "" for s in row.spans)


def test_names_of_the_data_are_objects_too() -> None:
    text = "A shiny gizmo on a table."
    assert "gizmo" not in gs.parse_description(text).phrases()
    assert "gizmo on table" in gs.parse_description(text, nouns=["gizmos"]).phrases()


def test_files_of_spans_are_read_back_and_state_line_and_problem(tmp_path: Path) -> None:
    rows = half("development")[:20]
    gs.write_descriptions(rows, tmp_path / "spans.jsonl")
    assert gs.read_descriptions(tmp_path / "spans.jsonl") == tuple(rows)
    with pytest.raises(DataError, match="'1' is there twice"):
        gs.write_descriptions([gs.Description("1", "a"), gs.Description("1", "b")], tmp_path / "twice.jsonl")
    good = {"id": "1", "text": "a dog", "spans": [{"start": 2, "end": 5, "level": "object"}]}

    def refuse(match: str, **changes: object) -> None:
        file = tmp_path / "bad.jsonl"
        file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "id": "2", **changes}) + "\n")
        with pytest.raises(DataError, match=match) as error:
            gs.read_descriptions(file)
        assert "line 2" in str(error.value)

    refuse("did you mean 'object'|choose from", spans=[{"start": 2, "end": 5, "level": "objects"}])
    refuse("ends after the text", spans=[{"start": 2, "end": 50, "level": "object"}])
    refuse("no object span", spans=[{"start": 0, "end": 1, "level": "attribute", "arguments": [[2, 5]]}])
    refuse("1 arguments, not 0", spans=[{"start": 0, "end": 1, "level": "attribute"}])
    refuse("unknown verdict 'bad'", spans=[{"start": 2, "end": 5, "level": "object", "verdict": "bad"}])
    refuse("whole numbers", spans=[{"start": 2.5, "end": 5, "level": "object"}])
    refuse("'text' must be text", text=3)
    (tmp_path / "same.jsonl").write_text((json.dumps(good) + "\n") * 2)
    with pytest.raises(DataError, match="'1' is there twice"):
        gs.read_descriptions(tmp_path / "same.jsonl")


def test_agreement_on_verdicts_is_cohens_kappa() -> None:
    verdicts = [("right", "right"), ("wrong", "right"), ("unknown", "unknown"), ("wrong", "wrong"), ("right", "wrong")]
    text = "cat dog cow bus car"

    def marked(side: int) -> gs.Description:
        return gs.Description(
            "1", text, tuple(gs.Span(4 * i, 4 * i + 3, "object", (), v[side]) for i, v in enumerate(verdicts))
        )

    row = gs.compare_spans([marked(0)], [marked(1)]).level("object")
    assert row.kappa == pytest.approx(cohen_kappa_score(*zip(*verdicts, strict=True)))
    assert row.verdicts.value == pytest.approx(0.6)
    with pytest.raises(DataError, match="another text"):
        gs.compare_spans([marked(0)], [gs.Description("1", "cat")])
    with pytest.raises(DataError, match="one marking only"):
        gs.compare_spans([marked(0)], [])


IMAGE = gs.ImageAnnotation(
    "1",
    (
        AnnotatedObject("a", "cat", Box(0, 0, 10, 10), {"color": "black", "size": "small"}),
        AnnotatedObject("b", "table", Box(20, 0, 40, 10), {"wooden": "wooden", "material": "wooden"}),
        AnnotatedObject("c", "chair", Box(5, 0, 25, 10)),
        AnnotatedObject("d", "chair", Box(60, 0, 65, 10)),
    ),
    absent=("dog", "bus"),
    relations=(("cat", "under", "table", True), ("cat", "behind", "chair", False)),
)


@pytest.mark.parametrize(
    ("text", "phrase", "verdict"),
    [
        ("A kitten.", "kitten", "right"),
        ("A dining table.", "dining table", "right"),
        ("A puppy.", "puppy", "wrong"),
        ("A school bus.", "school bus", "wrong"),
        ("A tree.", "tree", "unknown"),
        ("A black cat.", "black cat", "right"),
        ("A white cat.", "white cat", "wrong"),
        ("A big cat.", "big cat", "wrong"),
        ("A wet cat.", "wet cat", "unknown"),
        ("A metal table.", "metal table", "wrong"),
        ("A red chair.", "red chair", "unknown"),
        ("A red dog.", "red dog", "unknown"),
        ("Two chairs.", "Two chairs", "right"),
        ("Three chairs.", "Three chairs", "wrong"),
        ("A cat under a table.", "cat under table", "right"),
        ("A cat on top of a table.", "cat on top of table", "wrong"),
        ("A cat behind a chair.", "cat behind chair", "wrong"),
        ("A cat near a table.", "cat near table", "unknown"),
        ("A cat to the left of a table.", "cat to the left of table", "right"),
        ("A cat to the right of a table.", "cat to the right of table", "wrong"),
        ("A cat to the left of a chair.", "cat to the left of chair", "unknown"),
        ("A dog under a table.", "dog under table", "unknown"),
    ],
)
def test_verdicts_by_hand(text: str, phrase: str, verdict: str) -> None:
    row = gs.judge_description(gs.parse_description(text), IMAGE)
    assert {row.phrase(span): span.verdict for span in row.spans}[phrase] == verdict


def test_rates_are_shares_of_judged_spans_and_unknown_is_left_out() -> None:
    texts = {"x": "A black cat and a dog under a tree.", "y": "A white cat."}
    scores = gs.score_descriptions(texts, {"x": IMAGE, "y": IMAGE, "z": IMAGE})
    objects, attributes = scores.level("object"), scores.level("attribute")
    assert objects.wrong_of_judged.value == pytest.approx(1 / 3)  # cat, dog, cat; the tree is unknown
    assert objects.descriptions_with_wrong.value == 0.5
    assert objects.unknown.value == pytest.approx(1 / 4)
    assert objects.recall.value == pytest.approx(2 / 6)  # one of cat, table, chair, twice
    assert attributes.wrong_of_judged.value == 0.5
    assert scores.frame()["right"].sum() + scores.frame()["wrong"].sum() + scores.frame()["unknown"].sum() == sum(
        len(row.spans) for row in scores.descriptions
    )
    judged = scores.descriptions[0].spans[0]
    corrected = gs.Description("x", texts["x"], (gs.Span(*judged.place, "object", (), "unknown", "a person"),))
    assert gs.score_descriptions([corrected], {"x": IMAGE}).descriptions[0].spans[0].reason == "a person"


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(DataError, match="no descriptions to score"):
        gs.score_descriptions({}, {})
    with pytest.raises(DataError, match="description 'b': no annotation"):
        gs.score_descriptions({"b": "A cat."}, {"x": IMAGE})
    with pytest.raises(DataError, match="'x' has two descriptions"):
        gs.score_descriptions([gs.Description("x", "a"), gs.Description("x", "b")], {"x": IMAGE})
    with pytest.raises(DataError, match="must be text, not int"):
        gs.parse_description(3)  # type: ignore[arg-type]


def test_true_captions_of_scenes_have_no_wrong_span_and_false_ones_have() -> None:
    data = gs.scenes.dataset(40)
    annotations = gs.image_annotations(data)
    captions = {e.group: e.answer for e in data.where(kind="caption")}
    true = gs.score_descriptions(captions, annotations)
    assert [row.wrong_of_judged.value for row in true.levels[:2]] == [0, 0]
    assert true.level("object").recall.value == 1
    colors = {"red": "blue", "blue": "red", "green": "purple", "purple": "green", "yellow": "green", "orange": "blue"}
    changed = {k: re.sub("|".join(colors), lambda m: colors[m[0]], text) for k, text in captions.items()}
    assert gs.score_descriptions(changed, annotations).level("attribute").wrong_of_judged.value > 0.9


def test_markup_escapes_text_and_marks_levels_by_more_than_color() -> None:
    text = '<b> "red" dog & cat'
    row = gs.Description(
        "1", text, (gs.Span(10, 13, "object", (), "wrong", "<x>"), gs.Span(5, 8, "attribute", ((10, 13),), "unknown"))
    )
    html = description_html(row)
    assert re.sub(r"<[^>]*>", "", html) == "&lt;b&gt; &quot;red&quot; dog &amp; cat"
    assert 'class="object wrong"' in html
    assert 'class="attribute unknown"' in html
    assert "<b>" not in html
    assert "<x>" not in html
