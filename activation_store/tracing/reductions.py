"""Reductions of traced tokens: a few values of each token, computed while tracing, instead of its activations.

The activations of all image tokens at all layers are large: 3,000 questions x 576 tokens x 32 layers x 4,096 values are 453 GB in
16 bits. Often a few values of each are enough: the margin of a probe, or the log-probability or rank of a word under the logit
lens. A reduction maps the vectors of a token selection at a site, ``[S, D]``, to ``[S, K]``, before they leave the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from activation_store.direction import ConceptDirection
from groundscope.core.errors import ConfigError, DataError, SiteError
from groundscope.core.files import canonical_json
from groundscope.core.registry import Registry
from groundscope.core.text import format_count
from lvlm.model import Lvlm
from lvlm.site_width import site_width
from lvlm.sites import Site

_BLOCK = 1 << 24
"""Largest number of logits in memory at a time."""
_RESIDUALS = ("resid_pre", "resid_mid", "resid_post")


class Reduction(Protocol):
    """Values of each token at a site, computed while tracing.

    An object with these members can be passed to `trace`; `reductions` makes the built-in ones by name.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from activation_store import Reduction
    >>> @dataclass(frozen=True)
    ... class Norm:
    ...     name: str = "norm"
    ...     values: tuple[str, ...] = ("norm",)
    ...     def applies(self, site):
    ...         return True
    ...     def prepare(self, model, site):
    ...         return lambda x: x.float().norm(dim=-1, keepdim=True)
    ...     def record(self):
    ...         return {"method": "Euclidean norm"}
    >>> reduction: Reduction = Norm()
    """

    @property
    def name(self) -> str:
        """Name of its arrays: lower-case letters, digits, ``_`` and ``-``."""
        ...

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the K values of a token."""
        ...

    def applies(self, site: Site) -> bool:
        """Whether it can be computed at a site."""
        ...

    def prepare(self, model: Lvlm, site: Site) -> Callable[[Tensor], Tensor]:
        """Return the function from vectors ``[S, D]`` at a site to values ``[S, K]``, on the device of the vectors."""
        ...

    def record(self) -> Mapping[str, Any]:
        """Return what determines the values, as JSON values, for the provenance of the store."""
        ...


@dataclass(frozen=True, eq=False)
class Margin:
    """The margins of linear probes: ``direction.decision(x)`` for each concept.

    Raises
    ------
    SiteError
        If there is no direction, one is of a head, is repeated, or a site lacks a concept that another site has.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import ConceptDirection, Margin
    >>> dog = ConceptDirection.from_weights("decoder.L3.resid_post", "image:mean", "object:dog", np.ones(4))
    >>> Margin((dog,)).values
    ('object:dog',)
    """

    directions: Sequence[ConceptDirection]
    """One for each site and concept, such as those of a probe grid; the token selections that they were fitted at do not
    matter here."""
    name: str = "margin"

    def __post_init__(self) -> None:
        object.__setattr__(self, "directions", tuple(self.directions))
        of_heads = next((d for d in self.directions if d.head is not None), None)
        if not self.directions or of_heads is not None:
            problem = "there is no direction" if of_heads is None else f"{of_heads.site} has a direction of a head"
            msg = f"margins need directions of whole sites, but {problem}"
            raise SiteError(msg)
        places = [(d.site, d.concept) for d in self.directions]
        for site in dict.fromkeys(d.site for d in self.directions):
            for concept in self.values:
                if (count := places.count((site, concept))) != 1:
                    msg = f"'{concept}' has {count} directions at {site}; give one for each concept at each site"
                    raise SiteError(msg)

    @property
    def values(self) -> tuple[str, ...]:
        """The concepts, in the order of the directions."""
        return tuple(dict.fromkeys(d.concept for d in self.directions))

    def applies(self, site: Site) -> bool:
        """Whether there are directions at the site."""
        return any(Site.parse(d.site) == site for d in self.directions)

    def prepare(self, model: Lvlm, site: Site) -> Callable[[Tensor], Tensor]:
        """Return the function from vectors ``[S, D]`` to margins ``[S, K]``, computed in float32.

        Raises
        ------
        SiteError
            If the directions have another width than the site.
        """
        here = {d.concept: d for d in self.directions if Site.parse(d.site) == site}
        chosen = [here[concept] for concept in self.values]
        width = site_width(model, site)
        wrong = next((d for d in chosen if len(d.vector) != width), None)
        if wrong is not None:
            size = format_count(len(wrong.vector), "value")
            msg = f"the direction for '{wrong.concept}' at {site} has {size}, the site {width}"
            raise SiteError(msg)
        matrix = torch.from_numpy(np.stack([d.scale * d.vector for d in chosen], axis=1).astype(np.float32))  # [D, K]
        offset = torch.tensor([d.intercept for d in chosen])
        return lambda x: x.float() @ matrix.to(x.device) + offset.to(x.device)

    def record(self) -> Mapping[str, Any]:
        """Return the digest of the directions, and the stores that they were fitted on."""
        digest = hashlib.sha256()
        for d in self.directions:
            digest.update(canonical_json([d.site, d.concept, d.scale, d.intercept]).encode())
            digest.update(np.ascontiguousarray(d.vector, dtype="<f4").tobytes())
        stores = sorted({str(d.provenance["store"]) for d in self.directions if "store" in d.provenance})
        return {"method": "probe margins", "directions": digest.hexdigest(), "stores": stores}


@dataclass(frozen=True)
class LensLogProbability:
    """The log-probability of words under the logit lens (nostalgebraist 2020; at image tokens Neo et al., arXiv 2410.07149).

    ``log softmax(W_U norm(h))`` over the whole vocabulary, with the model's own final norm and unembedding, in nats.

    Examples
    --------
    >>> from activation_store import LensLogProbability
    >>> LensLogProbability(("dog", "cat")).values
    ('dog', 'cat')
    """

    words: Sequence[str]
    """Words of one token after a space (`word_token`)."""
    name: str = "log_p"

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", _distinct(self.words))

    @property
    def values(self) -> tuple[str, ...]:
        """The words."""
        return tuple(self.words)

    def applies(self, site: Site) -> bool:
        """Whether the site is the residual stream of the decoder."""
        return _is_residual(site)

    def prepare(self, model: Lvlm, site: Site) -> Callable[[Tensor], Tensor]:
        """Return the function from residuals ``[S, D]`` to log-probabilities ``[S, K]``; raises `DataError` as `word_token`."""
        ids = [word_token(model, word) for word in self.words]
        return _lens(model, lambda logits: logits[:, ids] - logits.logsumexp(-1, keepdim=True))

    def record(self) -> Mapping[str, Any]:
        """Return the words."""
        return {"method": "log-probability under the logit lens, in nats", "words": list(self.words)}


@dataclass(frozen=True)
class LensRank:
    """The rank of words under the logit lens: 1 for the most probable token of the vocabulary (`LensLogProbability`).

    Examples
    --------
    >>> from activation_store import LensRank
    >>> LensRank(("dog",)).name
    'rank'
    """

    words: Sequence[str]
    """Words of one token after a space (`word_token`)."""
    name: str = "rank"

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", _distinct(self.words))

    @property
    def values(self) -> tuple[str, ...]:
        """The words."""
        return tuple(self.words)

    def applies(self, site: Site) -> bool:
        """Whether the site is the residual stream of the decoder."""
        return _is_residual(site)

    def prepare(self, model: Lvlm, site: Site) -> Callable[[Tensor], Tensor]:
        """Return the function from residuals ``[S, D]`` to ranks ``[S, K]``; raises `DataError` as `word_token`."""
        ids = [word_token(model, word) for word in self.words]

        def rank(logits: Tensor) -> Tensor:
            above = [(logits > logits[:, i, None]).sum(-1) for i in ids]
            return torch.stack(above, dim=-1).float() + 1

        return _lens(model, rank)

    def record(self) -> Mapping[str, Any]:
        """Return the words."""
        return {"method": "rank under the logit lens, 1 for the most probable token", "words": list(self.words)}


def word_token(model: Lvlm, word: str) -> int:
    """Return the token of a word after a space.

    Raises
    ------
    DataError
        If the tokenizer does not know the word, or splits it.

    Examples
    --------
    >>> import groundscope as gs
    >>> from activation_store.tracing.reductions import word_token
    >>> model = gs.load_lvlm("tiny")
    >>> model.processor.tokenizer.convert_ids_to_tokens(word_token(model, "apple"))
    'apple'
    """
    tokenizer = model.processor.tokenizer
    # After another word, since some tokenizers put a space before the first word themselves.
    before, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a {word}"))
    ids = list(both[len(before) :])
    if len(ids) != 1 or list(both[: len(before)]) != list(before) or ids[0] == tokenizer.unk_token_id:
        in_vocabulary = ids and tokenizer.unk_token_id not in ids
        problem = f"has {len(ids)} tokens, {tokenizer.convert_ids_to_tokens(ids)}" if in_vocabulary else "is unknown"
        msg = f"'{word}' {problem} for the tokenizer of {model.name}; the logit lens reads words of one token"
        raise DataError(msg)
    return ids[0]


def _distinct(words: Iterable[str]) -> tuple[str, ...]:
    names = (words,) if isinstance(words, str) else tuple(words)
    if not names or len(set(names)) < len(names):
        msg = f"words={list(names)}: give at least one word, and each once"
        raise ConfigError(msg)
    return names


def _is_residual(site: Site) -> bool:
    return site.stack == "decoder" and site.component in _RESIDUALS and not site.cross


def _lens(model: Lvlm, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function that applies `read` to the logits of residuals, in blocks; NaN where a residual is NaN."""

    def values(x: Tensor) -> Tensor:
        vocabulary = int(model.unembed(x[:1].to(model.dtype)).shape[-1]) if len(x) else 1
        step = max(1, _BLOCK // vocabulary)
        parts = [read(model.unembed(part.to(model.dtype)).float()) for part in x.split(step)]
        result = torch.cat(parts)
        return result.masked_fill(x.isnan().any(-1, keepdim=True).to(result.device), torch.nan)

    return values


def _margins(directions: Sequence[ConceptDirection | str | Path], name: str = "margin") -> Margin:
    loaded = [d if isinstance(d, ConceptDirection) else ConceptDirection.load(d) for d in directions]
    return Margin(tuple(loaded), name)


reductions: Registry[Callable[..., Reduction]] = Registry(
    "reduction",
    {"margin": _margins, "log_p": LensLogProbability, "rank": LensRank},
    group="groundscope.reductions",
)
"""Makers of reductions by name, which the option ``trace.reduce`` of runs calls with its further options."""
