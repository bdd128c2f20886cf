"""Activations at every image token of some images, read from the model site by site within a stated memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.execution.memory import batch_rows
from concepts.schema import Example
from lvlm.encoding.encode import Encoding
from lvlm.model import Lvlm
from lvlm.sites import Site
from lvlm.token_selection import ALL_IMAGE_TOKENS, TokenSelection

MEMORY = 1 << 30
"""Largest number of bytes of activations that are held at a time; more sites are read in several passes over the images."""
MAX_WIDTH = 512
"""Wider activations are projected to this many principal components of the image tokens of the first batch."""
_BATCH = 32


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """Activations at the image tokens of some images, at one site."""

    site: str
    number: Mapping[str, int]
    """Identity of an image to its index."""
    values: Tensor
    """float32 ``[images, T, k]``, padded with 0 to the largest number of tokens."""
    mask: Tensor
    """bool ``[images, T]``: whether a token belongs to the image."""
    basis: np.ndarray | None
    """``[D, k]`` with orthonormal columns if activations were projected; None if k is the width of the site."""

    def widen(self, weights: np.ndarray) -> np.ndarray:
        """Return weights ``[k, …]`` as weights on activations of the site, ``[D, …]``."""
        return weights if self.basis is None else self.basis @ weights


@torch.no_grad()
def read_image_tokens(
    model: Lvlm, examples: Sequence[Example], sites: Sequence[str], *, memory: int = MEMORY
) -> Iterator[ImageTokens]:
    """Yield for each site the activations at all image tokens; tokens before the question do not depend on it.

    Parameters
    ----------
    model
        The model.
    examples
        One example for each image; further examples of an image are ignored.
    sites
        Sites of residual streams, and ``projector.out``.
    memory
        Largest number of bytes of activations at a time, for at least one site.
    """
    images = list({e.image.identity: e for e in examples}.values())
    remaining = list(sites)
    while remaining and images:
        part = remaining[: _sites_at_a_time(model, images, remaining[0], memory)]
        remaining = remaining[len(part) :]
        yield from _read_sites(model, images, part)


def _read_sites(model: Lvlm, images: Sequence[Example], sites: Sequence[str]) -> Iterator[ImageTokens]:
    """Yield the activations at some sites, read in one pass over the images."""
    number = {e.image.identity: i for i, e in enumerate(images)}
    everything = TokenSelection.parse(ALL_IMAGE_TOKENS)
    rows: dict[str, list[Tensor]] = {site: [torch.empty(0)] * len(images) for site in sites}
    basis: dict[str, Tensor] = {}
    for batch in model.batches(images, batch_rows(model, images, _BATCH)):
        encodings = batch.encodings

        def keep(site: Site, values: Tensor, encodings: Sequence[Encoding] = encodings) -> None:
            each = [
                values[row, list(encoding.tokens.positions(everything, site.stack))].float().cpu()
                for row, encoding in enumerate(encodings)
            ]
            name = str(site)
            if each[0].shape[1] > MAX_WIDTH:
                if name not in basis:
                    basis[name] = _principal(torch.cat(each))
                each = [x @ basis[name] for x in each]
            for x, encoding in zip(each, encodings, strict=True):
                rows[name][number[encoding.example.image.identity]] = x

        model.read(batch.inputs, sites, take=keep)
    for site in sites:
        lengths = torch.tensor([len(x) for x in rows[site]])
        values = torch.nn.utils.rnn.pad_sequence(rows.pop(site), batch_first=True)
        mask = torch.arange(values.shape[1])[None] < lengths[:, None]
        yield ImageTokens(site, number, values, mask, basis[site].numpy() if site in basis else None)


@torch.no_grad()
def read_picked_tokens(
    model: Lvlm, examples: Sequence[Example], picked: Mapping[str, Mapping[int, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return activations at some image tokens of each image, float32 ``[images, P, D]`` by site.

    `picked` has for each site and image, by its index in the examples, the indices of P image tokens.
    """
    number = {e.image.identity: i for i, e in enumerate(examples)}
    everything = TokenSelection.parse(ALL_IMAGE_TOKENS)
    rows: dict[str, list[np.ndarray]] = {site: [np.empty(0)] * len(examples) for site in picked}
    for batch in model.batches(list(examples), batch_rows(model, examples, _BATCH)):
        encodings = batch.encodings

        def keep(site: Site, values: Tensor, encodings: Sequence[Encoding] = encodings) -> None:
            for row, encoding in enumerate(encodings):
                image = number[encoding.example.image.identity]
                at = np.array(encoding.tokens.positions(everything, site.stack))[picked[str(site)][image]]
                rows[str(site)][image] = values[row, at.tolist()].float().cpu().numpy()

        model.read(batch.inputs, list(picked), take=keep)
    return {site: np.stack(values) for site, values in rows.items()}


def _sites_at_a_time(model: Lvlm, images: Sequence[Example], site: str, memory: int) -> int:
    """Return how many sites fit into memory, judged by the tokens of the first image at one site; at least one."""
    tokens = len(
        model.encode(images[0]).tokens.positions(TokenSelection.parse(ALL_IMAGE_TOKENS), Site.parse(site).stack)
    )
    return max(1, memory // max(1, 4 * len(images) * tokens * min(model.width, MAX_WIDTH)))


def _principal(x: Tensor) -> Tensor:
    """Return the first `MAX_WIDTH` principal axes of tokens ``[n, D]`` around 0, as columns ``[D, k]``."""
    sample = x[torch.linspace(0, len(x) - 1, min(len(x), 4 * MAX_WIDTH)).long()].double()
    _, _, axes = torch.linalg.svd(sample, full_matrices=False)
    return axes[:MAX_WIDTH].T.float().contiguous()
