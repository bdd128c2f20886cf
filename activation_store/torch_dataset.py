"""A store as a torch dataset: items are read on access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from activation_store.reading.store import ActivationStore


class StoreDataset(Dataset[tuple[Tensor, Tensor]]):
    """Items (activation float32 [D], labels float32 [K]) of selected rows of a store; undefined labels are NaN.

    Created by `ActivationStore.torch`.
    """

    def __init__(
        self,
        store: ActivationStore,
        site: str,
        tokens: str,
        labels: tuple[str, ...],
        head: int | None,
        rows: np.ndarray,
    ) -> None:
        self._store, self._place, self._rows = store, (site, tokens, head), rows
        columns = [store.columns[name].astype(np.float32) for name in labels] if len(store) else []
        self._labels = np.concatenate([np.empty((len(store), 0), np.float32), *(c[:, None] for c in columns)], axis=1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return several items; `torch.utils.data.DataLoader` calls this for a batch."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        site, tokens, head = self._place
        values = torch.from_numpy(self._store.read(site, tokens, head, rows))
        return list(zip(values, torch.from_numpy(self._labels[rows]), strict=True))
