"""Several datasets as one, and prompts around the questions of a dataset."""

from __future__ import annotations

from dataclasses import replace

import pytest

from concepts import ConceptDataset, Example, combine_datasets, dataset_parts, scenes
from groundscope.core.errors import DataError


def data(name: str, ids: str, **provenance: object) -> ConceptDataset:
    first = scenes.dataset(10)[0]
    return ConceptDataset(name, tuple(replace(first, id=i) for i in ids), provenance)


def test_parts_are_the_datasets_that_were_combined() -> None:
    first, second = data("one", "ab", loader="pope"), data("two", "bc", loader="gqa")
    both = combine_datasets({"x": first, "y": second})
    assert [e.id for e in both] == ["x/a", "x/b", "y/b", "y/c"]
    parts = dataset_parts(both)
    assert {name: [e.id for e in part] for name, part in parts.items()} == {"x": ["x/a", "x/b"], "y": ["y/b", "y/c"]}
    assert [part.provenance["loader"] for part in parts.values()] == ["pope", "gqa"]
    assert list(dataset_parts(both.filter(lambda e: e.id == "y/c"))) == ["y"]
    assert {e.group for e in both} == {first[0].group}  # images of one name stay one group


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ({}, "no datasets to combine"),
        ({"a/b": data("one", "a")}, "'a/b' is not a name"),
        ({"": data("one", "a")}, "'' is not a name"),
        ({"a": combine_datasets({"b": data("one", "a")})}, "dataset 'a' is combined already"),
    ],
)
def test_what_cannot_be_combined_is_named(datasets: dict[str, ConceptDataset], words: str) -> None:
    with pytest.raises(DataError, match=words):
        combine_datasets(datasets)


def test_a_suffix_is_part_of_the_request_and_not_of_the_question() -> None:
    plain = data("one", "a")
    on_new_line, after_space = plain.with_prompt(suffix="One word."), plain.with_prompt(suffix=" One word.")
    question = plain[0].question
    assert on_new_line[0].request == f"{question}\nOne word."
    assert after_space[0].request == f"{question} One word."
    assert on_new_line[0].question == question
    assert plain[0].request == question
    # Data without a suffix keep their digests; another prompt is other data.
    assert plain.with_prompt().digest == plain.digest
    with_system = plain.with_prompt(system="Be brief.")
    assert len({d.digest for d in (plain, on_new_line, after_space, with_system)}) == 4
    assert not {"suffix", "system", "aliases"} & plain[0].record().keys()
    restored = Example(**{**{f: getattr(plain[0], f) for f in Example.__dataclass_fields__}, "system": "Be brief."})
    assert restored == with_system[0]
