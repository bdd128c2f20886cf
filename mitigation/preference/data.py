"""A sequence of preference pairs, split by image."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_count
from mitigation.preference.pair import PreferencePair

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PreferenceData(Sequence[PreferencePair]):
    """Preference pairs with unique ids, in order; slices are of the same type.

    Raises
    ------
    DataError
        If two pairs have the same id.

    Examples
    --------
    >>> import groundscope as gs
    >>> questions = gs.scenes.dataset(40).where(split="conflict", kind="what_color")
    >>> pairs = [gs.PreferencePair.of(e, e.answer, e.prior_answer, source="labels") for e in questions]
    >>> data = gs.PreferenceData("colors", tuple(pairs))
    >>> print(data)
    PreferenceData('colors', 10 pairs, 10 images)
        sources: labels 10
        words: chosen 1.0, rejected 1.0
    >>> training, validation = data.split(0.3)
    >>> len(training), len(validation), {p.group for p in training} & {p.group for p in validation}
    (7, 3, set())
    """

    name: str
    pairs: tuple[PreferencePair, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Origin of the pairs: maker and options, digests of what they were made from, and counts of what was left out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(self.pairs))
        repeated = next((name for name, n in Counter(p.id for p in self.pairs).items() if n > 1), None)
        if repeated is not None:
            msg = f"preferences '{self.name}': two pairs have the id '{repeated}'; ids must be unique"
            raise DataError(msg)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __repr__(self) -> str:
        images = format_count(len({p.group for p in self.pairs}), "image")
        head = f"PreferenceData('{self.name}', {format_count(len(self), 'pair')}, {images})"
        if not self.pairs:
            return head
        sources = Counter(p.source for p in self.pairs).most_common()
        more = f", {len(sources) - 6} more" if len(sources) > 6 else ""
        words = {n: np.mean([len(getattr(p, n).split()) for p in self.pairs]) for n in ("chosen", "rejected")}
        return (
            f"{head}\n    sources: {', '.join(f'{s} {n:,}' for s, n in sources[:6])}{more}"
            f"\n    words: chosen {words['chosen']:.1f}, rejected {words['rejected']:.1f}"
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PreferencePair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> PreferenceData: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | PreferenceData:
        return replace(self, pairs=self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def filter(self, keep: Callable[[PreferencePair], bool]) -> PreferenceData:
        """Return the pairs for which `keep` returns True, in order."""
        return replace(self, pairs=tuple(p for p in self.pairs if keep(p)))

    def split(self, share: float = 0.2, *, seed: int = 0) -> tuple[PreferenceData, PreferenceData]:
        """Return two parts without a common image or group, the second with about `share` of the pairs.

        Pairs that share an image or a group, directly or through other pairs, stay together.

        Parameters
        ----------
        share
            Share of the pairs of the second part, between 0 and 1, without these. At least one image is on each side.
        seed
            Seed of the choice; it depends on the images only, not on the order of the pairs.

        Raises
        ------
        ConfigError
            For a share that is not between 0 and 1.
        DataError
            If all pairs share one image, so that nothing can be split.
        """
        if not 0 < share < 1:
            msg = f"share={share}; give a number between 0 and 1"
            raise ConfigError(msg)
        labels = _components(self.pairs)
        sizes = Counter(labels)
        if len(sizes) < 2:
            msg = f"preferences '{self.name}' are about {len(sizes)} image, which cannot be divided; add pairs about others"
            raise DataError(msg)
        order = sorted(sizes, key=lambda label: value_digest([label, "validation", seed]))
        second: set[str] = set()
        count, goal = 0, share * len(self.pairs)
        for label in order[:-1]:
            if second and count + sizes[label] / 2 > goal:
                break
            second.add(label)
            count += sizes[label]
        parts = ([], [])
        for pair, label in zip(self.pairs, labels, strict=True):
            parts[label in second].append(pair)
        return replace(self, pairs=tuple(parts[0])), replace(self, pairs=tuple(parts[1]))

    def exchanged(self, *, seed: int = 0) -> PreferenceData:
        """Return the data with the preference of a random half of the pairs exchanged: a control without information."""
        half = set(np.random.default_rng(seed).permutation(len(self.pairs))[: len(self.pairs) // 2].tolist())
        pairs = tuple(p.exchanged() if i in half else p for i, p in enumerate(self.pairs))
        provenance = {**self.provenance, "exchanged": len(half), "seed": seed}
        return PreferenceData(f"{self.name}, half exchanged", pairs, provenance)

    def frame(self) -> pd.DataFrame:
        """Return one row per pair: its fields, with the number of images in place of the images."""
        import pandas as pd

        columns = ["id", "group", "source", "prompt", "chosen", "rejected", "images"]
        rows = [[p.id, p.group, p.source, p.prompt, p.chosen, p.rejected, len(p.images)] for p in self.pairs]
        return pd.DataFrame(rows, columns=columns)

    @property
    def digest(self) -> str:
        """SHA-256 of all records in order; equal for equal pairs on every machine."""
        h = hashlib.sha256()
        for pair in self.pairs:
            h.update(json.dumps(pair.record(), sort_keys=True).encode())
            h.update(b"\n")
        return h.hexdigest()


def _components(pairs: Sequence[PreferencePair]) -> list[str]:
    """Return for each pair the name of its set of pairs connected by images and groups: their smallest key."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [sorted({f"group {p.group}", *(f"image {image.identity}" for image in p.images)}) for p in pairs]
    for own in keys:
        roots = sorted({root(key) for key in own})
        for other in roots[1:]:
            parent[other] = roots[0]
    return [root(own[0]) for own in keys]
