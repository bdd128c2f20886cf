"""What the model says: its answers, how they are read, and how they are scored.

`pope` and `chair` have the names of their modules, so they are bound here at once: bound on first use, ``behavior.pope``
would become the module for whoever imported that first. Both modules are light; the other names come when first used.
`amber`, `judge_files`, `mme` and `taxonomy` are modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from behavior.chair import chair
from behavior.pope import pope

if TYPE_CHECKING:
    from behavior import amber, judge_files, mme, taxonomy
    from behavior.answer_files import answered_elsewhere
    from behavior.answering import answer, answer_each
    from behavior.chair import ChairResult
    from behavior.comparison import Comparison, compare
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
    "judge_files",
    "mme",
    "pope",
    "taxonomy",
]

_HOME = {
    "Answer": "behavior.result",
    "BehaviorResult": "behavior.result",
    "ChairResult": "behavior.chair",
    "Comparison": "behavior.comparison",
    "Cost": "behavior.result",
    "PARSERS": "behavior.parsing",
    "PopeResult": "behavior.pope",
    "PopeScores": "behavior.pope",
    "answer": "behavior.answering",
    "answer_each": "behavior.answering",
    "answered_elsewhere": "behavior.answer_files",
    "compare": "behavior.comparison",
}
_MODULES = {
    "amber": "behavior.amber",
    "judge_files": "behavior.judge_files",
    "mme": "behavior.mme",
    "taxonomy": "behavior.taxonomy",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        msg = f"module 'behavior' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
