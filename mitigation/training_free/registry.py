"""The table of training-free methods.

A package adds one with ``training_free_methods.register(name, MyMethod)`` or an entry point of the group
``groundscope.training_free``.
"""

from __future__ import annotations

from groundscope.core.registry import Registry
from mitigation.self_judgment.dsgd import SelfJudgmentDecoding
from mitigation.self_judgment.fgsd import HarmRefusal
from mitigation.training_free.controls.cut_answers import CutGreedy
from mitigation.training_free.controls.random_branches import GaussianBranch, OtherImageBranch
from mitigation.training_free.controls.random_heads import RandomHeads
from mitigation.training_free.controls.random_layers import RandomLayers
from mitigation.training_free.controls.random_text_tokens import RandomText
from mitigation.training_free.controls.rules import APCOnly, Greedy, YesNoBias
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.ad_hh import ADHH
from mitigation.training_free.methods.adapt_vis import AdaptVis
from mitigation.training_free.methods.augment import Augment
from mitigation.training_free.methods.avisc import AvisC
from mitigation.training_free.methods.beam import BeamSearch
from mitigation.training_free.methods.code import CODE
from mitigation.training_free.methods.counterfactual_keywords import CounterfactualKeywords
from mitigation.training_free.methods.damro import DAMRO
from mitigation.training_free.methods.deco import DeCo
from mitigation.training_free.methods.dola import DoLa
from mitigation.training_free.methods.icd import ICD
from mitigation.training_free.methods.lcd import LCD
from mitigation.training_free.methods.m3id import M3ID
from mitigation.training_free.methods.memvr import MemVR
from mitigation.training_free.methods.middle_layers import MiddleLayers
from mitigation.training_free.methods.nullu import Nullu
from mitigation.training_free.methods.only import ONLY
from mitigation.training_free.methods.opera import OPERA
from mitigation.training_free.methods.pai import PAI
from mitigation.training_free.methods.revisit import ReVisiT
from mitigation.training_free.methods.ritual import RITUAL
from mitigation.training_free.methods.self_consistency import SelfConsistency
from mitigation.training_free.methods.sid import SID
from mitigation.training_free.methods.skip_newline import SkipNewline
from mitigation.training_free.methods.spin import SPIN
from mitigation.training_free.methods.steering import Steering
from mitigation.training_free.methods.sumgd import SumGD
from mitigation.training_free.methods.vaf import VAF
from mitigation.training_free.methods.var import VAR
from mitigation.training_free.methods.vcd import VCD
from mitigation.training_free.methods.vdd import VDD, VDDCalibration
from mitigation.training_free.methods.vdgd import VDGD
from mitigation.training_free.methods.vhr import VHR
from mitigation.training_free.methods.vista import VISTA


def _check(entry: type[TrainingFree]) -> str | None:
    if not (isinstance(entry, type) and issubclass(entry, TrainingFree)):
        return "it must be a class derived from mitigation.TrainingFree"
    return None


training_free_methods: Registry[type[TrainingFree]] = Registry(
    "training-free method",
    {
        "ad_hh": ADHH,
        "apc_only": APCOnly,
        "constant_bias": YesNoBias,
        "gaussian_branch": GaussianBranch,
        "greedy": Greedy,
        "greedy_cut": CutGreedy,
        "other_image_branch": OtherImageBranch,
        "random_heads": RandomHeads,
        "random_layers": RandomLayers,
        "random_text": RandomText,
        "adapt_vis": AdaptVis,
        "augment": Augment,
        "avisc": AvisC,
        "beam": BeamSearch,
        "dsgd": SelfJudgmentDecoding,
        "fgsd": HarmRefusal,
        "code": CODE,
        "counterfactual_keywords": CounterfactualKeywords,
        "damro": DAMRO,
        "deco": DeCo,
        "dola": DoLa,
        "icd": ICD,
        "lcd": LCD,
        "m3id": M3ID,
        "memvr": MemVR,
        "middle_layers": MiddleLayers,
        "nullu": Nullu,
        "opera": OPERA,
        "only": ONLY,
        "pai": PAI,
        "revisit": ReVisiT,
        "ritual": RITUAL,
        "self_consistency": SelfConsistency,
        "sid": SID,
        "skip_newline": SkipNewline,
        "spin": SPIN,
        "steering": Steering,
        "sumgd": SumGD,
        "vaf": VAF,
        "var": VAR,
        "vcd": VCD,
        "vdd": VDD,
        "vdd_calibration": VDDCalibration,
        "vdgd": VDGD,
        "vhr": VHR,
        "vista": VISTA,
    },
    group="groundscope.training_free",
    check=_check,
)
"""Methods by name."""
