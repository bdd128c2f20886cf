"""The model under study: load it, encode prompts, run it, and find its activations.

Loading a model, one module per step:

1. `lvlm.loading`: `load_lvlm` reads configuration, weights and processor; `lvlm.load_checks` rejects incomplete or damaged ones.
2. `lvlm.family`: the spec of the family by model type (`registry`), with missing paths found by `module_detection`.
3. `lvlm.model`: `Lvlm`, the loaded model.
4. `lvlm.identity_checks`: one forward pass checks that the spec's paths are right.

Running an example, one module per step:

1. `lvlm.model`: `Lvlm.encode`, `Lvlm.logits`, `Lvlm.read`, `Lvlm.ask`; each method calls a function of the modules below.
2. `lvlm.prompting`: the text of the prompt.
3. `lvlm.encoding`: image and text as model inputs (`encode`), by family (`registry`), in batches (`batches`);
   `lvlm.token_map`: roles of the tokens.
4. `lvlm.access`: hook points of sites (`site_lookup`, `hook_point`), their activations (`reading`), attention patterns, shared
   vision runs, logits of residuals (`unembedding`).
5. `lvlm.answering`: answers as text, greedy (`lvlm.generation`) or by the active decoder (`lvlm.decoding`);
   `lvlm.answer_keys`: scores of candidate answers.

Names: `lvlm.sites` (sites, heads), `lvlm.token_selection` (one grammar of token selections), `lvlm.interfaces` (types that
encoding, access and generation share with the model).

Special forward passes: `lvlm.text_only` (without an image), `lvlm.image_tokens` (image tokens of any inputs),
`lvlm.site_width`, `lvlm.transformer_lens` (a copy as TransformerLens bridge).

Provenance: `lvlm.weights_hash`, `lvlm.config_hash`, `lvlm.processor_digest`, `lvlm.model_files`, `lvlm.active_interventions`,
`lvlm.intervention_digest`, `lvlm.finite_logits`.

Embedded models: `lvlm.embedded_models`, `lvlm.tiny` (architecture, training and evaluation).
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
