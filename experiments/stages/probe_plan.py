"""Which concepts are probed where, by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from activation_store import ActivationStore
from concepts.schema import Concept
from groundscope.core.errors import ConfigError
from probes.protocol.inputs import concept_columns

PRESENCE_NOUNS = 4
"""How many nouns' presence is probed by default; the asked one covers them all."""
_AT_LAST = ("z", "resid_post")


@dataclass(frozen=True)
class Entry:
    """One grid: an array of the store and the concepts decoded from it."""

    stack: str
    component: str
    tokens: str
    concepts: tuple[str, ...]

    @property
    def site(self) -> str:
        """The site of the array, as `probes.fit_grid` takes it."""
        return f"{self.stack}.{self.component}"

    @property
    def name(self) -> str:
        """Folder of the grid."""
        return f"{self.stack}.{self.component}@{self.tokens.replace(':', '-')}"


def entries(plan: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Return the entries of a plan that was written as JSON."""
    return [Entry(e["stack"], e["component"], e["tokens"], tuple(e["concepts"])) for e in plan]


def probe_plan(
    store: ActivationStore, frame: pd.DataFrame, wanted: Sequence[str] | None, possible: Sequence[str]
) -> list[Entry]:
    """Choose concepts for every array worth probing.

    At the last token: what the question is about (the asked concept of each level, attributes, relations). At the
    object's tokens: its attributes. At all image tokens: which nouns are there.

    Parameters
    ----------
    store
        The traced activations.
    frame
        The examples probes may use.
    wanted
        Concepts to use instead; each must be in the store.
    possible
        Concepts with enough examples (`probes.probeable`); wanted ones need not be: fitting them says what lacks.
    """
    if wanted is not None:
        columns = concept_columns(frame)
        missing = [c for c in wanted if c not in columns]
        if missing:
            msg = f"concept '{missing[0]}' is not in the data: there are {', '.join(columns)}"
            raise ConfigError(msg)
        concepts = list(wanted)
    else:
        concepts = list(possible)
    parsed = [Concept.parse(c) for c in concepts]
    attributes = tuple(str(c) for c in parsed if c.level == "attribute" and c.name != "named")
    relations = tuple(str(c) for c in parsed if c.level == "relation" and c.name != "named")
    asked = tuple(str(c) for c in parsed if c.name == "named")
    nouns = tuple(str(c) for c in parsed if c.level == "object" and c.name != "named")
    if wanted is None:
        # The nouns whose presence is most evenly divided make the most of few examples.
        balance = {c: abs(frame.groupby("group")[c].first().mean() - 0.5) for c in nouns}
        nouns = tuple(sorted(nouns, key=lambda c: balance[c])[:PRESENCE_NOUNS])
    entries: list[Entry] = []
    for info in store.arrays:
        tokens = str(info.tokens)
        if tokens == "last" and info.component in _AT_LAST:
            chosen = (*asked, *attributes, *relations)
        elif tokens == "object:mean" and info.component in {"resid_post", "out"}:
            chosen = attributes
        elif tokens == "image:mean" and info.component in {"resid_post", "out"}:
            chosen = nouns
        else:
            continue
        if chosen:
            entries.append(Entry(info.stack, info.component, tokens, chosen))
    return entries
