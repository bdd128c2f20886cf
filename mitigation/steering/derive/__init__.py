"""Where steering vectors come from: each function derives one kind from a store, from pairs, from probes or from words.

==================  ===================================================================================  =======
function            what it pushes                                                                       kind
==================  ===================================================================================  =======
`mean_difference`   from the mean of some examples to that of others (right by looking, wrong by prior)  add
`from_pairs`        from what a changed image gives to what the clean one gives                          add
`paired_pca`        along the first principal direction of clean minus changed                           add
`lda`               along what tells true from false best, where what varies anyway is discounted        add
`probe_normal`      along a probe's direction                                                            add
`iti`               along the mean difference at the heads whose probes know best                        add
`ict`               from a blurred image, or a masked object, to the clean one, at the heads that see it  add
`vti_text`          from hallucinated captions to correct ones, keeping lengths                          add
`vti_vision`        to what the vision tower gives whichever patches are masked, keeping lengths         add
`vsv`               along what this image adds to the words, keeping lengths                             add
`project_away`      image tokens away from a word                                                        project
`discriminant`      what tells true from false here, the way the model itself writes it, from a threshold   amplify
`amplification`     what this image adds to what a blank one gives: look at the image more               amplify
`concept_subspace`  each input further to its own side of some concepts: what is known speaks louder     amplify
`prior_removal`     what an answer shares with answers about no image, back to the mean of seen ones     amplify
==================  ===================================================================================  =======

An additive vector moves every question the same way. The amplifying ones move each input its own way, so that one
vector may turn a wrong yes into no and a wrong "red" into "green".
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
