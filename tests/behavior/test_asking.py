"""Benchmarks asked of a local model: images and questions in, released answer files out; resumed, and never asked twice."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import groundscope as gs
from behavior.benchmarks import BENCHMARKS, ask, benchmark_data, write_requests
from behavior.benchmarks.asking import PROMPT
from groundscope.core.errors import GroundscopeError
from lvlm import Lvlm
from mitigation.training_free.controls.rules import YesNoBias

TASKS = ("existence", "OCR", "code_reasoning", "numerical_calculation")


@pytest.fixture(scope="module")
def tiny() -> Lvlm:
    return gs.load_lvlm("tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images under the names that releases use: plain, by number, in folders, and of COCO."""
    folder = tmp_path_factory.mktemp("images")
    scenes = gs.scenes.dataset(10)
    names = ["1.jpg", "2.jpg", "maps/0.png", "COCO_val2014_000000000007.jpg", "3.jpg"]
    for name, example in zip(names, scenes[:: len(scenes) // 5], strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        example.image.load().save(folder / name)
    return folder


@pytest.fixture
def mme(tmp_path: Path) -> Path:
    """The folder of MME's release: a folder a subtask, an image and two questions each."""
    scenes = gs.scenes.dataset(10)
    for task in TASKS:
        (tmp_path / "mme" / task).mkdir(parents=True)
        for i in range(5):
            scenes[7 * i].image.load().save(tmp_path / "mme" / task / f"{i}.png")
            lines = [f"Is there a dog in the image? {task} {i}\tYes", f"Is there a cat in the image? {task} {i}\tNo"]
            (tmp_path / "mme" / task / f"{i}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "mme"


@dataclass(frozen=True)
class Counter:
    """A mitigation that changes nothing, and counts the questions under it."""

    encoded: list[str] = field(default_factory=list)
    name: str = "counter"
    stop_after: int | None = None

    @property
    def parameters(self) -> Mapping[str, Any]:
        return {}

    @contextmanager
    def applied(self, model: Lvlm) -> Iterator[None]:
        from lvlm.active_interventions import mark_observer

        def count(module: Any, args: Any, kwargs: Any) -> None:
            self.encoded.append("")
            if self.stop_after is not None and len(self.encoded) > self.stop_after:
                raise KeyboardInterrupt

        hook = model.hf.register_forward_pre_hook(mark_observer(count), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def mme_score(rows: list[tuple[str, str]]) -> float:
    """The released rule over (truth, response) in pairs."""
    right = []
    for truth, response in rows:
        start = response.lower()[:4]
        right.append(("yes" if "yes" in start else "no" if "no" in start else "other") == truth.lower())
    pairs = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    return 100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs)


def test_mme_with_cognition_is_asked_and_scored(tiny: Lvlm, mme: Path, tmp_path: Path) -> None:
    result = ask(tiny, "mme", tmp_path / "answers", mme, {"questions": mme})
    plain = gs.answer(tiny, benchmark_data("mme", mme, {"questions": mme}), generate=True).texts
    expected = {}
    for task in ("existence", "ocr", "code_reasoning", "numerical_calculation"):
        lines = [line.split("\t") for line in (tmp_path / "answers" / f"{task}.txt").read_text().splitlines()]
        assert [(i, t) for i, _, t, _ in lines] == [(f"{k}.png", t) for k in range(5) for t in ("Yes", "No")]
        assert [line[3] for line in lines] == [plain[f"{task}/{n}"] for n in range(1, 11)]
        expected[task] = mme_score([(truth, response) for _, _, truth, response in lines])
    score = result.score()
    assert score.figures["perception"].value == pytest.approx(expected["existence"] + expected["ocr"], abs=1e-9)
    reasoning = expected["code_reasoning"] + expected["numerical_calculation"]
    assert score.figures["cognition"].value == pytest.approx(reasoning, abs=1e-9)
    assert score.answers.cost.answers == 40
    assert score.answers.cost.forwards
    card = gs.evaluation_card({"tiny": {"MME": score}})
    assert card.row("tiny", "MME", "no level").n == 20
    assert card.facts[0].forwards_per_answer is not None


def test_levels_of_a_benchmark_may_be_missing(mme: Path) -> None:
    data = benchmark_data("mme", mme, {"questions": mme}, limit=3)
    levels = {e.kind: e.level for e in data}
    assert levels == {"existence": "object", "ocr": "attribute", "code_reasoning": None, "numerical_calculation": None}
    assert len(data) == 4 * 4  # the second question about the second image is included
    assert not any(e.labels for e in data if e.level is None)


def test_an_interrupted_benchmark_resumes_and_a_finished_one_is_not_asked_again(
    tiny: Lvlm, mme: Path, tmp_path: Path
) -> None:
    same: dict[str, Any] = {"images": mme, "files": {"questions": mme}, "batch_size": 1, "max_new_tokens": 2}
    whole = Counter()
    first = ask(tiny, "mme", tmp_path / "whole", mitigation=whole, **same)
    with pytest.raises(KeyboardInterrupt):
        ask(tiny, "mme", tmp_path / "part", mitigation=Counter(stop_after=len(whole.encoded) // 2), **same)
    journal = tmp_path / "part.asked.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"answers": {"existence/1": "torn')
    assert not (tmp_path / "part").exists()
    later = Counter()
    resumed = ask(tiny, "mme", tmp_path / "part", mitigation=later, **same)
    assert 0 < resumed.reused < 40
    assert len(later.encoded) < len(whole.encoded)
    assert resumed.cost.forwards == first.cost.forwards
    assert [a.text for a in resumed.answers] == [a.text for a in first.answers]
    none = Counter()
    third = ask(tiny, "mme", tmp_path / "part", mitigation=none, **same)
    assert (third.reused, none.encoded) == (40, [])
    for name in ("existence", "code_reasoning"):
        files = [(tmp_path / folder / f"{name}.txt").read_bytes() for folder in ("whole", "part")]
        assert files[0] == files[1]


def test_other_answers_are_not_mixed(tiny: Lvlm, mme: Path, tmp_path: Path) -> None:
    existence = mme / "existence"
    same: dict[str, Any] = {"images": existence, "files": {"questions": mme}, "limit": 2, "max_new_tokens": 1}
    same["images"] = mme
    ask(tiny, "mme", tmp_path / "a", **same)
    with pytest.raises(GroundscopeError, match=r"a\.asked\.jsonl' has answers with another max_new_tokens; choose"):
        ask(tiny, "mme", tmp_path / "a", **(same | {"max_new_tokens": 2}))
    with pytest.raises(GroundscopeError, match="another mitigation"):
        ask(tiny, "mme", tmp_path / "a", mitigation=Counter(), **same)
    with pytest.raises(GroundscopeError, match="another data"):
        ask(tiny, "mme", tmp_path / "a", **(same | {"suffix": "Answer yes or no."}))
    (tmp_path / "b.asked.jsonl").write_text("{}\n")
    with pytest.raises(GroundscopeError, match="is not a journal of answers"):
        ask(tiny, "mme", tmp_path / "b", **same)


def test_a_mitigation_acts_on_the_answers(tiny: Lvlm, mme: Path, tmp_path: Path) -> None:
    yes = YesNoBias(bias=1e3)
    files = {"questions": mme}
    result = ask(tiny, "mme", tmp_path / "yes", mme, files, mitigation=yes, limit=2)
    assert {a.text.strip().lower()[:3] for a in result.answers} == {"yes"}
    assert result.provenance["mitigation"][0] == yes.name


RELEASES: dict[str, Any] = {
    "pope": [{"question_id": 1, "image": "1.jpg", "text": "Is there a cat in the image?", "label": "yes"},
             {"question_id": 2, "image": "2.jpg", "text": "Is there a dog in the image?", "label": "no"}],
    "amber": [{"id": 5, "image": "1.jpg", "query": "Is there a cat?"}, {"id": 6, "image": "2.jpg", "query": "Is it?"}],
    "amber_generative": [{"id": 1, "image": "1.jpg", "query": "Describe this image."}],
    "hallusion": [
        {"category": "VS", "subcategory": "map", "visual_input": str(f), "set_id": "0", "figure_id": str(f),
         "question_id": "0", "question": "Is it?", "gt_answer": "1", "gt_answer_details": "It is.",
         "filename": "./maps/0.png" if f else None}
        for f in (0, 1)
    ],
    "mmvp": "Index,Question,Options,Correct Answer\n1,Is it?,(a) Open (b) Closed,(a)\n2,Is it?,(a) Open (b) Closed,(b)\n",
    "r_bench": [{"question_id": 0, "image": "1.jpg", "text": "Is the man on the horse?", "label": "yes"}],
    "reefknot": [
        {"image_id": "1", "query_prompt": "Is the cup on it?", "label": "yes", "type": "Yes/No", "relation_type": "perception"},
        {"image_id": "1", "query_prompt": "Is the cup off it?", "label": "no", "type": "Yes/No", "relation_type": "perception"},
    ],
    "crpe": [{"question_id": i, "image": "1.jpg", "text": "Which? A. a B. b C. c D. d", "category": "exist",
              "correct_option": "A"} for i in range(4)],
    "object_halbench": [{"image_id": 7, "question": "Describe it."}, {"image_id": 7, "question": "What is here?"}],
    "mmhal": [{"question": "What?", "gt_answer": "A cat.", "image_id": "1", "image_content": ["cat"]}],
    "llava_bench": [{"question_id": 0, "image": "1.jpg", "text": "What?", "category": "conv"}],
    "gavie": [{"image_id": "1", "question": "Describe it."}, {"image_id": "1", "question": "What is it?"}],
    "cceval": {"1": {"gt_objs": ["cat"], "image_id": "1"}, "2": {"gt_objs": ["dog"], "image_id": "2"}},
    "haelm": [{"image": "1.jpg", "reference caption": ["A cat."]}],
    "lvlm_ehub": [{"question_id": 1, "image": "1.jpg", "text": "Is there a cat in the image?", "label": "yes"}],
    "chair": {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
              "annotations": [{"image_id": 1, "category_id": 17}], "categories": [{"id": 17, "name": "cat"}]},
}  # fmt: skip
"""Smallest question files of the releases."""
OTHERS: dict[str, dict[str, Any]] = {
    "amber": {"annotations": [{"id": 5, "type": "discriminative-hallucination", "truth": "yes"},
                              {"id": 6, "type": "discriminative-hallucination", "truth": "no"}]},
    "amber_generative": {"annotations": [{"id": 1, "type": "generative", "truth": ["cat"], "hallu": ["dog"]}],
                         "relation": {"cat": ["kitten"], "dog": ["puppy"]}, "safe_words": "thing"},
    "gavie": {"regions": {"1": [{"caption": "a cat", "bbox": [1, 2, 3, 4]}]}},
}  # fmt: skip
VARIANTS = {"hallusion": "own", "mmvp": "letter", "amber_generative": "vocabulary"}


def release_files(folder: Path, name: str) -> dict[str, Path]:
    contents = {"questions": RELEASES[name], **OTHERS.get(name, {})}
    files = {}
    for role, content in contents.items():
        path = folder / f"{role}.{'csv' if name == 'mmvp' else 'txt' if isinstance(content, str) else 'json'}"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        files[role] = path
    return files


@pytest.mark.parametrize("name", list(RELEASES))
def test_every_benchmark_can_be_asked_and_its_answer_file_is_read(
    tiny: Lvlm, images: Path, tmp_path: Path, name: str
) -> None:
    files = release_files(tmp_path, name)
    answers = tmp_path / "answers.jsonl"
    same: dict[str, Any] = {"images": images, "files": files, "prompt": "Describe the image."}
    result = ask(tiny, name, answers, **same, max_new_tokens=3)
    texts = {a.question.id: a.text for a in result.answers}
    assert texts == gs.answer(tiny, benchmark_data(name, **same), generate=True, max_new_tokens=3).texts
    judge = BENCHMARKS[name].judge
    if judge is not None and name not in VARIANTS and name != "reefknot":
        others = {k: v for k, v in files.items() if not (BENCHMARKS[name].answers_hold_questions and k == "questions")}
        assert write_requests(name, tmp_path / "requests.jsonl", answers, files=others) == len(texts)
        return
    score = result.score(variant=VARIANTS.get(name))
    assert {a.id: a.text for a in score.answers.answers} == texts
    assert score.missing == 0


def test_every_benchmark_is_in_the_table_of_this_test() -> None:
    assert set(BENCHMARKS) - set(RELEASES) == {"mme", "llava_pope", "naturalbench"}


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (112, 112), color).save(file, format="PNG")
    return file.getvalue()


def test_naturalbench_with_its_images_inside_is_asked_as_from_a_folder(tiny: Lvlm, tmp_path: Path) -> None:
    colors = [["red", "blue"], ["green", "white"]]
    rows: list[dict[str, Any]] = []
    for number, pair in enumerate(colors):
        row: dict[str, Any] = {"Index": number, "Question_Type": "yes_no"}
        for i, color in enumerate(pair):
            row |= {f"Image_{i}": {"bytes": png(color), "path": None}, f"Question_{i}": f"Is there a {color} dog?"}
            row |= {f"Image_{i}_Question_{q}": "Yes" if i == q else "No" for q in range(2)}
            (tmp_path / f"{number}_{i}.png").write_bytes(png(color))
        rows.append(row)
    inside = tmp_path / "naturalbench.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), inside)
    names = [r | {f"Image_{i}": f"{n}_{i}.png" for i in range(2)} for n, r in enumerate(rows)]
    outside = tmp_path / "naturalbench.jsonl"
    outside.write_text("".join(json.dumps(row) + "\n" for row in names))
    data = benchmark_data("naturalbench", inside, {"questions": inside})
    assert [e.image.load().getpixel((0, 0)) for e in data[:4]] == [(255, 0, 0), (0, 0, 255)] * 2
    assert data[0].question == "Is there a red dog?Please answer Yes or No."
    assert len({e.group for e in data}) == 4
    assert len(benchmark_data("naturalbench", inside, {"questions": inside}, limit=1)) < len(data)
    scores = []
    for images, file in ((inside, inside), (tmp_path, outside)):
        asked = ask(
            tiny, "naturalbench", tmp_path / f"{file.suffix}.jsonl", images, {"questions": file}, max_new_tokens=3
        )
        scores.append(asked.score())
    assert [a.text for a in scores[0].answers.answers] == [a.text for a in scores[1].answers.answers]
    assert scores[0].figures == scores[1].figures
    with pytest.raises(GroundscopeError, match=r"has the images inside; give images=.*naturalbench\.parquet"):
        benchmark_data("naturalbench", tmp_path, {"questions": inside})
    with pytest.raises(GroundscopeError, match="is not inside the file; give the folder"):
        benchmark_data("naturalbench", outside, {"questions": outside})
    with pytest.raises(GroundscopeError, match="is a file: give the folder of the images"):
        benchmark_data("naturalbench", outside, {"questions": inside})


TABLES = {
    "crpe": "index\timage\tquestion\tcategory\tcorrect_option\n",
    "r_bench": "question_id\timage\ttext\tlabel\n",
    "llava_bench": "question_id\timage\ttext\tcategory\n",
    "mmhal": "index\timage\tquestion\tgt_answer\n",
    "mmvp": "Index\timage\tQuestion\tOptions\tCorrect Answer\n",
}
"""Header of a table with base64 images, as VLMEvalKit distributes benchmarks; the other cells of a row are `CELLS`."""
CELLS = {"question": "Which? A. a B. b C. c D. d", "text": "Is it on it?", "category": "exist", "correct_option": "A",
         "label": "yes", "gt_answer": "A cat.", "Question": "Is it?", "Options": "(a) Open (b) Closed",
         "Correct Answer": "(a)"}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_with_base64_images_are_read(tmp_path: Path, name: str) -> None:
    header = TABLES[name].rstrip("\n").split("\t")
    # Cells are as long as those of photographs; the last row names the index of the first, as in VLMEvalKit.
    images = [base64.b64encode(png(color) + bytes(300)).decode() for color in ("red", "blue", "lime")]
    lines = [
        "\t".join(str(i) if column.lower() in {"index", "question_id"} else image if column == "image" else CELLS[column]
                  for column in header)
        for i, image in enumerate([*images, "0" if "index" in header else images[0]])
    ]  # fmt: skip
    path = tmp_path / "table.tsv"
    path.write_text("\n".join([TABLES[name].rstrip("\n"), *lines]) + "\n")
    data = benchmark_data(name, path, {"questions": path})
    pixels = [e.image.load().getpixel((0, 0)) for e in data]
    assert pixels == [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0)]
    assert data[0].group == data[3].group or name == "mmvp"


def test_questions_without_text_ask_for_a_description(images: Path, tmp_path: Path) -> None:
    data = benchmark_data("chair", images, release_files(tmp_path, "chair"), suffix="Be brief.")
    assert [e.request for e in data] == [f"{PROMPT}\nBe brief."] * 2
    hallusion = benchmark_data("hallusion", images, release_files(tmp_path, "hallusion"))
    assert [len(e.images) for e in hallusion] == [0, 1]


def test_objects_of_r_bench_are_marked_in_image_and_text(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    row = {"question_id": 0, "image": "a.png", "text": "Is the man on the horse?", "label": "yes", "subject": "Man",
           "object": "Horse", "sub_box": [0.1, 0.1, 0.5, 0.5], "obj_box": [0.4, 0.4, 0.9, 0.9]}  # fmt: skip
    path = tmp_path / "instance-level.json"
    path.write_text(json.dumps([row]))
    (example,) = benchmark_data("r_bench", tmp_path, {"questions": path})
    assert example.question == "Is the man in red bounding box on the horse in green bounding box?"
    pixels = example.image.load()
    assert (pixels.getpixel((10, 30)), pixels.getpixel((90, 60))) == ((255, 0, 0), (0, 128, 0))
    path.write_text(json.dumps([row | {"sub_box": [1, 2]}]))
    with pytest.raises(GroundscopeError, match="'sub_box' and 'obj_box' must be four shares"):
        benchmark_data("r_bench", tmp_path, {"questions": path})


def test_wrong_input_is_refused_before_the_model_is_asked(tiny: Lvlm, images: Path, tmp_path: Path) -> None:
    files = release_files(tmp_path, "amber")
    with pytest.raises(GroundscopeError, match="to ask a model, give the file 'questions': query_discriminative"):
        ask(tiny, "amber", tmp_path / "a", images, {"annotations": files["annotations"]})
    with pytest.raises(GroundscopeError, match=r"image folder '.*' does not exist"):
        ask(tiny, "amber", tmp_path / "a", tmp_path / "nowhere", files)
    with pytest.raises(GroundscopeError, match="limit=0"):
        ask(tiny, "amber", tmp_path / "a", images, files, limit=0)
    with pytest.raises(GroundscopeError, match="batch_size=0"):
        ask(tiny, "amber", tmp_path / "a", images, files, batch_size=0)
    files["questions"].write_text(json.dumps([{"id": 5, "image": "lost.jpg", "query": "Is it?"}]))
    with pytest.raises(GroundscopeError, match=r"field 'image': .*lost\.jpg"):
        ask(tiny, "amber", tmp_path / "a", images, files)
    assert not list(tmp_path.glob("*.asked.jsonl"))
