"""The embedded models: shipped weights have the accuracy of their cards, and training is reproducible and resumable."""

from __future__ import annotations

import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from concepts import scenes
from concepts.scenes.distributions import UNIFORM
from concepts.scenes.scene import TRAIN, generator, sample_scene
from lvlm import Lvlm, load_lvlm
from lvlm.embedded_models import EMBEDDED, folder_of
from lvlm.tiny import evaluate, train, training_data
from lvlm.tiny.architecture import IMAGE, READING, TEMPLATE, build_model, build_processor, build_tokenizer, vocabulary
from lvlm.tiny.training_data import Lesson
from lvlm.tiny.training_stages import STAGES, Stage


@pytest.fixture(scope="module")
def models() -> dict[str, Lvlm]:
    return {name: load_lvlm(name) for name in EMBEDDED}


@pytest.fixture(scope="module")
def figures(models: dict[str, Lvlm]) -> dict[str, dict[str, float]]:
    return {
        name: {k: v.value for k, v in evaluate.measure(m, n_images=160, seed=4321).items()}
        for name, m in models.items()
    }


def test_both_models_fit_in_the_package() -> None:
    for name in EMBEDDED:
        assert (folder_of(name) / "model.safetensors").stat().st_size < 12e6
        assert (folder_of(name) / "README.md").read_text().startswith("---\n")


def test_both_models_see(figures: dict[str, dict[str, float]]) -> None:
    for name in EMBEDDED:
        assert figures[name]["neutral existence"] > 0.9
        assert figures[name]["neutral attribute"] > 0.9
        assert figures[name]["neutral relation"] > 0.85
        assert figures[name]["typical right"] > 0.93
        assert figures[name]["caption recall"] > 0.8


def test_only_one_of_them_follows_the_prior(figures: dict[str, dict[str, float]]) -> None:
    biased, twin = figures["tiny"], figures["tiny-unbiased"]
    assert 0.1 < biased["conflict wrong by prior"] < 0.5
    assert twin["conflict wrong by prior"] < 0.03
    assert biased["false positives adversarial"] > twin["false positives adversarial"]


def test_the_image_is_read_above_the_lowest_layer(models: dict[str, Lvlm]) -> None:
    data = scenes.dataset(40, 4322, splits=("neutral",))
    table = evaluate.knockout(models["tiny"], data)
    mean = {name: sum(row.values()) / len(row) for name, row in table.items()}
    lost = mean["uncut"] - mean["all"]
    assert lost > 0.3
    assert mean["uncut"] - mean["all above 0"] > 0.75 * lost
    # More than one layer matters, each for some kind of question.
    alone = {name: max(table["uncut"][k] - row[k] for k in row) for name, row in table.items() if "only" in name}
    assert sum(loss >= 0.1 for name, loss in alone.items() if name != "only layer 0") >= 2


def test_a_knockout_does_not_change_the_model(models: dict[str, Lvlm]) -> None:
    model = models["tiny"]
    encoding = model.encode(scenes.dataset(10, 1)[0])
    before = model.logits(encoding.inputs)
    with evaluate.block_image(model, range(model.n_layers), encoding.tokens.image):
        blind = model.logits(encoding.inputs)
    assert torch.equal(model.logits(encoding.inputs), before)
    other = dict(encoding.inputs)
    other["pixel_values"] = -other["pixel_values"]
    with evaluate.block_image(model, range(model.n_layers), encoding.tokens.image):
        torch.testing.assert_close(model.logits(other), blind)
    assert not torch.allclose(model.logits(other), before)


# -- training data ----------------------------------------------------------------------------------------------------


def test_words_are_tokens_and_the_tokenizer_agrees() -> None:
    tokenizer = build_tokenizer()
    assert [tokenizer.convert_tokens_to_ids(w) for w in vocabulary()] == list(range(len(vocabulary())))
    text = TEMPLATE.format(image="", question="Is there an apple in the image?")
    words = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert words == "<s> USER : Is there an apple in the image ? ASSISTANT :".split()
    everything = " ".join(e.question + " " + e.answer for e in scenes.dataset(100, 0))
    assert tokenizer.unk_token_id not in tokenizer(everything)["input_ids"]


def test_a_packed_question_is_answered_as_if_it_stood_alone() -> None:
    """The packed row against the model's own forward on each question."""
    model = build_model(3)
    lesson = STAGES[-2].lesson
    assert lesson is not None
    batch = training_data.batch(lesson, seed=1, stage=3, step=5, size=2)
    with torch.no_grad():
        _, hidden = train.Reader(model, blind=False)(batch.pixels, batch.tokens, batch.positions, batch.mask())
        packed = model.lm_head(hidden)
    compared = 0
    for row in range(2):
        prefix = batch.tokens[row][batch.segments[row] == 0]
        for segment in range(1, int(batch.segments[row].max()) + 1):
            where = batch.segments[row] == segment
            alone = torch.cat([prefix, batch.tokens[row][where]])[None]
            mask = torch.ones_like(alone)
            with torch.no_grad():
                out = model(input_ids=alone, attention_mask=mask, pixel_values=batch.pixels[row : row + 1]).logits[0]
            torch.testing.assert_close(packed[row][where], out[len(prefix) :], atol=2e-5, rtol=0)
            compared += 1
    assert compared > 20


def test_the_targets_of_a_lesson_are_its_answers() -> None:
    lesson = STAGES[-2].lesson
    assert lesson is not None
    batch = training_data.batch(lesson, seed=0, stage=3, step=0, size=1)
    words = training_data.token_texts(batch.tokens[0].tolist())
    # What is to be said at a position stands at the next one, or is the end mark after the answer's last word.
    for i in (batch.targets[0] >= 0).nonzero().flatten().tolist():
        target = training_data.token_texts([int(batch.targets[0, i])])[0]
        if i + 1 < len(words) and batch.segments[0, i + 1] == batch.segments[0, i]:
            assert target == words[i + 1]
        else:
            assert target == "</s>"


def test_the_nouns_of_a_question_mean_what_the_scene_shows() -> None:
    """Against the answers that the same rows give to what-questions, and "no" where a question is so answered."""
    lesson = Lesson({"what_color": 0.3, "place": 0.3, "existence": 0.2, "size": 0.2})
    batch = training_data.batch(lesson, seed=0, stage=3, step=0, size=6)
    checked = set()
    for row in range(6):
        for segment in range(1, int(batch.segments[row].max()) + 1):
            at = (batch.segments[row] == segment).nonzero().flatten()
            words = training_data.token_texts(batch.tokens[row][at].tolist())
            targets = batch.targets[row][at]
            answer = training_data.token_texts([int(targets[targets >= 0][0])])[0]
            [noun] = [i for i, w in enumerate(words) if w in training_data.NOUNS]
            means = training_data.token_texts(batch.meanings[row][at[noun]].tolist())
            kind = words[1] if words[1] != "the" else "size"
            if kind == "there":
                assert (means == ["no"] * 3) == (answer == "no")
            elif kind == "size":
                assert set(means) <= {"big", "small"}
                assert (means == [words[noun + 1]] * 3) == (answer == "yes")
            else:
                assert means[("color", "row", "column").index(kind)] == answer
            checked.add(kind)
    assert checked == {"there", "color", "row", "column", "size"}
    nouns = training_data.token_texts(batch.tokens[batch.meanings[..., 0] >= 0].tolist())
    assert set(nouns) <= set(training_data.NOUNS)


def test_late_questions_look_above_the_first_layer_that_reads() -> None:
    """A question of size in the first half of the rows; every other position reads as it would have."""
    batch = training_data.batch(Lesson({"size": 0.5, "what_color": 0.5}), seed=0, stage=3, step=0, size=2)
    image = batch.tokens == build_tokenizer().get_vocab()[IMAGE]
    plain, special = batch.mask(), batch.mask_without_late(0.5)
    rows, _, asking, keys = (plain & ~special).nonzero(as_tuple=True)
    assert set(rows.tolist()) == {0}
    assert image[rows, keys].all()
    words = training_data.token_texts(batch.tokens[0].tolist())
    sizes = {
        at
        for at, segment in enumerate(batch.segments[0].tolist())
        if segment > 0 and {"big", "small"} & {w for w, s in zip(words, batch.segments[0], strict=True) if s == segment}
    }
    assert set(asking.tolist()) == sizes
    assert 0 < len(sizes) < int((batch.segments[0] > 0).sum())
    assert torch.equal(batch.mask_without_late(0.0), plain)


def test_a_mask_of_its_own_acts_on_the_first_layer_that_reads() -> None:
    model = build_model(1).eval()
    batch = training_data.batch(Lesson({"size": 1.0}), seed=0, stage=3, step=0, size=1)
    reader = train.Reader(model, blind=False)
    layers = model.model.language_model.layers
    states: dict[int, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: states.__setitem__(i, out))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        reader(batch.pixels, batch.tokens, batch.positions, batch.mask())
        plain = dict(states)
        reader(batch.pixels, batch.tokens, batch.positions, batch.mask(), batch.mask_without_late(1.0))
        masked = dict(states)
        reader(batch.pixels, batch.tokens, batch.positions, batch.mask())
    for handle in handles:
        handle.remove()
    asking = batch.late[0]
    assert torch.equal(plain[READING - 1], masked[READING - 1])
    assert not torch.allclose(plain[READING][0, asking], masked[READING][0, asking])
    assert torch.allclose(plain[READING][0, ~asking], masked[READING][0, ~asking], atol=1e-6)
    # The layer above sees the image again, and the mask is gone with the forward.
    assert all(torch.equal(plain[i], states[i]) for i in plain)


def test_the_loss_of_meanings_is_its_formula() -> None:
    """Against a loop over nouns in float64: the mean over nouns and their words of minus the log-softmax."""
    model = build_model(1)
    batch = training_data.batch(Lesson({"size": 0.5, "existence": 0.5}), seed=0, stage=3, step=2, size=2)
    states = torch.randn(*batch.tokens.shape, 192, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    table = model.lm_head.weight.detach().bfloat16().double()
    terms = []
    for row, at in (batch.meanings[..., 0] >= 0).nonzero().tolist():
        logits = table @ states[row, at].double()
        terms += [float(torch.logsumexp(logits, 0) - logits[word]) for word in batch.meanings[row, at].tolist()]
    assert len(terms) > 40
    loss = train.meaning_loss(states, model, batch).item()
    assert loss == pytest.approx(sum(terms) / len(terms), rel=2e-3)


def test_a_lesson_depends_on_its_number_alone() -> None:
    lesson = STAGES[-1].lesson
    assert lesson is not None
    first, second = (training_data.batch(lesson, 0, 4, 17, 3) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pixels, second.pixels)
    assert not torch.equal(first.pixels, training_data.batch(lesson, 0, 4, 18, 3).pixels)


def test_degraded_pictures_keep_their_answers() -> None:
    lesson = STAGES[-1].lesson
    assert lesson is not None
    rng = generator(TRAIN, 9, 9)
    lost = changed = total = 0
    for i in range(500):
        scene = sample_scene(generator(TRAIN, 9, i), "t", UNIFORM)
        degraded = training_data.degrade(rng, scene, replace(lesson, blank=0.0))
        objects = {o.noun: o for o in degraded.objects}
        total += len(scene.objects)
        lost += sum(o.noun not in objects for o in scene.objects)
        changed += sum(objects[o.noun].attributes != o.attributes for o in scene.objects if o.noun in objects)
        assert all(o.box == scene.get(o.noun).box for o in degraded.objects)  # type: ignore[union-attr]
    assert abs(lost / total - lesson.erased) < 0.03
    assert changed > 0


def test_a_patch_is_labelled_with_what_covers_it() -> None:
    picture = training_data.pictures(seed=0, step=3, size=4)
    objects = picture.labels["color"] >= 0
    assert 0.05 < objects.float().mean() < 0.6
    assert torch.equal(objects, picture.labels["noun"] < len(training_data.NOUNS))
    assert picture.labels["row"][objects].max() <= 6


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def short() -> tuple[Stage, ...]:
    """Every kind of stage, a few steps each."""
    chosen = (STAGES[0], STAGES[1], STAGES[2], STAGES[3], STAGES[-1])
    return tuple(replace(s, steps=4, size=2) for s in chosen)


def test_a_killed_training_resumes_to_the_same_weights(short: tuple[Stage, ...], tmp_path: Path) -> None:
    train.train(tmp_path / "whole", stages=short, compiled=False, checkpoint=2)
    whole = (tmp_path / "whole" / "4-prior" / "model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole", broken)
    shutil.rmtree(broken / "4-prior")
    # Stop the last stage in the middle by a step that fails, as a full disk or a lost machine would.
    calls = 0
    make = training_data.batch

    def failing(*args: object, **kwargs: object) -> training_data.Batch:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError
        return make(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "batch", failing)
        with pytest.raises(OSError):  # noqa: PT011 - the fault put in above has no message
            train.train(broken, stages=short, compiled=False, checkpoint=2)
    assert (broken / "4-prior.state.safetensors").exists()
    train.train(broken, stages=short, compiled=False, checkpoint=2)
    assert (broken / "4-prior" / "model.safetensors").read_bytes() == whole


def test_a_stage_trains_only_its_parameters(short: tuple[Stage, ...], tmp_path: Path) -> None:
    train.train(tmp_path, stages=short, compiled=False)
    folders = [None, *sorted(p for p in tmp_path.iterdir() if p.is_dir())]
    before = build_model(0).state_dict()
    for stage, folder in zip(short, folders[1:], strict=True):
        assert folder is not None
        after = train.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        planned = {name for name, *_ in train.trainable(stage, build_model(0))}
        assert changed
        assert changed <= planned
        before = after


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_the_command_prints_its_usage(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, f"lvlm.tiny.{module}")  # otherwise runpy warns that it was imported
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"lvlm.tiny.{module}", run_name="__main__")
    assert end.value.code == 0
    assert "usage: python -m lvlm.tiny" in capsys.readouterr().out


def test_processor_and_template_are_the_models() -> None:
    assert build_processor().image_token == "<image>"
