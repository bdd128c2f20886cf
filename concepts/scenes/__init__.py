"""Icon scenes: synthetic images whose objects, attributes and relations are known exactly.

`icons`
    24 icons and their recoloring.
`distributions`
    The distributions that scenes are drawn from: a uniform one, and one with typical colors and frequent companions.
`scene`
    One scene: its description, drawing and edits.
`questions`
    Questions about a scene, with exact answers.
`splits`
    The test questions, divided by what could mislead a model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
