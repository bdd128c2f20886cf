"""The interface that analyses need of a store, so that they also run on arrays in memory or on a modified store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from activation_store.format.schema import ArrayInfo
    from activation_store.reading.rows import RowSelection


class ActivationSource(Protocol):
    """Activations by site, token selection and example, with the table of examples.

    `activation_store.ActivationStore` implements it. Probes and derivations of steering vectors accept any object with
    these members.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from activation_store import ActivationSource, ArrayInfo
    >>> class Memory:
    ...     arrays = (ArrayInfo("decoder", "resid_post", "last", n_layers=1, width=2),)
    ...     digest, provenance = "0" * 64, {}
    ...     def frame(self):
    ...         return pd.DataFrame({"id": ["a", "b"], "group": ["g", "h"], "object:cat": [1.0, 0.0]})
    ...     def read(self, site, tokens, head=None, examples=None):
    ...         values = np.eye(2, dtype=np.float32)
    ...         return values if examples is None else values[examples]
    >>> source: ActivationSource = Memory()
    >>> source.read("decoder.L0.resid_post", "last", examples=[1])
    array([[0., 1.]], dtype=float32)
    """

    @property
    def arrays(self) -> Sequence[ArrayInfo]:
        """The arrays, one per stack, component and token selection."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the contents."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Origin of the activations; ``model`` has the name, the config hash and the weights digest."""
        ...

    def frame(self) -> pd.DataFrame:
        """Return the example table: id, group, and a label column per concept (NaN where undefined)."""
        ...

    def read(self, site: Any, tokens: Any, head: int | None = None, examples: RowSelection | None = None) -> np.ndarray:
        """Return float32 [n, D], or [n, head_dim] with `head`; a row is NaN if its token selection was empty."""
        ...
