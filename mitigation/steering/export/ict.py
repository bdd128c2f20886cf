"""Write activations in the files that ICT's code reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from groundscope.core.errors import PatchError
from lvlm.sites import Site
from mitigation.steering.derive.base import activations
from mitigation.steering.export.iti import written
from mitigation.steering.placement import Key

if TYPE_CHECKING:
    from concepts.schema import CounterfactualPair
    from lvlm.model import Lvlm

NAMES = ("base.npy", "hallucinated.npy", "object.npy")


def ict(
    model: Lvlm,
    blurred: Sequence[CounterfactualPair],
    masked: Sequence[CounterfactualPair],
    folder: str | Path,
    *,
    tokens: str = "last",
) -> tuple[Path, Path, Path]:
    """Write ``base.npy``, ``hallucinated.npy`` and ``object.npy``, float32 ``[N, layers, D]``, for github.com/THU-BPM/ICT.

    They contain the attention output (of the output projection) at the last token for the clean images, the blurred images,
    and the images with the object masked, with rows for the same questions. ICT's scripts instead read the token of the
    answer after the prompt. All files load with ``allow_pickle=False``.

    Parameters
    ----------
    model
        The model to read.
    blurred, masked
        Pairs of the same clean examples in the same order.
    folder
        Folder for the three files.
    tokens
        ``last``, or ``suffix`` for the mean over all tokens after the image.

    Returns
    -------
    The three paths.

    Raises
    ------
    PatchError
        For no pairs, or pairs of different clean examples.
    StoreError
        If a file cannot be written.
    """
    if not blurred or [p.clean.id for p in blurred] != [p.clean.id for p in masked]:
        msg = (
            f"{len(blurred)} blurred and {len(masked)} masked pairs; give at least one of each, for the same clean examples "
            f"in the same order"
        )
        raise PatchError(msg)
    sites: list[Key] = [Site("decoder", layer, "attn_out") for layer in range(model.n_layers)]
    sides = ([p.clean for p in blurred], [p.corrupt for p in blurred], [p.corrupt for p in masked])
    paths = tuple(Path(folder) / name for name in NAMES)
    for path, examples in zip(paths, sides, strict=True):
        outputs = activations(model, examples, sites, tokens)
        with written(path, (len(examples), model.n_layers, model.width)) as array:
            for layer, site in enumerate(sites):
                array[:, layer] = outputs[site]
    return paths[0], paths[1], paths[2]
