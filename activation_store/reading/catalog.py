"""Find the array, layer and columns of a site, token selection and head; errors list the traced alternatives."""

from __future__ import annotations

from collections.abc import Sequence

from activation_store.format.schema import ArrayInfo
from groundscope.core.errors import SiteError
from groundscope.core.text import nearest
from lvlm.sites import Site
from lvlm.token_selection import TokenSelection


class Catalog:
    """The arrays of a store."""

    def __init__(self, arrays: Sequence[ArrayInfo]) -> None:
        self._arrays = tuple(a for a in arrays if not a.reduction)
        self._reduced = tuple(a for a in arrays if a.reduction)
        self._by_key = {a.key: a for a in arrays}
        self._cache: dict[tuple[object, object, int | None, str], tuple[ArrayInfo, int, slice]] = {}

    def has(self, stack: str, component: str, tokens: str | TokenSelection) -> bool:
        """Whether an array was traced."""
        return (stack, component, str(tokens)) in self._by_key

    def family(self, stack: str, component: str) -> list[ArrayInfo]:
        """Return the arrays of a component, one per token selection; raise `SiteError` if it has none."""
        family = [a for a in self._arrays if (a.stack, a.component) == (stack, component)]
        if not family:
            name = f"{stack}.{component}"
            similar = nearest(name, dict.fromkeys(f"{a.stack}.{a.component}" for a in self._arrays))
            names = {a.reduction: "" for a in self._reduced if (a.stack, a.component) == (stack, component)}
            reduced = f" (reduced only: reduction={' or '.join(map(repr, names))})" if names else ""
            msg = f"'{name}' not in store{reduced}: {self._traced_components()}; trace again with sites=['{name}']{similar}"
            raise SiteError(msg)
        return family

    def heads(self, stack: str) -> tuple[int, ...]:
        """Return the numbers of the traced heads of a stack; raise `SiteError` if no z was traced in it."""
        heads = [a.head_numbers for a in self._arrays if a.stack == stack and a.component == "z" and a.n_heads]
        if not heads:
            msg = f"heads of '{stack}' not in store: its z was not traced; {self._traced_components()}; trace again with z"
            raise SiteError(msg)
        return heads[0]

    def find(
        self, site: str | Site, tokens: str | TokenSelection, head: int | None = None, reduction: str = ""
    ) -> tuple[ArrayInfo, int, slice]:
        """Return the array, the index of the layer along its second axis, and the columns of the head (None: all).

        With `reduction` the array of its values.

        Raises
        ------
        SiteError
            If the site, token selection or head is not in the store; the message lists the traced ones.
        """
        query = (site, tokens, head, reduction)
        if query not in self._cache:  # parsing takes longer than reading a head from memory
            self._cache[query] = (
                self._look_up_reduced(site, tokens, head, reduction) if reduction else self._look_up(site, tokens, head)
            )
        return self._cache[query]

    def _look_up(
        self, site: str | Site, tokens: str | TokenSelection, head: int | None
    ) -> tuple[ArrayInfo, int, slice]:
        place = site if isinstance(site, Site) else Site.parse(site)
        component = f"cross.{place.component}" if place.cross else place.component
        family = self.family(place.stack, component)
        selection = str(tokens if isinstance(tokens, TokenSelection) else TokenSelection.parse(tokens))
        info = self._by_key.get((place.stack, component, selection))
        if info is None:
            traced = ", ".join(f"'{a.tokens}'" for a in family)
            msg = (
                f"token selection '{selection}' of site '{place}' not in store: {traced} were traced; "
                f"{self._reduced_hint(place, selection)}trace again with tokens=['{selection}']"
                f"{nearest(selection, [a.tokens for a in family])}"
            )
            raise SiteError(msg)
        if place.layer not in info.layers:
            msg = (
                f"site '{place}' not in store: layers {layer_range(info.layers)} were traced; "
                f"trace again with sites=['{place}'] if the model has it"
            )
            raise SiteError(msg)
        return info, info.layers.index(place.layer), _head_slice(info, str(site), head)

    def _look_up_reduced(
        self, site: str | Site, tokens: str | TokenSelection, head: int | None, reduction: str
    ) -> tuple[ArrayInfo, int, slice]:
        place = site if isinstance(site, Site) else Site.parse(site)
        component = f"cross.{place.component}" if place.cross else place.component
        selection = str(tokens if isinstance(tokens, TokenSelection) else TokenSelection.parse(tokens))
        info = self._by_key.get((place.stack, f"{component}|{reduction}", selection))
        if info is None or place.layer not in info.layers:
            stored = [
                f"{a.reduction} of {a.tokens} at {a.stack}.{a.component}, layers {layer_range(a.layers)}"
                for a in self._reduced
            ]
            msg = (
                f"reduction '{reduction}' of '{selection}' at '{place}' not in store; it has {'; '.join(stored) or 'none'}; "
                "trace again with reduce="
            )
            raise SiteError(msg)
        if head is not None:
            msg = f"reduction '{reduction}' has values of whole sites; omit head={head}"
            raise SiteError(msg)
        return info, info.layers.index(place.layer), slice(0, info.width)

    def _reduced_hint(self, place: Site, selection: str) -> str:
        component = f"cross.{place.component}" if place.cross else place.component
        names = [
            a.reduction
            for a in self._reduced
            if (a.stack, a.component, a.tokens) == (place.stack, component, selection)
        ]
        return f"read its reduced values with reduction={' or '.join(map(repr, names))}, or " if names else ""

    def _traced_components(self) -> str:
        names = dict.fromkeys(f"{a.stack}.{a.component}" for a in self._arrays)
        return f"{', '.join(names) or 'no activations'} were traced"


def _head_slice(info: ArrayInfo, site: str, head: int | None) -> slice:
    if head is None:
        return slice(0, info.width)
    dim = info.head_dim
    if dim is None or info.n_heads is None:
        msg = f"site '{site}' has no heads, so head={head} cannot be read; heads are in 'z'"
        raise SiteError(msg)
    if head not in info.head_numbers:
        remedy = f"; trace again with heads=[{head}] if the model has it" if info.heads else ""
        msg = f"head {head} of site '{site}' not in store: it has heads {layer_range(info.head_numbers)}{remedy}"
        raise SiteError(msg)
    index = info.head_numbers.index(head)
    return slice(index * dim, (index + 1) * dim)


def layer_range(layers: Sequence[int]) -> str:
    """Format numbers of layers or heads: ``0-31`` for a contiguous range, otherwise a list."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))
