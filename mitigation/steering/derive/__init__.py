"""Derive steering vectors: most functions compare the two groups of a `Contrast` at some places.

==================  ====================================================================================  =======
function            direction or change                                                                   kind
==================  ====================================================================================  =======
from a contrast of a store's examples or of pairs
-----------------------------------------------------------------------------------------------------------------
`mean_difference`   from the mean of negative (corrupt) to the mean of positive (clean) examples          add
`lda`               Fisher's discriminant direction between the two groups                                add
`discriminant`      amplify the discriminant's log-odds along the mean difference                         amplify
`amplification`     amplify the deviation from the mean over negative examples, such as blank images      amplify
`prior_removal`     along the direction of answers without an image, move to the mean of clean inputs     amplify
`iti`               mean difference at the heads with the most accurate probes; a store only              add
`paired_pca`        first principal direction of clean minus corrupt; pairs only                          add
`ict`               from blurred images or masked objects to clean images, at selected heads; pairs only  add
from other inputs
-----------------------------------------------------------------------------------------------------------------
`concept_subspace`  amplify the deviation within the subspace of several concepts of a store              amplify
`probe_normal`      normals of probes                                                                     add
`optimize`          fitted to right answers by gradient descent; descriptions of images are preserved     add
`vti_text`          from hallucinated to correct captions, norm preserved                                 add
`vti_vision`        to the vision tower's mean output over randomly masked images, norm preserved         add
`vsv`               difference between the prompt with and without this image, norm preserved             add
`project_away`      remove a word's direction from image tokens                                           project
==================  ====================================================================================  =======

An additive vector adds the same direction to every input. An amplifying vector's change depends on the input, so one vector
can turn a wrong "yes" into "no" and a wrong "red" into "green".
"""

from __future__ import annotations

from mitigation.steering.derive.amplify import amplification, concept_subspace, prior_removal
from mitigation.steering.derive.base import along
from mitigation.steering.derive.discriminant import discriminant, lda
from mitigation.steering.derive.ict import ict
from mitigation.steering.derive.iti import iti
from mitigation.steering.derive.mean_difference import mean_difference
from mitigation.steering.derive.optimize import RIGHT, optimize
from mitigation.steering.derive.paired_pca import paired_pca
from mitigation.steering.derive.probe_normal import probe_normal
from mitigation.steering.derive.project_away import project_away
from mitigation.steering.derive.vista import vsv
from mitigation.steering.derive.vti import Demonstration, vti_text, vti_vision

__all__ = [
    "RIGHT",
    "Demonstration",
    "along",
    "amplification",
    "concept_subspace",
    "discriminant",
    "ict",
    "iti",
    "lda",
    "mean_difference",
    "optimize",
    "paired_pca",
    "prior_removal",
    "probe_normal",
    "project_away",
    "vsv",
    "vti_text",
    "vti_vision",
]
