"""Counterfactual keywords: name what the image does not show, then ask the question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mitigation.protocol import ForwardCost
from mitigation.training_free.method import Category, Regime, check_range
from mitigation.training_free.prompt_methods import PromptMethod, text_of, write_about_images
from mitigation.training_free.prompt_words import words_problem

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Lvlm

KEYWORDS_PROMPT = """\
First, identify and list the key descriptive keywords that accurately represent the elements visible in the provided image. \
Following this, create a set of counterfactual keywords for each descriptive keyword. These counterfactual keywords should be \
visually plausible yet not actually present or accurate in the context of the image.

Progressively generate five sets of these counterfactual keywords. Each subsequent set should be increasingly similar and \
potentially more confusing in comparison to the factual keywords, indicating a gradual approach towards visual similarity with \
the actual content of the image.

Ensure that the number of factual keywords matches the number of counterfactual keywords in each set, and that they correspond \
to each other.

Present the keywords in the following format, without additional explanations:

Factual Keywords: [_, _, , ...]
Counterfactual Keywords 1: [_, _, _, ...]
Counterfactual Keywords 2: [_, _, _, ...]
Counterfactual Keywords 3: [_, _, _, ...]
Counterfactual Keywords 4: [_, _, _, ...]
Counterfactual Keywords 5: [_, _, _, ...]"""
"""Prompt of the release for the keywords."""
ANSWER_TEMPLATE = (
    "Please use counterfactual keywords that are different from the facts as a guide to understand the image well. Then, answer "
    "the questions.\nCounterfactual keywords: {keywords}.\nQuestion: {question}"
)
"""Prompt of the release for the answer."""
_LINE = re.compile(r"counterfactual keywords[^:\n]*:(.*)", re.IGNORECASE)


@dataclass(frozen=True)
class CounterfactualKeywords(PromptMethod):
    """Counterfactual inception: ask the question after keywords of what the image does not show.

    The model writes factual keywords and five sets of counterfactual ones (greedy, once for each image of a batch); the prompt
    of the answer contains the counterfactual ones only. Kim et al. 2024, arXiv 2403.13513. The paper keeps keywords that CLIP
    and a model of textual entailment find plausible; this check by other models is **left out**. A model that does not follow
    the format gives no keywords; its questions are then asked alone.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.counterfactual_keywords import CounterfactualKeywords
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> CounterfactualKeywords().problem(model, data[0]).partition(' (')[0]
    'not applicable: 86 prompt words unknown'
    """

    label: ClassVar[str] = "counterfactual keywords"
    category: ClassVar[Category] = "prompt"
    source: ClassVar[str] = "arXiv 2403.13513"
    regime: ClassVar[Regime] = "greedy"

    keywords_prompt: str = KEYWORDS_PROMPT
    """Question that the keywords answer."""
    template: str = ANSWER_TEMPLATE
    """Prompt of the answer, with ``{keywords}`` and ``{question}``."""
    max_new_tokens: int = 512
    """Largest number of tokens of the keywords; at least 1."""

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, 1)

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes: the keywords."""
        return ForwardCost(prompts=1, written_tokens=self.max_new_tokens)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return the words of the prompts that the tokenizer does not know, if there are some."""
        return words_problem(model, f"{self.keywords_prompt} {self.template.format(keywords='', question='')}")

    def _rewritten(self, model: Lvlm, examples: Sequence[Example]) -> Sequence[Example]:
        texts = write_about_images(model, examples, self.keywords_prompt, self.max_new_tokens)
        rewritten = []
        for example, (_, tokens) in zip(examples, texts, strict=True):
            keywords = counterfactual_keywords(text_of(model, tokens))
            question = self.template.format(keywords=", ".join(keywords), question=example.question)
            rewritten.append(replace(example, question=question) if keywords else example)
        return rewritten


def counterfactual_keywords(text: str) -> tuple[str, ...]:
    r"""Return the keywords in lines that begin with "Counterfactual Keywords", each once, in order.

    Examples
    --------
    >>> from mitigation.training_free.methods.counterfactual_keywords import counterfactual_keywords
    >>> text = "Factual Keywords: [dog, red]\nCounterfactual Keywords 1: [cat, blue]\nCounterfactual Keywords 2: [cat]"
    >>> counterfactual_keywords(text)
    ('cat', 'blue')
    """
    words = (word.strip(" \t[].\"'_") for line in _LINE.findall(text) for word in line.split(","))
    return tuple(dict.fromkeys(word for word in words if word))
