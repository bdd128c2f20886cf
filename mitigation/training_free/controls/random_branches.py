"""Controls that keep a method's rule and replace its branches by random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError, DataError
from lvlm.decoding.decoder import AnswerRule, Branch, RuleDecoder, Step
from mitigation.training_free.branches import with_images
from mitigation.training_free.controls.method_control import MethodControl
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.avisc import AvisC
from mitigation.training_free.methods.code import CODE
from mitigation.training_free.methods.damro import DAMRO
from mitigation.training_free.methods.icd import ICD
from mitigation.training_free.methods.lcd import LCD
from mitigation.training_free.methods.m3id import M3ID
from mitigation.training_free.methods.pai import PAI
from mitigation.training_free.methods.ritual import RITUAL
from mitigation.training_free.methods.sid import SID
from mitigation.training_free.methods.vcd import VCD
from mitigation.training_free.methods.vdd import VDD
from mitigation.training_free.seeds import generator_of, torch_generator_of

if TYPE_CHECKING:
    from concepts.image_source import ImageSource
    from concepts.schema import Example
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from mitigation.method_data import DerivationData


@dataclass(frozen=True)
class _BranchControl(MethodControl):
    """A control of a method with branches."""

    methods: ClassVar[Mapping[str, type[TrainingFree]]] = MappingProxyType(
        {
            "vcd": VCD, "icd": ICD, "vdd": VDD, "lcd": LCD, "m3id": M3ID, "avisc": AvisC, "ritual": RITUAL, "sid": SID,
            "damro": DAMRO, "pai": PAI, "code": CODE,
        }
    )  # fmt: skip
    default_of: ClassVar[tuple[str, ...]] = ("vcd",)

    of: TrainingFree = field(default_factory=VCD)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        decoder = self.of._enter(model, stack)
        if not isinstance(decoder, RuleDecoder):
            msg = f"{self.label}: {self.of.name} compares with no branch that could be replaced; choose a contrastive method"
            raise ConfigError(msg)
        return _ControlDecoder(self, decoder)

    def _replaced(self, rule: AnswerRule, model: Lvlm, batch: Batch) -> AnswerRule:
        """Return the rule with random branches."""
        return rule


@dataclass(frozen=True)
class _ControlDecoder(RuleDecoder):
    control: _BranchControl
    decoder: RuleDecoder

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return self.control._replaced(self.decoder.start(model, batch), model, batch)


class _Wrapped(AnswerRule):
    """A rule that passes everything to another one."""

    def __init__(self, rule: AnswerRule, names: Sequence[str]) -> None:
        self.rule, self.names = rule, list(names)
        self.sites, self.image_sites = rule.sites, rule.image_sites

    def branches(self, first: Step) -> Sequence[Branch]:
        branches = self.rule.branches(first)
        if not branches:
            msg = "this control replaces the branches of a method, and the method has none"
            raise ConfigError(msg)
        return branches

    def combine(self, step: Step) -> Tensor:
        return self.rule.combine(step)

    def select(self, parents: Sequence[int]) -> None:
        self.names = [self.names[parent] for parent in parents]
        self.rule.select(parents)


@dataclass(frozen=True)
class GaussianBranch(_BranchControl):
    """Control: random logits instead of those of a method's branch, with the same deviation from the model's own.

    At each step, the logits of a branch are replaced by ``l + s e``, with independent standard normal ``e`` and ``s`` the
    standard deviation over the vocabulary of ``l' - l``. What remains of the method is its rule and the size of its change.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_branches import GaussianBranch
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with GaussianBranch().applied(model):
    ...     answers = gs.answer(model, data)
    >>> GaussianBranch().name, len(answers)
    ('random branch (Gaussian) in VCD', 6)
    """

    label: ClassVar[str] = "random branch (Gaussian)"

    def _replaced(self, rule: AnswerRule, model: Lvlm, batch: Batch) -> AnswerRule:
        return _GaussianRule(rule, [encoding.example.id for encoding in batch.encodings], self.seed)


class _GaussianRule(_Wrapped):
    def __init__(self, rule: AnswerRule, names: Sequence[str], seed: int) -> None:
        super().__init__(rule, names)
        self._seed = seed

    def combine(self, step: Step) -> Tensor:
        branches = []
        for number, logits in enumerate(step.branches):
            deviation = (logits - step.logits).float().std(-1, keepdim=True)
            draws = (
                torch.randn(logits.shape[-1], generator=torch_generator_of(self._seed, name, step.number, number))
                for name in self.names
            )
            noise = torch.stack(list(draws)).to(logits.device)
            branches.append(step.logits + (deviation * noise).to(logits.dtype))
        return self.rule.combine(replace(step, branches=tuple(branches)))


@dataclass(frozen=True)
class OtherImageBranch(_BranchControl):
    """Control: the same question about another image instead of a method's branch.

    The image is drawn from those of the validation data (`derive`), by the id of the question; it is never the question's own.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_branches import OtherImageBranch
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> control = OtherImageBranch.derive(gs.DerivationData(model, None, gs.scenes.dataset(10, seed=1)))
    >>> with control.applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(control.images), len(answers)
    (12, 6)
    """

    label: ClassVar[str] = "random branch (another image)"
    needs: ClassVar[tuple[str, ...]] = ("examples",)

    images: tuple[ImageSource, ...] = ()
    """Images to draw from; at least two."""

    @classmethod
    def _derived(cls, data: DerivationData) -> Mapping[str, Any]:
        """Return the images of the data; raises `DataError` for fewer than two."""
        images = {image.identity: image for example in data.examples for image in example.images}
        if len(images) < 2:
            msg = "another image is drawn from those of the data, and they have fewer than two"
            raise DataError(msg)
        return {"images": tuple(images.values())}

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Parameters of the control and of its method, with the identities of the images."""
        return {**super().parameters, "images": [image.identity for image in self.images]}

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        if len({image.identity for image in self.images}) < 2:
            msg = f"{self.label}: give two or more images, or make the control with derive(data)"
            raise ConfigError(msg)

    def _replaced(self, rule: AnswerRule, model: Lvlm, batch: Batch) -> AnswerRule:
        return _OtherImageRule(rule, self, model, batch)

    def _other_images(self, example: Example) -> list[ImageSource]:
        own = {image.identity for image in example.images}
        others = [image for image in self.images if image.identity not in own]
        if not others:
            msg = f"example '{example.id}': all images of the control are its own; give other images"
            raise DataError(msg)
        rng = generator_of(self.seed, example.id, "another image")
        return [others[int(rng.integers(len(others)))] for _ in example.images]


class _OtherImageRule(_Wrapped):
    def __init__(self, rule: AnswerRule, control: OtherImageBranch, model: Lvlm, batch: Batch) -> None:
        super().__init__(rule, [encoding.example.id for encoding in batch.encodings])
        self._control, self._model, self._batch = control, model, batch

    def branches(self, first: Step) -> Sequence[Branch]:
        images = [self._control._other_images(encoding.example) for encoding in self._batch.encodings]
        other = with_images(self._model, self._batch, "another image", images)
        return [other] * len(super().branches(first))
