# %% [markdown]
# # 1 · Look into a store of activations
#
# A store is a folder of HDF5 files: what a model held inside while it read each question. Nothing here needs the model.
#
# The notebooks read a finished run. `make demo` makes `runs/default`; any other run will do: set `GROUNDSCOPE_RUN` to its folder.

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
# ## What was traced
# One array for each site and token selection. Layers of one kind lie side by side.

# %%
arrays = pd.DataFrame(store.arrays).astype({"n_heads": "Int64"})
arrays[["stack", "component", "tokens", "n_layers", "n_heads", "width"]]

# %% [markdown]
# ## The examples
# One row a question, with what was asked, what is true, what the model said, and a column of labels for each concept.

# %%
examples = store.frame()
examples[["id", "split", "level", "question", "answer", "model_answer"]].head(8)

# %% [markdown]
# How often is the model right, by what could mislead it? `conflict` shows things in colors that they usually do not have.

# %%
right = examples["model_answer"] == examples["answer"]
right.groupby([examples["split"], examples["level"]]).agg(["mean", "size"]).round(3)

# %% [markdown]
# ## The values
# A site is written `decoder.L3.z`; only what is asked for is read from the disk.

# %%
head = store.read("decoder.L3.z", "last", head=5)
layer = store.read("decoder.L3.resid_post", "last", examples=store.select({"object:named": True}))
print(f"head {head.shape} {head.dtype}, layer {layer.shape} {layer.dtype}")

# %% [markdown]
# ## A first look
# The two directions in which the residual stream at the last token varies most, after each layer. Questions that are
# answered yes and no come apart with depth: by then the answer is decided.

# %%
yes, no = (store.select(answer=word) for word in ("yes", "no"))
shown = (1, 3, 5)
figure, axes = plt.subplots(1, len(shown), figsize=(11, 3.6), layout="constrained")
for ax, number in zip(axes, shown, strict=True):
    x = store.read(f"decoder.L{number}.resid_post", "last")
    x = x - x.mean(axis=0)
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    plane = x @ directions[:2].T
    for rows, word, color in ((yes, "yes", "#2563a8"), (no, "no", "#c2571a")):
        ax.scatter(*plane[rows].T, s=7, alpha=0.6, color=color, label=f"answer is {word}")
    ax.set(title=f"after decoder layer {number}", xticks=[], yticks=[])
_ = axes[0].legend(frameon=False, markerscale=2)
# %% [markdown]
# No model was imported for any of this.

# %%
model_stack = {"transformers", "nnsight", "transformer_lens"} & {name.split(".")[0] for name in sys.modules}
assert not model_stack, model_stack
