"""The information along a path of sites: values, intervals, changes, a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import ProbeError, StoreError
from groundscope.core.result_fields import building
from groundscope.core.short_repr import short_repr
from groundscope.core.text import nearest
from probes.information.changes import FamilyChange, SiteChange

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KIND, VERSION = "information path", 1
_ARRAYS = ("nats", "low", "high", "pvi", "kept_variance", "null_entropy", "condition_nats")


@dataclass(frozen=True, eq=False)
class InformationPath:
    """V-information about a concept at each site of a path, in nats; returned by `probes.information_path`.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import measure_information
    >>> z = np.arange(300) % 2
    >>> x = np.random.default_rng(0).normal(size=(300, 4)) + 2.0 * z[:, None] * [1, 0, 0, 0]
    >>> sites = {"early": x, "late": x[:, 1:]}  # the last site drops the informative dimension
    >>> path = measure_information(sites, z, np.arange(300), families=("linear",))
    >>> (path.frame()["nats"].round(1) + 0).tolist(), path.at("early")[0] > 0.25
    ([0.3, 0.0], True)
    >>> [change.words for change in path.changes]
    ['less linearly available']
    """

    concept: str
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    """In the order of the path."""
    families: tuple[str, ...]
    nats: np.ndarray
    """float64 [M, S]: information of each family at each site, the mean of `pvi`; negative values are not clipped."""
    low: np.ndarray
    high: np.ndarray
    """float64 [M, S]: interval over groups."""
    pvi: np.ndarray
    """float64 [M, S, N]: pointwise information of each row, ``log p[x](z) - log p[null](z)``."""
    kept_variance: np.ndarray
    """float64 [S]: share of the variance of the training rows in the k dimensions that are read, mean over folds."""
    entropy: float
    """H(Z) of the rows, from their class shares."""
    null_entropy: np.ndarray
    """float64 [M]: H_V(Z), the held-out log-loss without the site: of class shares of the training rows, or of the reader of
    `condition`. Information is at most this."""
    changes: tuple[SiteChange, ...]
    """Between consecutive sites."""
    choices: Mapping[str, tuple[tuple[Any, ...], ...]]
    """By family, for each site the selected choice of each fold: a penalty, or ``null`` for the reader without features."""
    ids: np.ndarray
    """str [N]."""
    groups: np.ndarray
    """str [N]."""
    condition: str = ""
    """What the null reads; empty for nothing. Information is then ``H_V(Z | condition) - H_V(Z | condition, x)``."""
    condition_nats: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 [M]: information of `condition` alone; empty without it."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """All options, and the digests of the stores."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in ("choices", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __len__(self) -> int:
        return len(self.sites)

    def at(self, site: str, family: str = "linear") -> tuple[float, float, float]:
        """Return nats, low and high end at a site; raises `ProbeError` for an unknown site or family."""
        for kind, name, names in (("site", site, self.sites), ("family", family, self.families)):
            if name not in names:
                msg = f"unknown {kind} '{name}' of this path; choose from {', '.join(names)}{nearest(name, names)}"
                raise ProbeError(msg)
        where = self.families.index(family), self.sites.index(site)
        return float(self.nats[where]), float(self.low[where]), float(self.high[where])

    def frame(self) -> pd.DataFrame:
        """Return one row per site and family.

        Columns are nats, low, high, null_entropy, entropy and kept; change (from the site before), p_holm, control (the change
        from the padded earlier site) and words.
        """
        import pandas as pd

        rows = []
        for s, site in enumerate(self.sites):
            change = self.changes[s - 1] if s else None
            for m, name in enumerate(self.families):
                row: dict[str, Any] = {"site": site, "family": name}
                row |= {"nats": self.nats[m, s], "low": self.low[m, s], "high": self.high[m, s]}
                row |= {
                    "null_entropy": self.null_entropy[m],
                    "entropy": self.entropy,
                    "kept_variance": self.kept_variance[s],
                }
                of_family = change[name] if change is not None else None
                for key in ("nats", "p_holm", "control"):
                    column = "change" if key == "nats" else key
                    row[column] = getattr(of_family, key) if of_family is not None else np.nan
                rows.append(row | {"words": change.words if change is not None else ""})
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with all fields; raises `StoreError` if it cannot be written."""
        card = {name: list(getattr(self, name)) for name in ("classes", "sites", "families")}
        card |= {"ids": self.ids.tolist(), "groups": self.groups.tolist(), "provenance": dict(self.provenance)}
        card |= {name: getattr(self, name) for name in ("concept", "entropy", "condition")}
        # A missing control is NaN, which JSON does not have.
        changes = [asdict(change) for change in self.changes]
        for change in changes:
            for of_family in change["families"]:
                of_family |= {k: None for k, v in of_family.items() if v != v}
        card |= {"changes": changes, "choices": {name: [list(of) for of in c] for name, c in self.choices.items()}}
        artifacts.write(Path(path), KIND, VERSION, {name: getattr(self, name) for name in _ARRAYS}, card)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; raises `StoreError` if it is missing, damaged, or another file."""
        tensors, card = artifacts.read(Path(path), KIND, VERSION)
        with building(f"{path} is a damaged {KIND} file", StoreError):
            changes = tuple(
                SiteChange(
                    str(change["earlier"]),
                    str(change["later"]),
                    tuple(
                        FamilyChange(**dict[str, Any]({k: np.nan if v is None else v for k, v in of_family.items()}))
                        for of_family in change["families"]
                    ),
                    str(change["words"]),
                )
                for change in card["changes"]
            )
            choices = {
                str(name): tuple(tuple(tuple(v) if isinstance(v, list) else v for v in of) for of in of_sites)
                for name, of_sites in card["choices"].items()
            }
            names = {name: tuple(map(str, card[name])) for name in ("classes", "sites", "families")}
            arrays: dict[str, Any] = {name: tensors[name] for name in _ARRAYS}
            return cls(
                concept=str(card["concept"]),
                **names,
                **arrays,
                entropy=float(card["entropy"]),
                changes=changes,
                choices=choices,
                ids=np.array(card["ids"], dtype=np.str_),
                groups=np.array(card["groups"], dtype=np.str_),
                condition=str(card["condition"]),
                provenance=dict(card["provenance"]),
            )

    def plot(self, path: str | Path | None = None, ax: Axes | None = None) -> Axes:
        """Draw where information becomes unavailable; see `probes.information.plot.plot_path`."""
        from probes.information.plot import plot_path

        return plot_path(self, path=path, ax=ax)

    def __str__(self) -> str:
        suffix = f" given {self.condition}" if self.condition else ""
        lines = [
            f"{self.concept}{suffix}: H(Z) {self.entropy:.3f} nats, {len(self.ids)} rows of {len(set(self.groups))} groups"
        ]
        for s, site in enumerate(self.sites):
            values = ", ".join(
                f"{name} {self.nats[m, s]:.3f} [{self.low[m, s]:.3f}, {self.high[m, s]:.3f}]"
                for m, name in enumerate(self.families)
            )
            words = f": {self.changes[s - 1].words}" if s and self.changes[s - 1].words else ""
            lines.append(f"  {site}: {values}{words}")
        return "\n".join(lines)
