"""Debiased self-judgment (arXiv 2508.20655): a model judges sentences about an image, with the image and without it.

Scores
    `Judge`, `judge_sentences`, `Judgments`
        Prompt, score and blind form of the judge; f, f_blind and ``S = (1 + alpha) f - alpha f_blind`` of sentences.
    `detect`, `DetectorResult`, `DetectorRow`
        The scores as detectors of wrong sentences: AUC and rank correlation with labels, text bias, sweeps.

Uses
    `SelfJudgmentDecoding`
        Answers sentence by sentence, each the best of several candidates under the judge (DSGD).
    `HarmRefusal`, `calibrate_refusal`
        Replaces answers with a sentence that the model judges harmful by a refusal (FGSD); its threshold, with over-refusal.
    `judged_preferences`, `SentenceTree`
        Preference pairs: the best and the worst answer of a tree of judged sentences (DSR).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
