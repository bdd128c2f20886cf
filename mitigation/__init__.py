"""Correct wrong answers: steering vectors, their controls and exports, the choice of a strength, and tuning on preferences.

From examples to a file that other code loads
    `Contrast`
        Two groups of examples, of a store or of counterfactual pairs.
    `mitigation.derive`
        Derive a `SteeringVector` from a contrast; one function per published method.
    `sweep_strengths`, `choose_strength`
        Errors and costs of vectors at several strengths, and the rule of choice.
    `CONTROLS`
        Vectors with the same displacement and without the information.
    `mitigation.export`
        Write the vector for llama.cpp, vLLM and others; `exports` is the open table of formats.

Preference tuning, which does train (`mitigation.preference`)
    `PreferenceData`
        Chosen and rejected answers, from diagnoses, labels or files; `preference_formats` is the open table of file formats.
    `tune`
        Train an `Adapter` on them; its tuned copy of the model can be probed, patched and diagnosed again.

`Mitigation` is the interface of all corrections, and `mitigations` the open table of named methods that make one.
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
