"""Write activations in the files that ICT's code reads."""

from __future__ import annotations

from pathlib import Path

from groundscope.core.errors import PatchError
from groundscope.core.text import format_count
from lvlm.sites import Site
from mitigation.steering.activations import run
from mitigation.steering.contrast import Contrast
from mitigation.steering.derive.base import require_pairs
from mitigation.steering.export.iti_activations import npy_file
from mitigation.steering.places import Key

NAMES = ("base.npy", "hallucinated.npy", "object.npy")


def ict_activations(
    blurred: Contrast, masked: Contrast, folder: str | Path, *, tokens: str = "last", progress: bool | None = None
) -> tuple[Path, Path, Path]:
    """Write ``base.npy``, ``hallucinated.npy`` and ``object.npy``, float32 ``[N, layers, D]``, for github.com/THU-BPM/ICT.

    They contain the attention output (of the output projection) at the last token for the clean images, the blurred images,
    and the images with the object masked, with rows for the same questions. ICT's scripts instead read the token of the
    answer after the prompt. All files load with ``allow_pickle=False``.

    Parameters
    ----------
    blurred, masked
        Pairs (`Contrast.from_pairs`) of the same clean examples in the same order, for the same model.
    folder
        Folder for the three files.
    tokens
        ``last``, or ``suffix:mean`` for the mean over all tokens after the image.
    progress
        Whether to show progress; by default on a terminal only.

    Returns
    -------
    The three paths.

    Raises
    ------
    PatchError
        For contrasts without pairs, or pairs of different clean examples.
    StoreError
        If a file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> masked = gs.counterfactuals.pairs(data, "mask")[:2]
    >>> blurred = gs.counterfactuals.pairs(data.filter(lambda e: e.id in {p.clean.id for p in masked}), "blur")
    >>> contrasts = [gs.Contrast.from_pairs(model, pairs) for pairs in (blurred, masked)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = gs.export.ict_activations(*contrasts, folder)
    ...     np.load(paths[0]).shape == (2, model.n_layers, model.width)
    True
    """
    first, second = (require_pairs(contrast, "ict_activations") for contrast in (blurred, masked))
    model, pairs = first.model, first.pairs
    if [p.clean.id for p in pairs] != [p.clean.id for p in second.pairs] or second.model is not model:
        msg = (
            f"{len(pairs)} blurred and {format_count(len(second.pairs), 'masked pair')}; give pairs of the same clean "
            "examples in the same order, for the same model"
        )
        raise PatchError(msg)
    sites: list[Key] = [Site("decoder", layer, "attn_out") for layer in range(model.n_layers)]
    sides = ([p.clean for p in pairs], [p.corrupt for p in pairs], [p.corrupt for p in second.pairs])
    paths = tuple(Path(folder) / name for name in NAMES)
    for path, examples in zip(paths, sides, strict=True):
        outputs = run(model, examples, sites, tokens, progress=progress)
        with npy_file(path, (len(examples), model.n_layers, model.width)) as array:
            for layer, site in enumerate(sites):
                array[:, layer] = outputs[site]
    return paths[0], paths[1], paths[2]
