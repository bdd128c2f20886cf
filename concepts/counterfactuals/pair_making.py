"""The open table of kinds of counterfactual pairs, and the functions that make pairs of a kind."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice

from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals.image_edits import edit_pairs
from concepts.counterfactuals.methods import METHODS, PairMethod, methods_of
from concepts.counterfactuals.pair_set import PairSet
from concepts.counterfactuals.scene_edits import color_pairs, object_pairs, relation_pairs
from concepts.scenes.scene import Scene
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.registry import Registry
from groundscope.core.text import format_reasons, nearest

PairMaker = Callable[[ConceptDataset], Iterable[CounterfactualPair]]
"""Function from a dataset to the pairs of one kind, in the order of the dataset; examples that allow none are skipped."""
Form = tuple[str, ...]
"""Candidate answers of a question: questions with the same candidates have one form."""
MAX_LEAD = 2
"""Number of pairs by which one answer may be ahead of the rarest in `balanced_pairs` before another one of it is used."""


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


def check_kind(kind: str) -> None:
    """Raise `ConfigError` for a kind that is neither in `KINDS` nor made by one of `METHODS`.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.counterfactuals.check_kind("attribute")
    >>> gs.counterfactuals.check_kind("colour")
    Traceback (most recent call last):
    groundscope.core.errors.ConfigError: unknown kind of pair 'colour'; choose from action, ...; did you mean ...
    """
    names = sorted({*KINDS, *(name for entry in METHODS.usable().values() for name in entry.kinds)})
    if kind not in names:
        msg = f"unknown kind of pair '{kind}'; choose from {', '.join(names)}{nearest(kind, names)}"
        raise ConfigError(msg)
    if kind in KINDS:
        _ = KINDS[kind]  # raises for an entry of an installed package that cannot be loaded


def pairs(
    data: ConceptDataset,
    kind: str,
    *,
    method: str | None = None,
    placebo: bool = False,
    limit: int | None = None,
) -> PairSet:
    """Make a counterfactual pair of every example that allows one.

    Parameters
    ----------
    data
        Examples: icon scenes, which are drawn again, or photographs, which are exchanged or edited.
    kind
        An entry of `KINDS`, or a kind of one of `METHODS`.

        ``object``
            The object of the question is removed, or an absent object appears.
        ``color``
            The object of the question gets another color.
        ``relation``
            Two objects change their places: a scene or photograph is mirrored, or another photograph is shown.
        ``attribute``
            The object of the question gets another attribute than its color (photographs only).
        ``blank``, ``blur``, ``noise``, ``mask``
            The visible evidence is removed from the image, or only from the object's box (``mask``). Questions whose
            true answer is that an object is absent are skipped.
    method
        How photographs are changed, an entry of `METHODS`; by default the first that makes any pair of that kind. Scenes have
        no method.

        ``given``
            The file lists the pairs (`concepts.loaders.pairs`).
        ``swap``
            Another photograph is shown, on which the same question has another true answer.
        ``mirror``
            The photograph is mirrored left to right (``relation``: to the left of, to the right of).
        ``recolor``
            The object's pixels get another color (``color``).
        ``inpaint``
            A small object on a smooth background is removed (``object``).
    placebo
        Make placebo pairs of photographs instead: the same kind of change, after which the true answer is the same.
    limit
        Maximum number of pairs; the first ones are returned.

    Returns
    -------
    PairSet
        In the order of `data`. The true answers of a pair differ, except in placebo pairs.

    Raises
    ------
    ConfigError
        For an unknown kind or method, one of an installed package that cannot be loaded, or a method or placebo of a kind
        that has none.
    DataError
        If no example allows such a pair; the message has the reasons.

    Examples
    --------
    >>> import groundscope as gs
    >>> pair = gs.counterfactuals.pairs(gs.scenes.dataset(10), "color", limit=1)[0]
    >>> pair.change
    'airplane: blue -> purple'
    >>> pair.clean.question, pair.clean.answer, pair.corrupt.answer
    ('Is the airplane blue?', 'yes', 'no')
    """
    left_out: Counter[str] = Counter()
    for name, make in _ways(data, kind, method, placebo=placebo):
        result = tuple(islice(make(left_out), limit))
        if result:
            return PairSet(result, kind, name, left_out)
    raise _no_pair(data, kind, left_out)


def balanced_pairs(
    data: ConceptDataset, kind: str, *, method: str | Sequence[str] | None = None, placebo: bool = False, limit: int
) -> PairSet:
    """Make pairs for patching: at most one per image, with the true answers in about equal numbers.

    For photographs, if `method` is None or several names, the methods are tried in their order. The first that makes `limit`
    pairs is used; if none does, the one that makes the most.

    If examples of the split ``neutral`` allow such pairs, only these are used: in other splits the language prior suggests an
    answer. Answers are balanced because heads that only raise one answer, such as yes, would look like grounding heads if most
    pairs had it as their true answer. Of each image, the pair with the rarest true answer so far is chosen. It is used only
    when this answer has at most two pairs more than the rarest answer to questions with the same candidates. If the first
    `limit` images have only one answer, pairs are not balanced: with ``inpaint``, for example, the first image of a pair always
    shows the object.

    Parameters
    ----------
    data, kind, placebo
        As for `pairs`.
    method
        As for `pairs`; also several names: those that make this kind are tried in their order.
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
    total: Counter[str] = Counter()
    for source in (data.where(split="neutral"), data):
        best = PairSet((), kind)
        for name, make in _ways(source, kind, method, placebo=placebo):
            left_out: Counter[str] = Counter()
            result = tuple(_balanced(make(left_out), limit, left_out))
            if len(result) > len(best):
                best = PairSet(result, kind, name, left_out)
            total += left_out
            if len(result) == limit:
                break
        if best:
            return best
    raise _no_pair(data, kind, total)


def _balanced(
    candidates: Iterable[CounterfactualPair], limit: int, left_out: Counter[str]
) -> Iterator[CounterfactualPair]:
    """Yield at most one pair per image, with the true answers to questions of one form in about equal numbers."""
    groups: set[str] = set()
    counts: Counter[tuple[Form, str]] = Counter()
    waiting: dict[tuple[Form, str], deque[CounterfactualPair]] = {}
    for group, group_pairs in groupby(candidates, key=lambda pair: pair.group):
        of_image = list(group_pairs)
        if further := len(of_image) - (group not in groups):
            left_out["further pairs of the same image"] += further
        if group in groups:
            continue
        groups.add(group)
        # The form of the image's first pair: else forms with many answers, each of them rare, would replace yes and no.
        form = of_image[0].clean.candidates
        same = {(form, pair.clean.answer): pair for pair in reversed(of_image) if pair.clean.candidates == form}
        for key in same:
            waiting.setdefault(key, deque())
        rarest = min(reversed(same), key=lambda key: counts[key] + len(waiting[key]))
        waiting[rarest].append(same[rarest])
        # After as many images without another answer it is not to be expected: some kinds exist for one answer only.
        for pair in _due(waiting, counts, patient=len(groups) < limit):
            yield pair
            if counts.total() == limit:
                return
    yield from islice(_due(waiting, counts, patient=False), limit - counts.total())
    if unused := sum(map(len, waiting.values())):
        left_out["pairs whose answer is already the most frequent"] += unused


def _due(
    waiting: Mapping[tuple[Form, str], deque[CounterfactualPair]], counts: Counter[tuple[Form, str]], *, patient: bool
) -> Iterator[CounterfactualPair]:
    """Yield waiting pairs whose answer is at most `MAX_LEAD` ahead of the rarest one to questions of its form; count them.

    If `patient`, the other of two candidates is expected even if no pair has it yet.
    """
    while True:
        for (form, answer), pairs in waiting.items():
            # Of more than two candidates, some may never be true.
            answers = set(form) if patient and len(form) == 2 else {other for of, other in waiting if of == form}
            if pairs and counts[form, answer] <= min(counts[form, other] for other in answers) + MAX_LEAD:
                counts[form, answer] += 1
                yield pairs.popleft()
                break
        else:
            return


def _ways(
    data: ConceptDataset, kind: str, method: str | Sequence[str] | None, *, placebo: bool
) -> list[tuple[str, Callable[[Counter[str]], Iterator[CounterfactualPair]]]]:
    """Return the methods that can make the pairs, with an empty name for kinds without a method, and their functions."""
    check_kind(kind)
    methods = methods_of(kind, method)
    scenes = kind in KINDS and any(isinstance(e.image, Scene) for e in data)
    if not isinstance(method, str) and not placebo and (not methods or (scenes and method is None)):
        return [("", lambda left_out: iter(KINDS[kind](_with_images(data, left_out))))]
    if not methods:
        kinds = sorted({kind for entry in METHODS.usable().values() for kind in entry.kinds})
        msg = f"pairs of kind '{kind}' have no placebo; choose a kind of photographs: {', '.join(kinds)}"
        raise ConfigError(msg)

    def of(entry: PairMethod) -> Callable[[Counter[str]], Iterator[CounterfactualPair]]:
        return lambda left_out: iter(entry.make(_with_images(data, left_out, several=False), kind, left_out, placebo))

    return [(name, of(entry)) for name, entry in methods.items()]


def _with_images(data: ConceptDataset, left_out: Counter[str], *, several: bool = True) -> ConceptDataset:
    """Return the examples with an image, without those with several images if they cannot be changed; count the others."""
    without = sum(not e.images for e in data)
    more = 0 if several else sum(len(e.images) > 1 for e in data)
    if without:
        left_out["questions without an image"] += without
    if more:
        left_out["questions about several images"] += more
    return data.filter(lambda e: bool(e.images) and (several or len(e.images) == 1)) if without or more else data


def _no_pair(data: ConceptDataset, kind: str, left_out: Counter[str]) -> DataError:
    reasons = format_reasons(left_out)
    msg = f"dataset '{data.name}' has no example that allows a pair of kind '{kind}'"
    return DataError(f"{msg}; left out: {reasons}" if reasons else msg)
