"""The HDF5 filters that activations may be compressed with; both come with the package hdf5plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h5py

from activation_store.format.schema import Compression
from groundscope.core.errors import StoreError

# Both put bytes of equal weight side by side before they look for repeats, which is what makes floats compress.
# bitshuffle: block size chosen by the filter (0), LZ4 (2). Blosc2: four reserved, level 1, byte shuffle (1), zstd (5).
_FILTERS: Mapping[Compression, tuple[int, tuple[int, ...]]] = {
    "bitshuffle-lz4": (32008, (0, 2)),
    "blosc2-zstd": (32026, (0, 0, 0, 0, 1, 1, 5)),
}


def filter_options(compression: Compression | None) -> dict[str, Any]:
    """Return what `h5py.Group.create_dataset` needs to compress a dataset.

    Raises
    ------
    StoreError
        Where the filter is not installed.
    """
    if compression is None:
        return {}
    need_filter(compression)
    number, options = _FILTERS[compression]
    return {"compression": number, "compression_opts": options}


def need_filter(compression: Compression | None) -> None:
    """Make a filter known to HDF5; raises `StoreError` where it is not installed."""
    if compression is None or h5py.h5z.filter_avail(_FILTERS[compression][0]):
        return
    try:
        # Registering is what importing it does.
        import hdf5plugin  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        msg = (
            f"compression '{compression}' needs the package hdf5plugin, which is not installed: "
            f"pip install 'groundscope[compression]'"
        )
        raise StoreError(msg) from error
