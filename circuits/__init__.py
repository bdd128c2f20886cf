"""Causal analysis: which heads carry image information to the answer, and how interventions change the answer.

- `patch_heads`, `patch`, `patch_paths`: exact patching between the two runs of a counterfactual pair (`patching`)
- `metrics`: how strongly a run prefers an answer, an open table; any function of the logits too (`patching.metrics`)
- `ablate`, `HeadSet`, `attention_knockout`: remove heads, or attention between tokens (`ablation`, `attention_knockout`)
- `attribution.heads`, `nodes`, `inputs`, `edges`: the same effects estimated from gradients (`attribution`)
- `faithfulness.curve`, `minimal`, `edges`: how much of the behavior a circuit preserves (`faithfulness`)
- `head_table`, `attention_to_image`: scores of heads from one forward pass each (`head_screening`)
- `input_attribution.split`: an answer's log-odds as lean, form, knowledge and image (`input_attribution`)
- `HeadScores`, `PatchScores`, `Graph`: results with intervals, tests, plots and files (`results`)
- `Intervention`, `intervened`, `logits_under`: change activations yourself (`interventions`, `execution`)

From pairs to heads, in reading order: `patching/activation` (`patch_heads`) checks the pairs (`patching/pairs`), runs every
patch (`patching/sweep`) on a recorded prompt (`execution/patch_runner`), and returns `results/head_scores`.
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
