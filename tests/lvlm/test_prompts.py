"""Suffix and system prompt: where they are in the model's prompt, and what a template without a place for them does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from concepts import scenes
from groundscope.core.errors import ModelError
from lvlm import answer_key, load_lvlm

IMAGE = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
WITH_PARTS = f"{{% for m in messages %}}{{{{ m['role'] }}}}: {IMAGE} {{% endfor %}}"
WITH_TEXT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}system: {{ m['content'] }} {% else %}user: "
    f"{IMAGE} {{% endif %}}{{% endfor %}}"
)
WITHOUT = f"{{% for m in messages if m['role'] == 'user' %}}user: {IMAGE} {{% endfor %}}"


def test_a_suffix_follows_the_question_and_is_not_among_its_tokens() -> None:
    model = load_lvlm("tiny", validate=False)
    plain = scenes.dataset(10)[0]
    example = replace(plain, suffix="Is it red?")
    first, second = model.encode(plain), model.encode(example)
    assert model.prompt(example.request) == model.prompt(plain.question).replace("?", "?\nIs it red?", 1)
    assert second.tokens.length > first.tokens.length
    assert second.tokens.question == first.tokens.question
    assert answer_key(model, example) == answer_key(model, plain)


@pytest.mark.parametrize("template", [WITH_PARTS, WITH_TEXT], ids=["list of parts", "text"])
def test_a_system_prompt_is_given_in_the_form_that_the_template_reads(template: str) -> None:
    model = load_lvlm("tiny", validate=False)
    model.processor.chat_template = template
    question = scenes.dataset(10)[0].question
    assert model.prompt(question, system="Be brief.").startswith("system: Be brief. user: <image>")
    assert "system" not in model.prompt(question)


def test_a_template_without_a_place_for_a_system_prompt_is_refused() -> None:
    model = load_lvlm("tiny", validate=False)
    example = replace(scenes.dataset(10)[0], system="Be brief.")
    with pytest.raises(
        ModelError, match="tiny has no chat template, so a system prompt has no place: write the text into the"
    ):
        model.encode(example)
    model.processor.chat_template = WITHOUT
    with pytest.raises(ModelError, match="the chat template of tiny has no place for a system prompt"):
        model.encode(example)
