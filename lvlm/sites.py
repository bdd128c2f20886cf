"""Names of places in a model: sites and heads.

Text and integers only, so that a notebook over cached activations needs no model libraries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from groundscope.core.errors import SiteError
from groundscope.core.text import nearest

Stack = Literal["vision", "projector", "decoder"]
LayerComponent = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern"]
Component = Literal[LayerComponent, "out"]

LAYER_COMPONENTS: tuple[Component, ...] = get_args(LayerComponent)
CROSS_COMPONENTS: tuple[Component, ...] = ("attn_out", "z", "q", "k", "v", "pattern")
"""Components of an attention; a layer with self-attention and cross-attention has them twice."""
_SITE = re.compile(r"^(vision|decoder)\.L(\d+)\.(cross\.)?(\w+)$")
_EVERY_LAYER = re.compile(rf"^(?:(vision|decoder)\.)?(cross\.)?({'|'.join(LAYER_COMPONENTS)})$")
_HEAD = re.compile(r"^L(\d+)\.H(\d+)$")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model, printed and parsed as ``decoder.L12.z``, ``vision.L3.resid_post`` or ``projector.out``.

    `attn_out` and `mlp_out` are the contributions to the residual stream, after any post-norm, gate or scale, so
    ``resid_pre + attn_out + mlp_out == resid_post``. `z` is the output of all heads, concatenated, before the output
    projection. Components have TransformerLens' names where it has one.

    Examples
    --------
    >>> from lvlm import Site
    >>> site = Site.parse("decoder.L12.z")
    >>> site.stack, site.layer, site.component
    ('decoder', 12, 'z')
    >>> str(Site("decoder", 3, "attn_out", cross=True))
    'decoder.L3.cross.attn_out'
    """

    stack: Stack
    layer: int
    """Layer, counted from 0; 0 for the projector, which has no layers."""
    component: Component
    cross: bool = False
    """True for cross-attention, printed as ``decoder.L3.cross.z``."""

    def __str__(self) -> str:
        if self.stack == "projector":
            return "projector.out"
        return f"{self.stack}.L{self.layer}.{'cross.' if self.cross else ''}{self.component}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site as printed; raises `SiteError` for other text."""
        if isinstance(text, str) and text == "projector.out":
            return cls("projector", 0, "out")
        match = _SITE.match(text) if isinstance(text, str) else None
        if match is None or match[4] not in LAYER_COMPONENTS:
            name = str(text).rpartition(".")[2]
            prefix = str(text).removesuffix(name)
            similar = nearest(str(text), [f"{prefix}{c}" for c in LAYER_COMPONENTS if _SITE.match(f"{prefix}{c}")])
            msg = (
                f"{text!r} is not a site; write 'projector.out' or '<vision|decoder>.L<layer>.<component>' with a component of "
                f"{', '.join(LAYER_COMPONENTS)}{similar}"
            )
            raise SiteError(msg)
        return cls(cast("Stack", match[1]), int(match[2]), cast("Component", match[4]), cross=bool(match[3]))


def parse_component(text: str) -> tuple[Stack, str, int | None]:
    """Read a component at every layer (``z``, ``cross.z``, ``vision.resid_post``) or a single site (``decoder.L3.z``).

    Returns
    -------
    tuple
        Stack (the decoder if the text names none), component (with the prefix ``cross.`` for cross-attention), and layer:
        None for every layer, and for the projector.

    Raises
    ------
    SiteError
        If the text is neither.

    Examples
    --------
    >>> from lvlm.sites import parse_component
    >>> parse_component("z"), parse_component("vision.L3.resid_post")
    (('decoder', 'z', None), ('vision', 'resid_post', 3))
    """
    match = _EVERY_LAYER.match(text) if isinstance(text, str) else None
    if match:
        return cast("Stack", match[1] or "decoder"), f"{match[2] or ''}{match[3]}", None
    try:
        site = Site.parse(text)
    except SiteError as error:
        msg = (
            f"unknown site {text!r}; give a component of the decoder ({', '.join(LAYER_COMPONENTS)}), of a named stack "
            f"('vision.z'), of cross-attention ('cross.z'), 'projector.out', or a single layer ('decoder.L3.z')"
            f"{nearest(str(text), LAYER_COMPONENTS)}"
        )
        raise SiteError(msg) from error
    component = f"{'cross.' if site.cross else ''}{site.component}"
    return site.stack, component, None if site.stack == "projector" else site.layer


@dataclass(frozen=True, order=True)
class Head:
    """An attention head of the decoder, printed and parsed as ``L12.H7``.

    Examples
    --------
    >>> from lvlm import Head
    >>> Head.parse("L12.H7")
    Head(layer=12, head=7)
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``L<layer>.H<head>``; raises `SiteError` for other text."""
        match = _HEAD.match(text) if isinstance(text, str) else None
        if match is None:
            msg = f"{text!r} is not a head; write it as text, as in 'L12.H7'"
            raise SiteError(msg)
        return cls(int(match[1]), int(match[2]))


def parse_heads(heads: Head | str | Iterable[Head | str]) -> tuple[Head, ...]:
    """Return heads that are passed as `Head` or as text, as a single head or as several, in order.

    Raises
    ------
    SiteError
        For anything else.

    Examples
    --------
    >>> from lvlm.sites import parse_heads
    >>> parse_heads("L3.H5"), parse_heads(["L3.H5", "L4.H0"])
    ((Head(layer=3, head=5),), (Head(layer=3, head=5), Head(layer=4, head=0)))
    """
    items = list(heads) if isinstance(heads, Iterable) and not isinstance(heads, str) else [heads]
    wrong = [item for item in items if not isinstance(item, Head | str)]
    if wrong:
        msg = f"{wrong[0]!r} is not a head; pass Head(layer, head), or text as in 'L12.H7'"
        raise SiteError(msg)
    return tuple(Head.parse(item) if isinstance(item, str) else item for item in items)
