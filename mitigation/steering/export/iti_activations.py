"""Write activations in the files that honest_llama reads, for its own scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ModelError, PatchError, SiteError
from groundscope.core.files import explained, whole
from groundscope.core.progress import progress_bar
from lvlm.family.specification import resolve
from lvlm.sites import Site
from mitigation.steering.activations import read
from mitigation.steering.contrast import Contrast
from mitigation.steering.derive.base import require_store

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def iti_activations(
    contrast: Contrast, prefix: str | Path, model: Lvlm, *, tokens: str = "last", progress: bool | None = None
) -> tuple[Path, Path, Path]:
    """Write ``PREFIX_head_wise.npy``, ``PREFIX_layer_wise.npy`` and ``PREFIX_labels.npy`` for github.com/likenneth/honest_llama.

    ``head_wise`` float32 ``[N, layers, heads * head_dim]``: z, the input of the output projection. ``layer_wise`` float32
    ``[N, layers + 1, D]``: embeddings, then the output of every layer, the last after the final norm, as in transformers.
    ``labels`` int64 ``[N]``: 1 for positive. All files load with ``allow_pickle=False``.

    Parameters
    ----------
    contrast
        Examples of a store (`Contrast.from_store`) with ``z`` and ``resid_post`` of all layers and ``decoder.L0.resid_pre``;
        examples without the token are excluded.
    prefix
        Folder and prefix of the file names, such as ``features/llava_pope``.
    model
        The model that the store was traced from; its final norm is needed.
    tokens
        Token selection that activations are read at.
    progress
        Whether to show progress; by default on a terminal only.

    Returns
    -------
    The three paths.

    Raises
    ------
    ModelError
        For another model.
    PatchError, SiteError
        As for `mitigation.derive.mean_difference`.
    StoreError
        If a file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10).filter(lambda e: e.answer in ("yes", "no"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sites = ("z", "resid_post", "decoder.L0.resid_pre")
    ...     store = gs.trace(model, data, sites=sites, tokens=("last",), out=Path(folder) / "store")
    ...     contrast = gs.Contrast.from_store(store, positive=(store.frame()["answer"] == "yes").to_numpy())
    ...     paths = gs.export.iti_activations(contrast, Path(folder) / "tiny", model)
    ...     np.load(paths[2]).shape == (len(data),)
    True
    """
    import torch

    groups = require_store(contrast, "iti_activations")
    store = groups.store
    if store.provenance.get("model", {}).get("config") != model.config_hash:
        msg = f"the store was not traced from '{model.name}'; pass the model that it was traced from"
        raise ModelError(msg)
    partial = next((a for a in getattr(store, "arrays", ()) if a.heads and a.component.endswith("z")), None)
    if partial is not None:
        msg = (
            f"the store has heads {', '.join(map(str, partial.heads))} of {partial.stack}.{partial.component} only, but "
            "honest_llama's files hold all heads; trace all heads"
        )
        raise SiteError(msg)
    heads_at = [model.head_site(layer) for layer in range(model.n_layers)]
    layers = len(heads_at)
    first = read(store, heads_at[0], tokens)
    rows = np.flatnonzero((groups.positive | groups.negative) & ~np.isnan(first).any(axis=1))
    if not len(rows):
        msg = f"no positive or negative example has the tokens '{tokens}', so there is nothing to write"
        raise PatchError(msg)
    paths = tuple(Path(f"{prefix}_{name}.npy") for name in ("head_wise", "layer_wise", "labels"))
    embedded = read(store, Site("decoder", 0, "resid_pre"), tokens)[rows]  # before anything is written
    with (
        npy_file(paths[0], (len(rows), layers, first.shape[1])) as heads,
        npy_file(paths[1], (len(rows), layers + 1, embedded.shape[1])) as residual,
        progress_bar(progress) as bar,
    ):
        residual[:, 0] = embedded
        for layer in bar.track(range(layers), description="writing activations"):
            heads[:, layer] = read(store, heads_at[layer], tokens)[rows]
            x = read(store, layer, tokens)[rows]
            if layer == layers - 1 and model.spec.final_norm:
                norm = resolve(model.hf, model.spec.final_norm, model.spec)
                with torch.no_grad():
                    x = norm(torch.tensor(x, device=model.device, dtype=model.dtype)).float().cpu().numpy()
            residual[:, layer + 1] = x
    with npy_file(paths[2], (len(rows),), np.int64) as labels:
        labels[:] = groups.positive[rows]
    return paths[0], paths[1], paths[2]


@contextmanager
def npy_file(path: Path, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> Iterator[np.ndarray]:
    """Yield an array on disk to fill; the file is renamed when complete. Raises `StoreError` if it cannot be written."""
    with explained(lambda reason: f"{path}: the activations cannot be written: {reason}"), whole(path) as part:
        array = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
        yield array
        array.flush()
