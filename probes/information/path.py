"""The information along a path of sites in stores: the image's way through the model, or that of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ProbeError, StoreError
from groundscope.core.text import format_count
from lvlm.token_selection import TokenSelection
from probes.analysis.trajectory import STACKS
from probes.information.measure import WIDTH, measure_information
from probes.information.results import InformationPath
from probes.protocol.inputs import expand_concepts, find_array, read_features, read_groups, read_labels, row_mask

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.source import ActivationSource


@dataclass(frozen=True, eq=False)
class PathSite:
    """One site of a path, with the tokens that are read there and the store that has them.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import PathSite
    >>> store = MemorySource({"resid_post": np.zeros((1, 2, 3))}, {"id": ["a"], "group": ["g"]})
    >>> PathSite(store, "decoder.L1.resid_post").name
    'decoder.L1.resid_post at last'
    """

    store: ActivationSource
    site: str
    """One layer: ``vision.L3.resid_post``, ``projector.out``, ``decoder.L0.resid_post``."""
    tokens: str = "last"

    @property
    def name(self) -> str:
        """Site and tokens, as results name it."""
        return f"{self.site} at {TokenSelection.parse(self.tokens)}"

    def read(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return float32 [n, D] of the used rows, NaN where the token selection was empty."""
        array = find_array(self.store, self.site, self.tokens, heads=False)
        if len(array.layers) != 1:
            msg = f"{self.site} has {format_count(len(array.layers), 'layer')}; name one, such as {array.site(array.layers[0])}"
            raise ProbeError(msg)
        return read_features(self.store, array, array.layers[0], rows, ids)


def image_sites(store: ActivationSource, *, tokens: str = "image:mean", last: bool = True) -> tuple[PathSite, ...]:
    """Return the sites of a store that the image passes, in order: tower, projector, image tokens, last token.

    Parameters
    ----------
    store
        Store with ``resid_post`` of the tower and the decoder, and ``projector.out``, as far as it has them.
    tokens
        Tokens of the image: ``image:mean``, or ``object:mean`` where objects have boxes.
    last
        Whether the layers of the last token follow.

    Raises
    ------
    ProbeError
        If the store has none of these sites at these tokens.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import image_sites
    >>> x = np.zeros((1, 2, 3))
    >>> arrays = {("vision.resid_post", "image:mean"): x, ("projector.out", "image:mean"): x[:, :1], "resid_post": x}
    >>> store = MemorySource(arrays, {"id": ["a"], "group": ["g"]})
    >>> [place.site for place in image_sites(store, last=False)]
    ['vision.L0.resid_post', 'vision.L1.resid_post', 'projector.out']
    """
    selection = str(TokenSelection.parse(tokens))
    path = []
    for stack in STACKS:
        component = "out" if stack == "projector" else "resid_post"
        path += _layers(store, stack, component, selection)
    if not path:
        stored = ", ".join(f"{a.stack}.{a.component} at {a.tokens}" for a in store.arrays)
        msg = (
            f"the store has no site of the image at {tokens}; it has {stored}: trace resid_post and projector.out there"
        )
        raise ProbeError(msg)
    return (*path, *(_layers(store, "decoder", "resid_post", "last") if last else ()))


def _layers(store: ActivationSource, stack: str, component: str, tokens: str) -> list[PathSite]:
    arrays = [a for a in store.arrays if (a.stack, a.component, str(a.tokens)) == (stack, component, tokens)]
    site = "projector.out" if stack == "projector" else f"{stack}.L{{}}.{component}"
    return [PathSite(store, site.format(layer), tokens) for a in arrays for layer in a.layers]


def information_path(
    path: Sequence[PathSite],
    concept: str | Sequence[str],
    *,
    condition: PathSite | None = None,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    families: Sequence[str] = ("linear", "nonlinear"),
    k: int = WIDTH,
    folds: int = 5,
    inner_folds: int = 3,
    control: bool = True,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> InformationPath:
    """Measure the information about a concept along a path of sites, in nats; see `probes.measure_information`.

    Parameters
    ----------
    path
        The sites in order, such as `image_sites`. Sites of several stores need the same examples in the same order: the text
        path has the stores of captions or questions alone.
    concept
        A label column; or several concepts of which one is true (the colors of an object), or the name of a column of
        classes. Labels are those of the first store.
    condition
        Site that the null reads: of a store that was traced without an image, for ``H_V(Z | question) - H_V(Z | question, x)``.
        Name its layer and tokens with the result.
    rows
        Boolean [N]: examples to use; each needs a label. By default all examples with a label and with tokens at every site.
    families, k, folds, inner_folds, control, confidence, seed, progress
        As for `measure_information`.

    Raises
    ------
    ProbeError
        Before any fit; see `measure_information`. Also for a row of `rows` without a label or tokens.
    StoreError
        If two stores have other examples.
    SiteError
        If a store lacks a site.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import image_sites, information_path
    >>> cat = np.arange(240) // 2 % 2  # two questions about each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 3.0 * cat[:, None, None] * [[1], [0]]
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({("vision.resid_post", "image:mean"): x}, table)
    >>> path = information_path(image_sites(store), "object:cat", families=("linear",))
    >>> (path.nats.round(1) + 0).tolist(), path.changes[0].words
    ([[0.7, 0.0]], 'less linearly available')
    """
    if not path:
        msg = "the path has no site; give PathSite entries, such as those of image_sites(store)"
        raise ProbeError(msg)
    places = [*path, *([condition] if condition is not None else [])]
    names = [place.name for place in path]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        msg = f"the path has '{repeated}' more than once; two stores with the same site need separate paths"
        raise ProbeError(msg)
    frame = path[0].store.frame()
    ids = frame["id"].astype(str).to_numpy()
    for place in places:
        _check_ids(ids, place)
    concepts = [concept] if isinstance(concept, str) else list(concept)
    labels = _labels(frame, concepts)
    labelled = labels != ""
    used = row_mask(rows, len(ids))
    if rows is None:
        used = used & labelled
    elif (unlabelled := used & ~labelled).any():
        msg = (
            f"example '{ids[unlabelled][0]}' has no label of {', '.join(concepts)} ({int(unlabelled.sum())} of "
            f"{format_count(int(used.sum()), 'selected row')}): exclude these rows"
        )
        raise ProbeError(msg)
    if not used.any():
        msg = f"no example has a label of {', '.join(concepts)}"
        raise ProbeError(msg)
    values = [place.read(used, ids[used]) for place in places]
    present = ~np.logical_or.reduce([np.isnan(x).any(axis=1) for x in values])
    if rows is not None and not present.all():
        msg = (
            f"example '{ids[used][~present][0]}' has no such tokens at a site of the path "
            f"({format_count(int((~present).sum()), 'such row')}): exclude these rows"
        )
        raise ProbeError(msg)
    groups = read_groups(frame)[used][present]
    sites = {name: x[present] for name, x in zip(names, values, strict=False)}
    result = measure_information(
        sites,
        labels[used][present],
        groups,
        condition=values[-1][present] if condition is not None else None,
        condition_name=f"{condition.name}, alone" if condition is not None else "condition",
        families=families,
        k=k,
        folds=folds,
        inner_folds=inner_folds,
        control=control,
        concept=concept if isinstance(concept, str) else ", ".join(concepts),
        ids=ids[used][present],
        confidence=confidence,
        seed=seed,
        progress=progress,
    )
    about: dict[str, Any] = {"stores": list(dict.fromkeys(place.store.digest for place in places))}
    about["rows_without_tokens"] = int((~present).sum())
    return replace(result, provenance={**result.provenance, **about})


def _check_ids(ids: np.ndarray, place: PathSite) -> None:
    other = place.store.frame()["id"].astype(str).to_numpy()
    if len(other) == len(ids) and (other == ids).all():
        return
    missing = sorted(set(ids.tolist()) ^ set(other.tolist()))
    difference = f"'{missing[0]}' is in one of them only" if missing else "their order differs"
    msg = (
        f"{place.name} is of a store with other examples ({len(other)} and {len(ids)}; {difference}): trace all stores of a "
        "path on the same dataset"
    )
    raise StoreError(msg)


def _labels(frame: pd.DataFrame, concepts: Sequence[str]) -> np.ndarray:
    """Return the class of each row, text, empty where it is undefined."""
    expanded = expand_concepts(frame, concepts)
    table = read_labels(frame, expanded)
    if len(expanded) == 1:
        column = table[:, 0]
        return np.where(np.isnan(column), "", np.where(column == 1, "yes", "no"))
    single = (table == 1).sum(axis=1) == 1
    values = np.array([name.partition(":")[2] or name for name in expanded])
    return np.where(single, values[np.nan_to_num(table).argmax(axis=1)], "")
