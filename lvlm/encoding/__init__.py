"""Encode prompts and images as model inputs, and map the roles of their tokens.

`encode` (a prompt), `registry` (image encodings by name), one module per kind of image encoding (`fixed_size`, `tiled`,
`packed`, `llama4`, `mllama`), and what they use: `image_processing`, `image_token_masks`, `extra_inputs`, `processor`.
"""
