"""Access elements of an HDF5 file with their expected type; anything else is damage, raised as KeyError."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py

from activation_store.format.schema import ENCODING_VERSION


def mark(element: h5py.Group | h5py.Dataset, kind: str) -> None:
    """Set the encoding type and version of an element."""
    element.attrs["encoding-type"] = kind
    element.attrs["encoding-version"] = ENCODING_VERSION


def attribute(element: h5py.Group | h5py.Dataset, name: str) -> Any:
    """Return an attribute; raise KeyError if it is missing."""
    return element.attrs[name]


def element_at(parent: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """Return the group or dataset of a name or path; raise KeyError if it is missing.

    Soft and external links, external storage and virtual datasets also raise KeyError: the contents of a store are in its
    own files, and no other file on the disk can be read through it.
    """
    element: h5py.Group | h5py.Dataset = parent
    for part in name.split("/"):
        if not isinstance(element, h5py.Group) or not isinstance(element.get(part, getlink=True), h5py.HardLink):
            raise KeyError(name)
        child = element[part]
        if not isinstance(child, h5py.Group | h5py.Dataset):
            raise KeyError(name)
        element = child
    if isinstance(element, h5py.Dataset) and (element.external or element.is_virtual):
        msg = f"{name}: its values are in another file"
        raise KeyError(msg)
    return element


def group_at(parent: h5py.Group, name: str) -> h5py.Group:
    """Return the group of a name; raise KeyError if it is missing or not a group."""
    element = element_at(parent, name)
    if not isinstance(element, h5py.Group):
        raise KeyError(name)
    return element


def dataset_at(parent: h5py.Group, name: str) -> h5py.Dataset:
    """Return the dataset of a name; raise KeyError if it is missing or not a dataset."""
    element = element_at(parent, name)
    if not isinstance(element, h5py.Dataset):
        raise KeyError(name)
    return element


def elements(parent: h5py.Group) -> Iterator[tuple[str, h5py.Group | h5py.Dataset]]:
    """Yield the groups and datasets in a group by name, sorted."""
    for name in _names(parent):
        yield name, element_at(parent, name)


def groups(parent: h5py.Group) -> Iterator[tuple[str, h5py.Group]]:
    """Yield the groups in a group by name, sorted."""
    for name in _names(parent):
        yield name, group_at(parent, name)


def datasets(parent: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield the datasets in a group by name, sorted."""
    for name in _names(parent):
        yield name, dataset_at(parent, name)


def _names(parent: h5py.Group) -> list[str]:
    return sorted(str(name) for name in parent)
