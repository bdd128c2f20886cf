"""What the model says: its answers, how they are read, and how they are scored.

`pope` and `chair` have the names of their modules, so they are bound here at once: bound on first use, ``behavior.pope``
would become the module for whoever imported that first. Both modules are light; the other names come when first used.
`amber`, `judged`, `mme` and `taxonomy` are modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from behavior.chair import chair
from behavior.pope import pope

if TYPE_CHECKING:
    from behavior import amber, judged, mme, taxonomy
    from behavior.answering import answer, answer_each
    from behavior.chair import ChairResult
    from behavior.comparison import Comparison, compare
    from behavior.elsewhere import answered_elsewhere
    from behavior.parsing import PARSERS
    from behavior.pope import PopeResult, PopeScores
    from behavior.result import Answer, BehaviorResult, Cost

__all__ = [
    "PARSERS",
    "Answer",
    "BehaviorResult",
    "ChairResult",
    "Comparison",
    "Cost",
    "PopeResult",
    "PopeScores",
    "amber",
    "answer",
    "answer_each",
    "answered_elsewhere",
    "chair",
    "compare",
    "judged",
    "mme",
    "pope",
    "taxonomy",
]

_MODULES = ("amber", "judged", "mme", "taxonomy")
_HOME = {
    "PARSERS": "parsing",
    "Answer": "result",
    "BehaviorResult": "result",
    "ChairResult": "chair",
    "Comparison": "comparison",
    "Cost": "result",
    "PopeResult": "pope",
    "PopeScores": "pope",
    "answer": "answering",
    "answer_each": "answering",
    "answered_elsewhere": "elsewhere",
    "compare": "comparison",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return import_module(f"behavior.{name}")
    if name not in _HOME:
        msg = f"module 'behavior' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"behavior.{_HOME[name]}"), name)
