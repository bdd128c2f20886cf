"""The logit lens on the residuals of a store: log-probabilities of the model's own unembedding, without the model.

A store of decoder sites also holds the parameters of the final norm and the unembedding (``final_norm.weight``,
``unembedding.weight`` and biases, if any). The mapping from words to rows of the unembedding is the tokenizer's vocabulary:
the caller passes it, or saves it next to the store with `keep_vocabulary`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from activation_store.source import ActivationSource
from concepts.concept import Concept
from groundscope.core.errors import ProbeError, SiteError
from groundscope.core.files import write_whole
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count, nearest
from groundscope.core.user_files import read_json
from probes.protocol.inputs import ProbedArray, find_array, read_features, read_groups, read_labels, row_mask
from probes.protocol.scoring import auc, auc_interval, bootstrap_auc, resample_groups

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 4_000_000
"""Maximum number of logits in memory."""


class TensorSource(ActivationSource, Protocol):
    """An activation source with model-level arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes.analysis.logit_lens import TensorSource, Unembedding
    >>> class Memory(MemorySource):
    ...     tensors = ("final_norm.weight", "unembedding.weight")
    ...     def tensor(self, name):
    ...         return np.ones(2, np.float32) if name == "final_norm.weight" else np.eye(2, dtype=np.float32)
    >>> source: TensorSource = Memory({"resid_post": np.ones((1, 1, 2))}, {"id": ["a"], "group": ["g"]})
    >>> Unembedding.of(source).norm
    'rms'
    """

    def tensor(self, name: str) -> np.ndarray:
        """Return one model-level array."""
        ...

    @property
    def tensors(self) -> Sequence[str]:
        """Names of the model-level arrays."""
        ...


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The final norm and the unembedding of a decoder.

    Examples
    --------
    >>> import numpy as np
    >>> from probes.analysis.logit_lens import Unembedding
    >>> head = Unembedding(np.eye(2, dtype=np.float32), np.ones(2, np.float32), None, None, "rms", 0.0)
    >>> head.logits(np.array([[3.0, 0.0]])).round(4)
    array([[1.4142, 0.    ]], dtype=float32)
    """

    matrix: np.ndarray
    """float32 [V, D]."""
    scale: np.ndarray
    """float32 [D]: weight of the norm."""
    shift: np.ndarray | None
    bias: np.ndarray | None
    norm: Literal["rms", "layer"]
    epsilon: float

    __repr__ = short_repr

    @classmethod
    def of(
        cls,
        store: TensorSource,
        norm: Literal["rms", "layer"] | None = None,
        epsilon: float = 1e-6,
        offset: float = 0.0,
    ) -> Unembedding:
        """Read the parameters from a store.

        Parameters
        ----------
        norm
            ``rms`` or ``layer``; by default layer norm if the norm has a bias.
        epsilon
            Added under the square root; see the model's configuration.
        offset
            Added to the norm's weight: 1 for Gemma, whose weights are stored as differences from 1.

        Raises
        ------
        ProbeError
            If the store does not have them.
        """
        names = set(store.tensors)
        missing = {"final_norm.weight", "unembedding.weight"} - names
        if missing:
            msg = (
                f"the store has no {' and no '.join(sorted(missing))} (it has {', '.join(sorted(names)) or 'none'}); "
                "trace a site of the decoder with unembedding=True, in a run trace.unembedding=true"
            )
            raise ProbeError(msg)
        shift = store.tensor("final_norm.bias") if "final_norm.bias" in names else None
        bias = store.tensor("unembedding.bias") if "unembedding.bias" in names else None
        kind = norm or ("rms" if shift is None else "layer")
        return cls(
            store.tensor("unembedding.weight"), store.tensor("final_norm.weight") + offset, shift, bias, kind, epsilon
        )

    def logits(self, residual: np.ndarray) -> np.ndarray:
        """Return logits float32 [n, V] of residuals [n, D], after one application of the final norm.

        A store's ``resid_post`` of the last layer is not normalized; the last of a Hugging Face model's ``hidden_states`` is.
        """
        x = np.asarray(residual, dtype=np.float64)
        if x.shape[-1] != self.matrix.shape[1]:
            msg = f"residuals have width {x.shape[-1]}, the unembedding needs {self.matrix.shape[1]}; use decoder residuals"
            raise ProbeError(msg)
        if self.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon) * self.scale
        if self.shift is not None:
            x = x + self.shift
        out = x.astype(np.float32) @ self.matrix.T
        return out if self.bias is None else out + self.bias


def keep_vocabulary(store: str | Path, vocabulary: Mapping[str, int]) -> Path:
    """Save the mapping from words to rows of the unembedding next to a store, as ``<store>.vocabulary.json``.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from probes.analysis.logit_lens import keep_vocabulary, read_vocabulary
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = keep_vocabulary(Path(folder) / "activations", {"dog": 1, "cat": 0})
    ...     path.name, read_vocabulary(Path(folder) / "activations")
    ('activations.vocabulary.json', {'cat': 0, 'dog': 1})
    """
    path = _vocabulary_path(store)
    words = {str(k): int(v) for k, v in sorted(vocabulary.items())}
    write_whole(path, json.dumps(words, ensure_ascii=False, indent=0).encode())
    return path


def read_vocabulary(store: str | Path) -> dict[str, int]:
    """Read the vocabulary that `keep_vocabulary` saved; raise `ProbeError` if it is missing or damaged.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from probes.analysis.logit_lens import keep_vocabulary, read_vocabulary
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = keep_vocabulary(Path(folder) / "activations", {"dog": 1, "cat": 0})
    ...     path.name, read_vocabulary(Path(folder) / "activations")
    ('activations.vocabulary.json', {'cat': 0, 'dog': 1})
    """
    path = _vocabulary_path(store)
    try:
        vocabulary = read_json(path, error=ProbeError)
    except FileNotFoundError as error:
        msg = f"no vocabulary at {path}: save it with probes.analysis.logit_lens.keep_vocabulary(store, tokenizer.get_vocab())"
        raise ProbeError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror or error}"
        raise ProbeError(msg) from error
    if not isinstance(vocabulary, dict) or not all(isinstance(v, int) for v in vocabulary.values()):
        msg = f"{path} is not a vocabulary: it must map words to numbers"
        raise ProbeError(msg)
    return vocabulary


def logit_lens(
    store: TensorSource,
    words: Sequence[str],
    vocabulary: Mapping[str, int],
    site: str = "resid_post",
    *,
    tokens: str = "image:mean",
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    unembedding: Unembedding | None = None,
) -> dict[int, np.ndarray]:
    """Return the log-probability of words at every layer (Neo et al. 2410.07149: at image tokens).

    ``log softmax(W_U norm(h))`` over the whole vocabulary, layer by layer from the store.

    Parameters
    ----------
    store
        A store of decoder sites.
    words, vocabulary
        The words to read, and the row of the unembedding of each word.
    site
        A residual site of the decoder: a component at every layer, or a single layer.
    tokens
        A token selection.
    rows
        Boolean mask over the examples to read.
    unembedding
        By default from the store (`Unembedding.of`).

    Returns
    -------
    float32 [n, words] by layer; a row is NaN if its token selection was empty.

    Raises
    ------
    SiteError
        If the store has no such array.
    ProbeError
        If a word is not in the vocabulary, or the store has no unembedding.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes.analysis.logit_lens import Unembedding, logit_lens
    >>> x = np.array([[[2.0, 0.0]], [[0.0, 2.0]], [[2.0, 0.0]], [[0.0, 2.0]]])
    >>> table = {"id": range(4), "group": range(4), "object:cat": [1, 0, 1, 0]}
    >>> store = MemorySource({("resid_post", "image:mean"): x}, table)
    >>> head = Unembedding(np.eye(2, dtype=np.float32), np.ones(2, np.float32), None, None, "rms", 0.0)
    >>> logit_lens(store, ["cat"], {"cat": 0, "dog": 1}, unembedding=head)[0][:, 0].round(2)
    array([-0.22, -1.63, -0.22, -1.63], dtype=float32)
    """
    head = unembedding or Unembedding.of(store)
    array, mask, ids = _select(store, site, tokens, rows)
    numbers = _numbers(words, vocabulary, len(head.matrix))
    return dict(_read(store, array, mask, ids, head, numbers))


def object_readout(
    store: TensorSource,
    concepts: Sequence[str],
    vocabulary: Mapping[str, int],
    site: str = "resid_post",
    *,
    tokens: str = "image:mean",
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    unembedding: Unembedding | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score, at every layer, how well the logit lens on a concept's name predicts its labels; nothing is fitted.

    The score of an example is the log-probability of the concept's name (``apple`` of ``object:apple``) at the selection.

    Returns
    -------
    One row per concept and layer: auc with its interval over groups, mean log-probability where the concept is true
    (``present``) and where it is not (``absent``), and n.

    Raises
    ------
    SiteError
        If the store has no such array.
    ProbeError
        If a concept is not in the store, its name is not in the vocabulary, or the store has no unembedding.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes.analysis.logit_lens import Unembedding, object_readout
    >>> x = np.array([[[2.0, 0.0]], [[0.0, 2.0]], [[2.0, 0.0]], [[0.0, 2.0]]])
    >>> table = {"id": range(4), "group": range(4), "object:cat": [1, 0, 1, 0]}
    >>> store = MemorySource({("resid_post", "image:mean"): x}, table)
    >>> head = Unembedding(np.eye(2, dtype=np.float32), np.ones(2, np.float32), None, None, "rms", 0.0)
    >>> found = object_readout(store, ["object:cat"], {"cat": 0, "dog": 1}, unembedding=head, resamples=20)
    >>> found[["concept", "layer", "auc", "present", "absent"]].round(2)
          concept  layer  auc  present  absent
    0  object:cat      0  1.0    -0.22   -1.63
    """
    import pandas as pd

    head = unembedding or Unembedding.of(store)
    frame = store.frame()
    array, mask, ids = _select(store, site, tokens, rows)
    labels = read_labels(frame, concepts)[mask]
    groups = read_groups(frame)[mask]
    numbers = _numbers([Concept.parse(c).name for c in concepts], vocabulary, len(head.matrix))
    table: list[dict[str, Any]] = []
    for layer, log_probs in _read(store, array, mask, ids, head, numbers):
        for k, concept in enumerate(concepts):
            used = ~np.isnan(labels[:, k]) & ~np.isnan(log_probs[:, k])
            truth, score = labels[used, k], log_probs[used, k].astype(np.float64)
            names, of_row = np.unique(groups[used], return_inverse=True)
            draws = bootstrap_auc(truth, score, of_row, resample_groups(names, resamples, [seed, k]))
            area = auc(truth, score)
            (low,), (high,) = auc_interval(truth, np.array([area]), draws[:, None], of_row, len(names), confidence)
            present, absent = (score[truth == v] for v in (1, 0))
            table.append(
                {
                    "concept": concept,
                    "layer": layer,
                    "auc": area,
                    "auc_low": float(low),
                    "auc_high": float(high),
                    "present": float(present.mean()) if len(present) else np.nan,
                    "absent": float(absent.mean()) if len(absent) else np.nan,
                    "n": len(truth),
                }
            )
    return pd.DataFrame(table).sort_values(["concept", "layer"], ignore_index=True)


def _vocabulary_path(store: str | Path) -> Path:
    path = Path(store)
    return path.with_name(f"{path.name}.vocabulary.json")


def _select(
    store: ActivationSource, site: str, tokens: str, rows: Sequence[bool] | np.ndarray | pd.Series | None
) -> tuple[ProbedArray, np.ndarray, np.ndarray]:
    """Return the array, the mask of the rows to read, and their ids."""
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    array = find_array(store, site, tokens, heads=False)
    if array.stack != "decoder":
        msg = f"'{site}' is a site of the {array.stack}; the unembedding reads residuals of the decoder, such as resid_post"
        raise SiteError(msg)
    return array, mask, frame["id"].to_numpy()[mask]


def _numbers(words: Sequence[str], vocabulary: Mapping[str, int], size: int) -> list[int]:
    missing = [w for w in words if w not in vocabulary]
    if missing:
        msg = (
            f"{', '.join(map(repr, missing))} not in the vocabulary of {len(vocabulary)} words; use words of one token"
            f"{nearest(missing[0], vocabulary)}"
        )
        raise ProbeError(msg)
    numbers = [int(vocabulary[w]) for w in words]
    outside = [w for w, number in zip(words, numbers, strict=True) if not 0 <= number < size]
    if outside:
        msg = (
            f"{outside[0]!r} is number {vocabulary[outside[0]]} of an unembedding of {format_count(size, 'row')}; use "
            "the model's vocabulary"
        )
        raise ProbeError(msg)
    return numbers


def _read(
    store: ActivationSource,
    array: ProbedArray,
    mask: np.ndarray,
    ids: np.ndarray,
    head: Unembedding,
    numbers: Sequence[int],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each layer with log-probabilities float32 [n, words], computed in blocks of rows."""
    step = max(1, _BLOCK // len(head.matrix))
    for layer in array.layers:
        x = read_features(store, array, layer, mask, ids)
        out = np.full((len(x), len(numbers)), np.nan, np.float32)
        for start in range(0, len(x), step):
            logits = head.logits(x[start : start + step])
            top = logits.max(axis=1, keepdims=True)
            total = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
            out[start : start + step] = logits[:, list(numbers)] - total
        yield layer, out
