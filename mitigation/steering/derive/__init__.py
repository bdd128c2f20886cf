"""Derive steering vectors: each function derives one kind from a store, from pairs, from probes or from text.

==================  ====================================================================================  =======
function            direction or change                                                                   kind
==================  ====================================================================================  =======
`mean_difference`   from the mean of negative examples to the mean of positive examples                   add
`from_pairs`        from the mean over changed images to the mean over clean images                       add
`paired_pca`        first principal direction of clean minus changed                                      add
`lda`               Fisher's discriminant direction between true and false examples                       add
`probe_normal`      normal of a probe                                                                     add
`iti`               mean difference at the heads with the most accurate probes                            add
`ict`               from blurred images or masked objects to clean images, at the most accurate heads     add
`vti_text`          from hallucinated to correct captions, norm preserved                                 add
`vti_vision`        to the vision tower's mean output over randomly masked images, norm preserved         add
`vsv`               difference between the prompt with and without this image, norm preserved             add
`project_away`      remove a word's direction from image tokens                                           project
`discriminant`      amplify the discriminant's log-odds along the mean difference                         amplify
`amplification`     amplify the deviation from the mean over blank images                                 amplify
`concept_subspace`  amplify the deviation within the subspace of some concepts                            amplify
`prior_removal`     along the direction of answers without an image, move to the mean of clean inputs     amplify
==================  ====================================================================================  =======

An additive vector adds the same direction to every input. An amplifying vector's change depends on the input, so one vector
can turn a wrong "yes" into "no" and a wrong "red" into "green".
"""

from __future__ import annotations

from mitigation.steering.derive.amplify import amplification, concept_subspace, prior_removal
from mitigation.steering.derive.discriminant import discriminant
from mitigation.steering.derive.ict import ict
from mitigation.steering.derive.iti import iti
from mitigation.steering.derive.lda import lda
from mitigation.steering.derive.mean_difference import from_pairs, mean_difference
from mitigation.steering.derive.paired_pca import paired_pca
from mitigation.steering.derive.probe_normal import probe_normal
from mitigation.steering.derive.project_away import project_away
from mitigation.steering.derive.vista import vsv
from mitigation.steering.derive.vti import Demonstration, vti_text, vti_vision

__all__ = [
    "Demonstration",
    "amplification",
    "concept_subspace",
    "discriminant",
    "from_pairs",
    "ict",
    "iti",
    "lda",
    "mean_difference",
    "paired_pca",
    "prior_removal",
    "probe_normal",
    "project_away",
    "vsv",
    "vti_text",
    "vti_vision",
]
