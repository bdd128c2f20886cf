"""Models with a known mechanism, as ground truth for methods that localize circuits or diagnose errors.

- `square_scenes`: pictures of one colored square, and questions about the color of a noun.
- `planted_circuits`: `plant` builds a model whose answer to these questions is computed by known heads.
- `planted_failures`: copies of *your* model with one known defect (a color-blind vision tower, color erased at the projector, no
  attention to the image, an amplified or planted prior head, a bias to one answer).
- `scene_photographs`, `annotation_files`, `composite_photographs`: icon scenes as image files, with annotations as in COCO, GQA
  and other data sets, and on real photographs.
- `data_faults`: a data set with planted duplicates, blur, contradictions, swapped captions and wrong absences.

A method is validated if it returns the planted heads, or the planted cause.
"""
