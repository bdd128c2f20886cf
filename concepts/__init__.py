"""Inputs of a model: scenes, questions, counterfactual pairs, and loaders of files.

`schema`
    Examples, and the datasets that they are in.
`annotated_object`, `image_source`, `question`
    Parts of an example: annotated objects with their boxes, the image, and a question with its answer.
`counterfactual_pair`
    Two examples that differ in one stated thing.
`concept`
    A property of an example, and the three levels of properties.
`mention`
    Words of a written text that name an object.
`scenes`
    Icon scenes, drawn from a description, with exact answers to questions about them.
`loaders`
    Loaders of question files and annotations, as published or of the user's own.
`reading`
    Parts shared by loaders (private): records of files, images below a folder, boxes, and questions about annotations.
`counterfactuals`
    Pairs of examples that differ in one stated thing, from scenes and from photographs.
`image_files`
    Image files of users: paths, headers, and conversion to RGB.
`region_masking`
    Images of which only some regions are visible.
`nouns`
    Grammar and synonyms of English nouns.
`object_mentions`
    Words of a text, and the objects that it mentions.
`mention_labels`, `answer_prefix`
    Texts of a model as the prefixes of examples, with the objects that they mention.
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
