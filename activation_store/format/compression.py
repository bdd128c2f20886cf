"""HDF5 filters for compressed activations; both come with the package hdf5plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h5py

from activation_store.format.schema import Compression
from groundscope.core.errors import StoreError

# Both group bits or bytes of equal significance before they search for repeats, which makes floats compressible.
# bitshuffle: automatic block size (0), LZ4 (2). Blosc2: four reserved, level 1, byte shuffle (1), zstd (5).
_FILTERS: Mapping[Compression, tuple[int, tuple[int, ...]]] = {
    "bitshuffle-lz4": (32008, (0, 2)),
    "blosc2-zstd": (32026, (0, 0, 0, 0, 1, 1, 5)),
}


def filter_options(compression: Compression | None) -> dict[str, Any]:
    """Return the options of `h5py.Group.create_dataset` for a compressed dataset.

    Raises
    ------
    StoreError
        If the filter is not installed.
    """
    if compression is None:
        return {}
    require_filter(compression)
    number, options = _FILTERS[compression]
    return {"compression": number, "compression_opts": options}


def require_filter(compression: Compression | None) -> None:
    """Register a filter with HDF5; raise `StoreError` if it is not installed."""
    if compression is None or h5py.h5z.filter_avail(_FILTERS[compression][0]):
        return
    try:
        # The import registers the filters.
        import hdf5plugin  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        msg = (
            f"compression '{compression}' needs the package hdf5plugin, which is not installed: "
            f"pip install 'groundscope[compression]'"
        )
        raise StoreError(msg) from error
