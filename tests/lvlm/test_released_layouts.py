"""Released folders load unchanged, and their tokenizers read prompts and answers as the released ones do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from groundscope.core.errors import DataError, ModelError
from lvlm import Lvlm, answer_key, load_lvlm
from lvlm.answer_keys import answer_tokens
from tests.toys.examples import example
from tests.toys.reduce_tokenizers import HERE, PACKAGES, TEXT, full, reduced, with_added
from tests.toys.released_layouts import RELEASES, Release, released_name, write_release, write_texts

QUESTION = "Is there a dog?"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "families.md"
FIRST = {
    "llama2": {"yes": (" yes", 4874, " Yes", 3869), "no": (" no", 694, " No", 1939)},
    "mistral": {"yes": (" yes", 5081, " Yes", 5592), "no": (" no", 708, " No", 1770)},
    "llama3_1": {"yes": ("yes", 9891, "Yes", 9642), "no": ("no", 2201, "No", 2822)},
    "qwen3": {"yes": ("yes", 9693, "Yes", 9454), "no": ("no", 2152, "No", 2753)},
}
"""First tokens of answers in the released vocabularies, with their text: after a word they begin with a space, after a line end
or a special token they do not."""


Loaded = tuple[Release, Path, Lvlm]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """Write the folder of a release and load it, once for all tests."""
    root = tmp_path_factory.mktemp("released")

    @cache
    def load(name: str) -> Loaded:
        release = write_release(name, root / name)
        return release, root / name, load_lvlm(root / name)

    return load


@pytest.fixture(params=list(RELEASES))
def loaded(request: pytest.FixtureRequest, models: Callable[[str], Loaded]) -> Loaded:
    return models(request.param)


def yes_no_example(question: str = QUESTION) -> Any:
    return replace(example(0), question=question, answer="yes", candidates=("yes", "no"))


def test_every_weight_of_the_files_is_in_the_model(loaded: Loaded) -> None:
    """Two files, legacy names, half precision; nothing is missing, and only known leftovers are unused."""
    release, folder, model = loaded
    files = sorted(folder.glob("*.safetensors"))
    stored = {k: v for file in files for k, v in load_file(file).items()}
    assert len(files) == 2
    assert model.unused_weights == ()
    assert model.dtype == getattr(torch, release.dtype)
    own = model.hf.state_dict()
    assert not {k for k in own if k.startswith("model.language_model.")} & {*stored}
    written = {released_name(release, name): value for name, value in own.items()}
    for name, value in stored.items():
        if name not in release.leftovers:
            assert torch.equal(written[name], value), name
    tied = {"lm_head.weight", "language_model.lm_head.weight"}
    assert {*written} - {*stored} <= tied


def test_the_configuration_of_the_release_is_read(loaded: Loaded) -> None:
    release, _, model = loaded
    config, released = model.hf.config, release.config
    assert model.content_token == release.image
    assert model.content_id == released.get("image_token_index", released.get("image_token_id"))
    assert config.get_text_config().hidden_size == 32
    if "vision_feature_layer" in released:
        assert config.vision_feature_layer == released["vision_feature_layer"]
    if release.model_type.startswith("qwen"):
        size = model.processor.image_processor.size
        assert (size["shortest_edge"], size["longest_edge"]) == (3136, 12845056)
        assert config.get_text_config().rope_parameters["mrope_section"] == [1, 1, 2]
        assert config.get_text_config().rope_parameters["rope_theta"] == 1e6


def test_the_prompt_is_that_of_the_released_template(loaded: Loaded) -> None:
    """Proved by decoding: the tokens that the model reads are the prompt, with at most one first token before it."""
    release, _, model = loaded
    assert model.prompt(QUESTION) == release.prompt
    encoding, tokenizer = model.encode(yes_no_example()), model.processor.tokenizer
    ids = encoding.inputs["input_ids"][0].tolist()
    first = tokenizer.bos_token_id
    assert ids.count(first) == (first is not None)
    assert first is None or ids[0] == first
    text = re.sub(f"(?:{re.escape(release.image)})+", release.image, tokenizer.decode(ids, skip_special_tokens=False))
    text = text.replace("<img>", "").replace("</img>", "")
    expected = (
        release.prompt
        if release.prompt.startswith(str(tokenizer.bos_token))
        else f"{tokenizer.bos_token or ''}{release.prompt}"
    )
    assert "".join(text.split()) == "".join(expected.split())
    assert tokenizer.decode(ids[encoding.tokens.question[0] : encoding.tokens.question[-1] + 1]).strip() == QUESTION


def test_answers_begin_with_the_tokens_that_continue_the_prompt(loaded: Loaded) -> None:
    release, _, model = loaded
    tokenizer = model.processor.tokenizer
    key = answer_key(model, yes_no_example())
    prompt = tokenizer(release.prompt, add_special_tokens=False)["input_ids"]
    for answer, tokens in zip(key.candidates, key.tokens, strict=True):
        text, small, capital_text, capital = FIRST[release.tokenizer][answer]
        assert tokens == (small, capital)
        for form, token in ((text, small), (capital_text, capital)):
            assert tokenizer.decode([*prompt, token]) == tokenizer.decode(prompt) + form
    several = answer_tokens(model, yes_no_example(), "surfboard ball")
    assert len(several) > 1
    assert tokenizer.decode([*prompt, *several]).endswith("surfboard ball")


def test_transformers_own_processor_makes_the_same_inputs(loaded: Loaded) -> None:
    release, _, model = loaded
    if type(model.processor).__name__ == "Parts":
        pytest.skip("transformers' own processor of this family needs torchvision")
    image = example(0).image.load()
    ours = model.encode(yes_no_example()).inputs
    theirs = model.processor(
        text=release.prompt, images=image, return_tensors="pt", add_special_tokens=release.tokenizer != "llama3_1"
    )
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"])


def test_a_question_is_answered(loaded: Loaded) -> None:
    _, _, model = loaded
    assert isinstance(model.ask(example(0).image, QUESTION, max_new_tokens=2), str)


# -- templates -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llava(models: Callable[[str], Loaded]) -> Path:
    return models("LLaVA-1.5")[1]


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_is_found_in_any_of_its_files(llava: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "m"))
    (folder / "chat_template.json").unlink()
    write_texts(replace(RELEASES["LLaVA-1.5"], template_in=file), folder)
    assert load_lvlm(folder, validate=False).prompt(QUESTION) == RELEASES["LLaVA-1.5"].prompt


def test_a_template_without_a_placeholder_is_one_sentence(llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "m"))
    silent = "{% for turn in messages %}{{ turn['content'][-1]['text'] }}{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": silent}))
    with pytest.raises(ModelError, match=r"writes no placeholder of an image \('<image>'\)") as error:
        load_lvlm(folder, validate=False)
    assert "\n" not in str(error.value)


def test_a_missing_part_of_the_weights_is_one_sentence(llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "m"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_lvlm(folder)
    assert "model-00002-of-00002" in str(error.value)


def test_a_system_prompt_is_written_or_refused_as_the_template_does(models: Callable[[str], Loaded]) -> None:
    _, _, qwen = models("Qwen2-VL")
    assert qwen.prompt(QUESTION, system="Be brief.").startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    _, _, llava = models("LLaVA-1.5")
    assert llava.prompt(QUESTION, system="Be brief.") == f"Be brief. {RELEASES['LLaVA-1.5'].prompt}"
    _, _, llama = models("Llama-3.2-Vision")
    with pytest.raises(ModelError, match="cannot have a system message"):
        llama.prompt(QUESTION, system="Be brief.")


def test_two_answers_with_the_same_first_token_are_refused(models: Callable[[str], Loaded]) -> None:
    _, _, model = models("LLaVA-1.5")
    two = replace(yes_no_example(), answer="surfboard", candidates=("surfboard", "surf"))
    with pytest.raises(DataError, match="begin with the same token"):
        answer_key(model, two)


# -- tokenizers ------------------------------------------------------------------------------------------------------------


@cache
def both(name: str, folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """Return the released tokenizer and the reduced one; skip the test if the released one cannot be downloaded."""
    document = full(name, folder)
    if document is None:
        pytest.skip(f"{PACKAGES[name]} is not available")
    return Tokenizer.from_str(json.dumps(with_added(name, document))), Tokenizer.from_file(str(HERE / f"{name}.json"))


@pytest.mark.parametrize("name", list(PACKAGES))
def test_the_reduced_tokenizer_reads_as_the_released_one(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    cache = getattr(request.config, "cache", None)  # absent without pytest's cache plugin
    large, small = both(name, tmp_path if cache is None else cache.mkdir("tokenizers"))
    prompts = [release.prompt for release in RELEASES.values() if release.tokenizer == name and not release.added]
    texts = [*TEXT.split("\n"), *prompts, *(f"{p}{end}" for p in prompts for end in ("Yes", " Yes", "no", " no"))]
    for text in texts:
        assert small.encode(text).ids == large.encode(text).ids, text
    for tokens in FIRST[name].values():
        assert [
            large.decode([1000 if name != "qwen3" else 9454, i])[-len(t) :] for t, i in (tokens[:2], tokens[2:])
        ] == [tokens[0], tokens[2]]


def test_a_word_of_the_text_keeps_its_merges_and_ids() -> None:
    """Against a byte-pair model by hand: of five merges, the three below `cat` remain."""
    vocabulary = {"c": 0, "a": 1, "t": 2, "d": 3, "ca": 7, "cat": 9, "da": 11, "at": 12, "dat": 13}
    merges = [["c", "a"], ["d", "a"], ["a", "t"], ["ca", "t"], ["da", "t"]]
    document = {
        "added_tokens": [{"id": 20, "content": "<image>"}],
        "model": {"vocab": vocabulary, "merges": merges},
    }
    small = reduced("llama2", document)["model"]
    assert small["merges"] == ["c a", "a t", "ca t"]
    assert {k: v for k, v in small["vocab"].items() if len(k) > 1} == {"ca": 7, "cat": 9, "at": 12, "<image>": 20}


# -- the published table ---------------------------------------------------------------------------------------------------


def row(name: str, release: Release, model: Lvlm) -> str:
    tokenizer = model.processor.tokenizer

    def token_list(ids: list[int]) -> str:
        return " ".join(f"`{tokenizer.convert_ids_to_tokens(i)}`" for i in ids)

    ids = model.encode(yes_no_example()).inputs["input_ids"][0].tolist()
    first, last = ids.index(model.content_id), len(ids) - 1 - ids[::-1].index(model.content_id)
    key = answer_key(model, yes_no_example())
    answers = ", ".join(f"{token_list([i])} {i}" for tokens in key.tokens for i in tokens)
    system = "`You are a helpful assistant.`" if "helpful" in release.prompt else "none"
    begin = token_list(ids[:1]) if ids[0] == tokenizer.bos_token_id else "none"
    around = f"{token_list(ids[max(0, first - 2) : first])} … {token_list(ids[last + 1 : last + 3])}"
    cells = (
        name,
        begin,
        system,
        around,
        token_list(ids[-2:]),
        answers,
        token_list(answer_tokens(model, yes_no_example(), "surfboard")),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def test_the_guide_states_what_is_read(models: Callable[[str], Loaded]) -> None:
    head = (
        "| family | first token | system prompt | around the image | end of the prompt | first tokens of yes, no "
        "| `surfboard` |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    rows = [row(name, release, models(name)[2]) for name, release in RELEASES.items()]
    table, text = head + "\n".join(rows), PAGE.read_text(encoding="utf-8")
    start, end = "<!-- prompts: begin -->\n", "\n<!-- prompts: end -->"
    if os.environ.get("WRITE_PROMPTS"):
        before, _, after = text.partition(start)
        PAGE.write_text(before + start + table + end + after.partition(end)[2], encoding="utf-8")
        text = PAGE.read_text(encoding="utf-8")
    assert table == text.partition(start)[2].partition(end)[0], "run this test with WRITE_PROMPTS=1 to renew the table"


@pytest.mark.parametrize("prefix", ["There is a dog, so", "Is there a dog? ", "I see:\n", 'He says "'])
def test_a_prefix_and_its_next_word_have_the_tokens_of_the_whole_answer(loaded: Loaded, prefix: str) -> None:
    _, _, model = loaded
    question = replace(yes_no_example(), prefix=prefix)
    tokenizer = model.processor.tokenizer
    prompt = model.prompt(QUESTION)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ends_in_text = not prompt[-1:].isspace() and start[-1] not in {
        *tokenizer.all_special_ids,
        *tokenizer.added_tokens_decoder,
    }
    text = f"{prefix}yes" if prefix[-1] in ' \n"' else f"{prefix} yes"
    whole = tokenizer(f"{prompt}{' ' * ends_in_text}{text}", add_special_tokens=False)["input_ids"]
    encoding = model.encode(question)
    written = encoding.inputs["input_ids"][0, list(encoding.tokens.prefix)].tolist()
    assert encoding.inputs["input_ids"][0, encoding.tokens.prefix[0] - 1] == start[-1]
    assert [*start, *written, answer_tokens(model, question, "yes")[0]] == whole
    assert answer_key(model, question).tokens[0][0] == whole[-1]
    assert tokenizer.decode(written).strip() == prefix.strip()
