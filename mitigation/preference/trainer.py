"""The training loop: epochs over batches of pairs, and the epoch with the smallest validation loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.model import Lvlm
from mitigation.preference.data import PreferenceData
from mitigation.preference.lora import LowRank
from mitigation.preference.loss import PairBatch, check_answers, dpo_loss, pair_batch, sft_loss
from mitigation.preference.tuning_options import TuneOptions


@dataclass(frozen=True)
class Epoch:
    """Losses after an epoch; epoch 0 is the model before.

    Examples
    --------
    >>> from mitigation.preference import Epoch
    >>> Epoch(0, None, validation_loss=0.693, validation_accuracy=0.0).number
    0
    """

    number: int
    training_loss: float | None
    """Mean over the pairs while they were learned; None for epoch 0."""
    validation_loss: float
    validation_accuracy: float
    """Share of the validation pairs whose chosen answer is more probable than the rejected one."""


@dataclass(frozen=True, eq=False)
class TokenizedPairs:
    """Pairs with the tokens of their answers."""

    data: PreferenceData
    tokens: Sequence[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, model: Lvlm, data: PreferenceData) -> TokenizedPairs:
        """Return the pairs with tokens; raises `DataError` as `check_answers` does."""
        return cls(data, check_answers(model, data.pairs))

    def batches(self, model: Lvlm, size: int, order: Sequence[int]) -> Iterator[PairBatch]:
        """Yield the pairs in batches of prompts of equal shape."""
        examples = [self.data[i].example() for i in order]
        for batch in model.batches(examples, size, in_order=False):
            index = [order[i] for i in batch.index]
            yield pair_batch(model, batch.encodings, [self.tokens[i] for i in index], index)


@dataclass(eq=False)
class Trainer:
    """The state of a training: matrices, optimizer, and the best epoch so far."""

    model: Lvlm
    layers: dict[str, torch.nn.Linear]
    matrices: dict[str, LowRank]
    options: TuneOptions
    training: TokenizedPairs
    held_out: TokenizedPairs
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, LowRank] = field(default_factory=dict)
    best_epoch: int = 0
    references: tuple[Tensor, Tensor] = field(init=False)
    """Log-probabilities of the model before: of training and validation pairs, ``[N, 2]``."""
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        weights = [w for part in self.matrices.values() for w in (part.down, part.up)]
        self.optimizer = torch.optim.AdamW(weights, lr=self.options.learning_rate, weight_decay=0.0)

    def start(self) -> None:
        """Measure the model before; at first, the additions are zero."""
        self.references = (self._measure(self.training), self._measure(self.held_out))
        self.history = [self._validated(0, None, self.references[1])]
        self._store_best()

    def run_epoch(self) -> None:
        """Learn every training pair once, then measure the validation pairs."""
        options, number = self.options, len(self.history)
        count = len(self.training.data)
        order = np.random.default_rng([options.seed, number]).permutation(count).tolist()
        total, done = 0.0, 0
        for batch in self.training.batches(self.model, options.batch_size, order):
            share = ((number - 1) * count + done) / (options.epochs * count)
            for group in self.optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(share, options.warmup)
            with torch.enable_grad():
                each = self._losses(batch.log_probabilities(self.model), self.references[0][list(batch.index)])
                loss = each.sum() / options.batch_size  # a batch of few pairs has little weight
            if not bool(torch.isfinite(loss)):
                msg = f"the loss of {self.model.name} is not finite in epoch {number}; lower the learning rate"
                raise ModelError(msg)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([w for g in self.optimizer.param_groups for w in g["params"]], 1.0)
            self.optimizer.step()
            total += float(each.detach().sum())
            done += len(each)
        self.history.append(self._validated(number, total / count, self._measure(self.held_out)))
        if self.history[-1].validation_loss < self.history[self.best_epoch].validation_loss:
            self.best_epoch = number
            self._store_best()

    def _losses(self, policy: Tensor, reference: Tensor) -> Tensor:
        return (
            sft_loss(policy)
            if self.options.loss == "sft"
            else dpo_loss(policy, reference.to(policy), self.options.beta)
        )

    @torch.no_grad()
    def _measure(self, part: TokenizedPairs) -> Tensor:
        """Return the log-probabilities of both answers of each pair, ``[N, 2]``."""
        values = torch.zeros(len(part.data), 2)
        for batch in part.batches(self.model, 2 * self.options.batch_size, range(len(part.data))):
            values[list(batch.index)] = batch.log_probabilities(self.model).cpu()
        return values

    def _validated(self, number: int, training_loss: float | None, policy: Tensor) -> Epoch:
        loss = self._losses(policy, self.references[1]).double().mean()
        accuracy = (policy[:, 0] > policy[:, 1]).double().mean()
        return Epoch(number, training_loss, float(loss), float(accuracy))

    def _store_best(self) -> None:
        self.best = {
            path: LowRank(part.down.detach().cpu().clone(), part.up.detach().cpu().clone())
            for path, part in self.matrices.items()
        }


def _schedule(share: float, warmup: float) -> float:
    """Return the factor of the learning rate after a share of the training."""
    return (share + 1e-3) / (warmup + 1e-3) if share < warmup else (1 - share) / (1 - warmup)
