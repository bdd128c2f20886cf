"""The open table of kinds of counterfactual pairs, and the functions that make pairs of a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from concepts.counterfactuals.image_edits import edit_pairs
from concepts.counterfactuals.scene_edits import color_pairs, object_pairs, relation_pairs
from concepts.schema import ConceptDataset, CounterfactualPair
from groundscope.core.errors import DataError
from groundscope.core.registry import Registry

PairMaker = Callable[[ConceptDataset], Iterable[CounterfactualPair]]
"""Function from a dataset to the pairs of one kind, in the order of the dataset; examples that allow none are skipped."""


def _problem(maker: PairMaker) -> str | None:
    return None if callable(maker) else "it must be a function from a ConceptDataset to CounterfactualPairs"


KINDS: Registry[PairMaker] = Registry(
    "kind of pair",
    {
        "object": object_pairs,
        "color": color_pairs,
        "relation": relation_pairs,
        **{edit: edit_pairs(edit) for edit in ("blank", "blur", "noise", "mask")},
    },
    group="groundscope.pairs",
    check=_problem,
)
"""Kinds of pairs by name: built-in, registered, and of installed packages (entry-point group ``groundscope.pairs``)."""


def register(kind: str, maker: PairMaker, *, replace: bool = False) -> None:
    """Add a kind of pair, for `pairs` and for the option ``patch.kinds`` of the command.

    An installed package does the same with an entry point in the group ``groundscope.pairs``.

    Parameters
    ----------
    kind
        Name of the kind.
    maker
        Function from a dataset to its pairs. Both examples of a pair must have the same question, candidates and group;
        their true answers must differ.
    replace
        Whether to replace an existing kind of that name.

    Raises
    ------
    ConfigError
        If the name is in use and `replace` is False, or `maker` cannot be called.

    Examples
    --------
    Pairs of two photographs (here: scenes) with the same question and different true answers:

    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> def other_image(data):
    ...     for example in data:
    ...         for other in data:
    ...             if other.question == example.question and other.answer != example.answer:
    ...                 corrupt = replace(other, id=f"{example.id}|{other.id}", group=example.group)
    ...                 yield gs.CounterfactualPair(example, corrupt, "other_image", f"image of {other.id}")
    ...                 break
    >>> gs.counterfactuals.register("other_image", other_image)
    >>> pair = gs.counterfactuals.pairs(gs.scenes.dataset(40), "other_image", limit=1)[0]
    >>> pair.clean.question == pair.corrupt.question, {pair.clean.answer, pair.corrupt.answer} == {"yes", "no"}
    (True, True)
    >>> gs.counterfactuals.KINDS.unregister("other_image")
    """
    KINDS.register(kind, maker, replace=replace)


def pairs(data: ConceptDataset, kind: str, *, limit: int | None = None) -> list[CounterfactualPair]:
    """Make a counterfactual pair of every example that allows one.

    Parameters
    ----------
    data
        Examples. The kinds ``object``, ``color`` and ``relation`` need icon scenes; the other built-in kinds take any image.
    kind
        An entry of `KINDS`.

        ``object``
            The object of the question is removed, or the absent object replaces another one.
        ``color``
            The object of the question gets another color.
        ``relation``
            The scene is mirrored along the axis of the relation.
        ``blank``, ``blur``, ``noise``, ``mask``
            The visible evidence is removed from the image, or only from the object's box (``mask``). Questions whose
            true answer is that an object is absent are skipped.
    limit
        Maximum number of pairs; the first ones are returned.

    Returns
    -------
    list of CounterfactualPair
        In the order of `data`. The true answers of a pair differ.

    Raises
    ------
    ConfigError
        For an unknown kind, or one of an installed package that cannot be loaded.
    DataError
        If no example allows such a pair.

    Examples
    --------
    >>> import groundscope as gs
    >>> pair = gs.counterfactuals.pairs(gs.scenes.dataset(10), "color", limit=1)[0]
    >>> pair.change
    'airplane: blue -> purple'
    >>> pair.clean.question, pair.clean.answer, pair.corrupt.answer
    ('Is the airplane blue?', 'yes', 'no')
    """
    result = list(islice(KINDS[kind](data), limit))
    if not result:
        msg = f"dataset '{data.name}' has no example that allows a pair of kind '{kind}'"
        raise DataError(msg)
    return result


def balanced_pairs(data: ConceptDataset, kind: str, *, limit: int) -> list[CounterfactualPair]:
    """Make pairs for patching: at most one per image, with the true answers in about equal numbers.

    If `data` has examples of the split ``neutral``, only these are used: in other splits the language prior suggests an
    answer. Heads that only raise one answer, such as yes, would look like grounding heads if most pairs had it as their
    true answer; so a pair is skipped while its true answer is ahead of the rarest one by more than two pairs.

    Parameters
    ----------
    data, kind
        As for `pairs`.
    limit
        Maximum number of pairs.

    Raises
    ------
    ConfigError, DataError
        As for `pairs`.

    Examples
    --------
    >>> import groundscope as gs
    >>> pairs = gs.counterfactuals.balanced_pairs(gs.scenes.dataset(40), "object", limit=6)
    >>> len(pairs), len({pair.group for pair in pairs})
    (6, 6)
    """
    neutral = data.where(split="neutral")
    chosen: dict[str, CounterfactualPair] = {}
    counts: dict[str, int] = {}
    for pair in pairs(neutral if len(neutral) else data, kind):
        answer = pair.clean.answer
        if pair.group in chosen or counts.get(answer, 0) > min(counts.values(), default=0) + 2:
            continue
        chosen[pair.group] = pair
        counts[answer] = counts.get(answer, 0) + 1
        if len(chosen) == limit:
            break
    return list(chosen.values())
