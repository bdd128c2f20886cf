"""Find out why an answer is wrong: probes and causal checks together, one verdict for each answer.

Functions, in the order of their use
    `fit_directions`
        Fit the probes that a diagnosis reads activations with, from a store.
    `diagnose`
        Return `Diagnoses`: a verdict for each wrong answer, with its evidence.
    `measure_losses`
        Nats, by two families of readers, of what is lost at the projector.
    `representation_ceiling`, `regress_correctness`
        Whether what probes read bounds what the model says.
    `preference_pairs`
        Pairs of the true answer and the answer that overrode it, to tune on (`mitigation.preference`).
    `compare_models`
        Compare answers, probes, heads and diagnoses of two models.
    `ablate_alignment`
        The change of each measure of alignment without a head or MLP (`diagnosis.alignment_ablation`).

Modules, in the order of a diagnosis
    `diagnosis.fit`
        Probes, their split, and the choice of answers.
    `diagnosis.fit_without_boxes`, `diagnosis.image_tokens`, `diagnosis.noun_probes`
        Probes for data without boxes: nouns at image tokens by labels of whole images, and what is read at their places.
    `diagnosis.pipeline`
        `diagnose`: calls the modules below in this order.
    `diagnosis.claims`, `diagnosis.probe_sets`, `diagnosis.readings`
        What a question is about, which probes decide it, and their margins.
    `diagnosis.calibration`
        Margins to log-odds, and whether a place is readable.
    `diagnosis.causal_check`
        Ablations that correct a wrong answer.
    `diagnosis.verdicts`
        From the state of each stage to a verdict.
    `diagnosis.results`, `diagnosis.narrative`
        Results as tables, files and sentences.
    `diagnosis.ceiling`, `diagnosis.ceiling_regression`
        Ceilings of behavior, and regressions of behavior on representation.
    `diagnosis.preference_pairs`
        Verdicts to preference data.
    `diagnosis.comparison`, `diagnosis.compare_models`
        Two models on the same data.
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
