# %% [markdown]
# # 1 · Look into a store of activations
#
# A store is a folder of HDF5 files with the activations of a model for each question. Nothing here needs the model.
#
# The notebooks read a finished run. `make demo` makes `runs/default`; for another run set `GROUNDSCOPE_RUN` to its folder.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from activation_store import ActivationStore

run = Path(os.environ.get("GROUNDSCOPE_RUN", "../../runs/default"))
store = ActivationStore(run / "activations")
print(f"{len(store)} examples, {len(store.arrays)} arrays")

# %% [markdown]
# ## Arrays
# One array for each component and token selection, with all layers of a stack.

# %%
arrays = pd.DataFrame(store.arrays).astype({"n_heads": "Int64"})
arrays[["stack", "component", "tokens", "n_layers", "n_heads", "width"]]

# %% [markdown]
# ## The examples
# One row per question: the question, its true answer, the answer of the model, and a column of labels for each concept.

# %%
examples = store.frame()
examples[["id", "split", "level", "question", "answer", "model_answer"]].head(8)

# %% [markdown]
# Accuracy by split and level. Split `conflict` shows objects in colors that they usually do not have.

# %%
right = examples["model_answer"] == examples["answer"]
right.groupby([examples["split"], examples["level"]]).agg(["mean", "size"]).round(3)

# %% [markdown]
# ## The values
# A site is written `decoder.L3.z`. Only the selected rows and heads are read from the disk.

# %%
head = store.read("decoder.L3.z", "last", head=5)
layer = store.read("decoder.L3.resid_post", "last", examples=store.select({"object:named": True}))
print(f"head {head.shape} {head.dtype}, layer {layer.shape} {layer.dtype}")

# %% [markdown]
# ## A first look
# The first two principal components of the residual stream at the last token, after three layers. Questions with the answers yes
# and no separate with depth, as the model computes the answer.

# %%
yes, no = (store.select(answer=word) for word in ("yes", "no"))
layers = (1, 3, 5)
figure, axes = plt.subplots(1, len(layers), figsize=(11, 3.6), layout="constrained")
for ax, number in zip(axes, layers, strict=True):
    x = store.read(f"decoder.L{number}.resid_post", "last")
    x = x - x.mean(axis=0)
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    plane = x @ directions[:2].T
    for rows, word, color in ((yes, "yes", "#2563a8"), (no, "no", "#c2571a")):
        ax.scatter(*plane[rows].T, s=7, alpha=0.6, color=color, label=f"answer is {word}")
    ax.set(title=f"after decoder layer {number}", xticks=[], yticks=[])
_ = axes[0].legend(frameon=False, markerscale=2)
# %% [markdown]
# None of this has imported a model.

# %%
model_stack = {"transformers", "nnsight", "transformer_lens"} & {name.split(".")[0] for name in sys.modules}
assert not model_stack, model_stack
