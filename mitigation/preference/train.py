"""Tune a model on preferences: LoRA by DPO, or by SFT on the chosen answers as a control.

The loss is our own, not TRL's trainer, for three reasons. Prompts are encoded as probes and patches encode them, for every
family of `lvlm`; TRL needs a chat template, and a processor of transformers. Nothing but torch is needed. And no pickle is
written: TRL's checkpoints contain `optimizer.pt` and `training_args.bin`. TRL's own trainer reads the files of
`mitigation.preference.formats.trl`, and PEFT reads the adapters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from groundscope.core.document_digest import value_digest
from groundscope.core.errors import DataError, ModelError
from groundscope.core.progress import progress_bar
from groundscope.core.short_repr import short_repr
from lvlm.model import Lvlm
from mitigation.preference import checkpoint
from mitigation.preference.adapter import Adapter
from mitigation.preference.data import PreferenceData
from mitigation.preference.lora import active, frozen, initial, linear_layers
from mitigation.preference.trainer import Epoch, TokenizedPairs, Trainer
from mitigation.preference.tuning_options import TuneOptions


@dataclass(frozen=True, eq=False)
class Tuning:
    """A tuned model's adapter, and how it was chosen.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> adapter = gs.Adapter({"layer": np.ones((1, 2))}, {"layer": np.ones((2, 1))}, 1.0, "m", "c", "w")
    >>> epochs = (gs.preference.Epoch(0, None, 0.69, 0.1), gs.preference.Epoch(1, 0.6, 0.5, 0.8))
    >>> tuning = gs.Tuning(adapter, epochs, 1, gs.TuneOptions(epochs=1), (8, 2))
    >>> tuning.history[tuning.epoch].validation_accuracy
    0.8
    """

    adapter: Adapter
    history: tuple[Epoch, ...]
    epoch: int
    """The epoch with the smallest validation loss; 0 if no epoch was better than the model before, so that nothing is changed."""
    options: TuneOptions
    pairs: tuple[int, int]
    """Number of training and validation pairs."""

    __repr__ = short_repr


def tune(
    model: Lvlm,
    data: PreferenceData,
    options: TuneOptions | None = None,
    *,
    validation: PreferenceData | None = None,
    out: Path | str | None = None,
    progress: bool | None = None,
) -> Tuning:
    """Train low-rank adapters of the decoder's linear layers on preferences, and choose the epoch on validation images.

    Parameters
    ----------
    model
        The model, with floating-point weights in memory; it does not change (`Adapter.merged` returns a tuned copy).
    data
        The preferences.
    options
        Options; None for the defaults.
    validation
        Preferences about other images that choose the epoch; None for a part of `data`.
    out
        Folder of the adapter. After every epoch, the state is written there, and a call with the same model, data and options
        resumes it; the result is the same as without interruption.
    progress
        Whether to show progress; by default on a terminal only.

    Returns
    -------
    Tuning
        The adapter of the chosen epoch, with digests of model and data in its provenance.

    Raises
    ------
    DataError
        For no pairs, a common image of training and validation, an image that cannot be read, and answers that the tokenizer
        cannot distinguish or does not know; all but the images are checked before training.
    ConfigError
        For options out of range, or a folder with the state of another training.
    ModelError
        For a model whose weights are quantized or offloaded, and if a loss is not finite.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, questions = gs.load_lvlm("tiny"), gs.scenes.dataset(40).where(split="conflict", kind="what_color")
    >>> pairs = [gs.PreferencePair.of(e, e.answer, e.prior_answer, source="labels") for e in questions]
    >>> tuning = gs.tune(model, gs.PreferenceData("colors", tuple(pairs)), gs.TuneOptions(epochs=2))
    >>> [round(epoch.validation_loss, 3) for epoch in tuning.history][0], len(tuning.history)
    (0.693, 3)
    """
    options = TuneOptions() if options is None else options
    if not len(data):
        msg = f"preferences '{data.name}' have no pairs; nothing can be learned"
        raise DataError(msg)
    training, held_out = (
        data.split(options.validation_share, seed=options.seed) if validation is None else (data, validation)
    )
    _check_images(training, held_out)
    layers = linear_layers(model, options.targets)
    if any(layer.weight.is_meta for layer in layers.values()):
        msg = f"weights of {model.name} are offloaded and cannot be tuned; load it without device_map"
        raise ModelError(msg)
    parts = (TokenizedPairs.of(model, training), TokenizedPairs.of(model, held_out))
    about = _provenance(model, training, held_out, options)
    trainer = Trainer(model, layers, initial(layers, options.rank, options.seed), options, *parts)
    state = None if out is None else Path(out) / checkpoint.FILE
    with progress_bar(progress) as bar, frozen(model):
        task = bar.add_task("tuning", total=options.epochs)
        with active(model, layers, trainer.matrices, options.alpha / options.rank):
            if state is None or not checkpoint.restore(state, trainer, value_digest(about)):
                trainer.start()
            bar.advance(task, len(trainer.history) - 1)
            while len(trainer.history) <= options.epochs:
                trainer.run_epoch()
                bar.advance(task)
                if state is not None:
                    checkpoint.save(state, trainer, value_digest(about))
    history = tuple(trainer.history)
    provenance = {**about, "epoch": trainer.best_epoch, "history": [asdict(epoch) for epoch in history]}
    down = {path: trainer.best[path].down.numpy() for path in layers}
    up = {path: trainer.best[path].up.numpy() for path in layers}
    adapter = Adapter(down, up, float(options.alpha), model.name, model.config_hash, model.weights_hash, provenance)
    if out is not None:
        adapter.save(out)
    return Tuning(adapter, history, trainer.best_epoch, options, (len(training), len(held_out)))


def _check_images(training: PreferenceData, held_out: PreferenceData) -> None:
    """Raise `DataError` if a validation pair is about an image or a group of the training pairs."""
    if not len(held_out):
        msg = f"preferences '{held_out.name}' have no pairs; nothing can be chosen"
        raise DataError(msg)
    groups = {p.group for p in training}
    images = {image.identity for p in training for image in p.images}
    other = next((p for p in held_out if p.group in groups or any(i.identity in images for i in p.images)), None)
    if other is not None:
        msg = f"validation pair '{other.id}' is about an image of the training pairs; use PreferenceData.split"
        raise DataError(msg)


def _provenance(
    model: Lvlm, training: PreferenceData, held_out: PreferenceData, options: TuneOptions
) -> dict[str, Any]:
    return {
        "options": asdict(options) | {"targets": list(options.targets)},
        "model": model.name,
        "config_hash": model.config_hash,
        "weights_hash": model.weights_hash,
        "training": {"name": training.name, "pairs": len(training), "digest": training.digest},
        "validation": {"name": held_out.name, "pairs": len(held_out), "digest": held_out.digest},
    }
