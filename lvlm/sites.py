"""Names for places in a model: sites, heads, and selections of tokens.

Pure text and integers, so that a notebook over cached activations needs no model stack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from concepts.errors import SiteError

Stack = Literal["vision", "projector", "decoder"]
Component = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "out"]

LAYER_COMPONENTS: tuple[Component, ...] = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "pattern",
)
_SITE = re.compile(r"^(vision|decoder)\.L(\d+)\.(cross\.)?(\w+)$")
_HEAD = re.compile(r"^L(\d+)\.H(\d+)$")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model; prints and parses as ``decoder.L12.z``, ``vision.L3.resid_post``, ``projector.out``.

    `attn_out` and `mlp_out` are the true residual contributions, after any post-norm, gate or scale, so that
    ``resid_pre + attn_out + mlp_out == resid_post``. `z` is the per-head output before the output projection, heads
    side by side. Names follow TransformerLens where it has one.
    """

    stack: Stack
    layer: int
    """Layer counted from 0; 0 for the projector, which has no layers."""
    component: Component
    cross: bool = False
    """True for a cross-attention layer, printed ``decoder.L3.cross.z``."""

    def __str__(self) -> str:
        if self.stack == "projector":
            return "projector.out"
        return f"{self.stack}.L{self.layer}.{'cross.' if self.cross else ''}{self.component}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site as printed; raises `SiteError` naming what is wrong."""
        if text == "projector.out":
            return cls("projector", 0, "out")
        match = _SITE.match(text)
        if match is None or match[4] not in LAYER_COMPONENTS:
            msg = (
                f"'{text}' is not a site: write 'projector.out' or '<vision|decoder>.L<layer>.<component>' "
                f"with a component of {', '.join(LAYER_COMPONENTS)}"
            )
            raise SiteError(msg)
        return cls(cast("Stack", match[1]), int(match[2]), cast("Component", match[4]), cross=bool(match[3]))


@dataclass(frozen=True, order=True)
class Head:
    """An attention head of the decoder: its slice of the input of the output projection; prints as ``L12.H7``."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``L<layer>.H<head>``; raises `SiteError` for any other form."""
        match = _HEAD.match(text)
        if match is None:
            msg = f"'{text}' is not a head: write it as in 'L12.H7'"
            raise SiteError(msg)
        return cls(int(match[1]), int(match[2]))


ROLES = ("bos", "system", "image", "question", "object", "last", "answer", "generated")
REDUCTIONS = ("mean", "all")


@dataclass(frozen=True, order=True)
class TokenSelection:
    """Which tokens of an example, and how they become one vector; prints as ``last``, ``image:mean``, ``image:all``.

    ``object`` is the object the question is about: the image tokens whose patch overlaps its box. Where the example
    has no such object the selection is empty and a store holds NaN for it.
    """

    role: str
    reduction: Literal["mean", "all"] | None = None
    """None for a single token, ``mean`` over the role's tokens, ``all`` to keep them (ragged)."""

    def __str__(self) -> str:
        return self.role if self.reduction is None else f"{self.role}:{self.reduction}"

    @classmethod
    def parse(cls, text: str) -> TokenSelection:
        """Read a selection as printed; raises `SiteError` naming the roles and reductions there are."""
        role, _, reduction = text.partition(":")
        single = role in {"last", "bos"}
        if role not in ROLES or (single and reduction) or (not single and reduction not in REDUCTIONS):
            msg = (
                f"'{text}' is not a token selection: write 'last', 'bos', or a role of {', '.join(ROLES)} "
                f"with ':mean' or ':all', as in 'image:mean'"
            )
            raise SiteError(msg)
        return cls(role, cast("Literal['mean', 'all'] | None", reduction or None))
