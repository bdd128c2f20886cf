"""Run patches of recorded prompts: as suffixes of a shared prefix if the model supports it, else as full forward passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor

from circuits.execution.full_runner import run_whole
from circuits.execution.memory import MEMORY
from circuits.execution.prefix_attention import NotShared
from circuits.execution.prefix_cache import Recording, See, record
from circuits.execution.suffix_runner import Reader, Row, resume
from circuits.execution.tail_recording import record_tails
from lvlm.decoding.prefix_run import PrefixBatch
from lvlm.model import Lvlm
from lvlm.sites import Site

_LOG = logging.getLogger(__name__)


class PatchRunner:
    """Runs rows of changes with a shared prefix until one fails, and all later rows as full forward passes.

    Both ways give the same results up to the order of floating-point sums. At the first failure the logger
    ``circuits.execution.patch_runner`` emits one WARNING with the reason.

    Parameters
    ----------
    model
        In evaluation mode.
    memory
        Largest number of bytes for the rows of one batch.
    check
        Resumed runs that include an unchanged row, whose logits must be those of the recording: the ``first`` or
        ``every`` one.
    """

    def __init__(self, model: Lvlm, *, memory: int = MEMORY, check: Literal["first", "every"] = "first") -> None:
        self._model, self._memory, self._check = model, memory, check
        self._checked = False
        self._shared = True

    @property
    def shared(self) -> bool:
        """Whether rows run as suffixes of a shared prefix; False after the first failure."""
        return self._shared

    def record(
        self, inputs: Mapping[str, Tensor], start: int, sites: Collection[Site] = (), keep: int = 1
    ) -> Recording | None:
        """Run examples once and record what rows need; None if rows run as full forward passes."""
        if not self._shared:
            return None
        try:
            return record(self._model, inputs, start, sites, keep)
        except NotShared as why:
            self._fall_back(why)
            return None

    def record_tails(self, batch: PrefixBatch) -> Recording | None:
        """Run the tails of questions that share prefixes, and record their last tokens; None as for `record`."""
        if not self._shared:
            return None
        try:
            return record_tails(self._model, batch)
        except NotShared as why:
            self._fall_back(why)
            return None

    def resume(
        self,
        recording: Recording,
        rows: Sequence[Row],
        read: Reader,
        *,
        most: int | None = None,
        examples: Sequence[int] | None = None,
        see: See | None = None,
    ) -> Tensor | None:
        """Return the results of rows, ``[P, rows, …]``, or None if the recording cannot be resumed.

        Parameters are those of `circuits.execution.suffix_runner.resume`.
        """
        if not self._shared:
            return None
        check = self._check == "every" or not self._checked
        try:
            results = resume(
                self._model,
                recording,
                rows,
                read,
                memory=self._memory,
                most=most,
                examples=examples,
                check=check,
                see=see,
            )
        except NotShared as why:
            self._fall_back(why)
            return None
        self._checked = True
        return results

    def run(
        self,
        recording: Recording | None,
        inputs: Callable[[], Mapping[str, Tensor]],
        rows: Sequence[Row],
        read: Reader,
        *,
        keep: int = 1,
        most: int | None = None,
        examples: Sequence[int] | None = None,
        see: See | None = None,
    ) -> Tensor:
        """Return the results of rows, ``[P, rows, …]``: resume the recording, or run each row as a full forward pass.

        Parameters
        ----------
        recording
            The recorded run; None if it could not be recorded.
        inputs
            Returns the inputs of the P examples; called for full forward passes only.
        rows, read, keep, most, see
            As in `circuits.execution.full_runner.run_whole`.
        examples
            Indices of the P examples in the recording; None for all.
        """
        results = None
        if recording is not None:
            results = self.resume(recording, rows, read, most=most, examples=examples, see=see)
        if results is not None:
            return results
        return run_whole(self._model, inputs(), rows, read, keep=keep, memory=self._memory, most=most, see=see)

    def _fall_back(self, why: NotShared) -> None:
        _LOG.warning(
            "%s (%s): every patch runs as a full forward pass, because %s; results are the same but take longer",
            self._model.name,
            self._model.spec.model_type,
            why,
        )
        self._shared = False
