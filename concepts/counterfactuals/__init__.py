"""Counterfactual pairs: two examples that differ in one stated thing, under the same question.

`pair_making`
    The open table of kinds, and the functions that make pairs of a kind.
`scene_edits`
    Kinds for icon scenes: an object, its color or a relation is changed, and the scene is drawn again.
`methods`
    The open table of methods for photographs: swap, mirror, recolor, inpaint, each with placebo pairs.
`photographs`
    These methods, and a canvas that gives all images one size.
`pair_set`
    What is returned: pairs, how they were made and what was left out.
`image_edits`
    Kinds for any image: it is blanked, blurred, covered with noise, or an object in it is masked.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
