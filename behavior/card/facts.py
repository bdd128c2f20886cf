"""Facts that a dataset asks about in several forms: as a choice, and as a yes-no question whose true answer is yes."""

from __future__ import annotations

from concepts.question import YES_NO
from concepts.schema import ConceptDataset


def facts_of(data: ConceptDataset) -> dict[str, str]:
    """Return the fact of each question that asks for one in two forms: kind ``what_<kind>`` with candidates, and kind ``<kind>``.

    Only yes-no questions whose true answer is yes are forms of the same fact: who says that the apple is red must answer "red" to
    its color. "No" to another color does not follow from a wrong color.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.card import facts_of
    >>> facts = facts_of(gs.scenes.dataset(30))
    >>> len(facts) > len(set(facts.values())) > 0
    True
    """
    forms: dict[str, list[str]] = {}
    kinds = {e.kind for e in data}
    for example in data:
        attribute = example.kind.removeprefix("what_")
        if example.subject is None or f"what_{attribute}" not in kinds:
            continue
        open_form = example.kind.startswith("what_") and len(example.candidates) > 1
        if open_form or (
            set(example.candidates) == set(YES_NO) and example.answer == YES_NO[0] and attribute == example.kind
        ):
            forms.setdefault(f"{example.group}/{example.subject}/{attribute}", []).append(example.id)
    kind_of = {e.id: e.kind for e in data}
    several = {fact: ids for fact, ids in forms.items() if len({kind_of[i] for i in ids}) > 1}
    return {number: fact for fact, ids in several.items() for number in ids}
