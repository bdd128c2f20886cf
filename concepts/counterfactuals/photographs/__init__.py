"""Counterfactual pairs from photographs: the question stays, the image changes, and its true answer with it.

======================= ===========================================================================
`regions`               pixels of an object: its outline if annotated, else its box
`color_names`           the eleven basic color terms of a color, and a typical color of each term
`listed_pairs`          the pairs that a file lists
`swap`                  two photographs on which the same question has different true answers
`mirror`                the photograph mirrored left to right; answers about left and right change
`recolor`               one object in another color
`inpaint`               one object removed, its region filled from the surroundings
======================= ===========================================================================

Each method also makes placebo pairs: the same kind of change, after which the true answer is the same. An effect that
placebo pairs have too is an effect of the edit, not of the concept.
"""
