# %% [markdown]
# # 2 · Where is it known? Probes and their controls
#
# A linear probe measures what is decodable from activations. Controls show whether its accuracy is more than chance.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from activation_store import ActivationStore
from probes import ProbeGrid, fit_grid, permutation_test

run = Path(os.environ.get("GROUNDSCOPE_RUN", "../../runs/default"))
store = ActivationStore(run / "activations")
examples = store.frame()
neutral = (examples["split"] == "neutral").to_numpy()

# %% [markdown]
# ## Every layer, from the vision tower to the answer
# Fitted on questions that nothing misleads in; an image is never on both sides of a split. `object:named` is whether what the
# question names is in the image; `attribute:green` whether the thing asked about is green.

# %%
concepts = ["attribute:green", "attribute:red"]
grids = {
    "vision tower": fit_grid(store, concepts, "vision.resid_post", tokens="object:mean", rows=neutral, folds=3),
    "decoder, object's tokens": fit_grid(store, concepts, "resid_post", tokens="object:mean", rows=neutral, folds=3),
    "decoder, last token": fit_grid(store, concepts, "resid_post", tokens="last", rows=neutral, folds=3),
}
grids["decoder, last token"].frame()[
    ["concept", "layer", "balanced_accuracy", "low", "high", "control", "C", "n_train", "n_test"]
].round(3).head(6)

# %%
figure, axes = plt.subplots(1, len(grids), figsize=(12, 3.4), sharey=True, layout="constrained")
for ax, (name, grid) in zip(axes, grids.items(), strict=True):
    for concept, color in zip(concepts, ("#2e8b57", "#b3342d"), strict=True):
        k = grid.concepts.index(concept)
        ax.plot(grid.layers, grid.balanced_accuracy[k, :, 0], "o-", color=color, label=concept)
        ax.fill_between(grid.layers, grid.low[k, :, 0], grid.high[k, :, 0], color=color, alpha=0.15)
        ax.plot(grid.layers, grid.control[k, :, 0], ":", color=color)
    ax.axhline(0.5, color="#888888", linewidth=0.8)
    ax.set(title=name, xlabel="layer", ylim=(0.4, 1.02))
axes[0].set_ylabel("balanced accuracy, held out")
_ = axes[0].legend(frameon=False, loc="lower right")
# %% [markdown]
# Dotted: the same procedure on shuffled labels. Colors can be read at the object's own tokens long before, and far better than,
# at the last token, where the answer is made.
#
# ## Every head
# Forty-eight heads are forty-eight chances to be lucky. The permutation test repeats the whole grid, choice of penalty
# included, on permuted labels and compares each head with the best head of each repetition.

# %%
heads = fit_grid(store, ["object:named"], "z", tokens="last", rows=neutral, folds=3)
test = permutation_test(heads, store, permutations=200, rows=neutral)
table = test.frame()
table.sort_values("p_family").head(6)

# %%
accuracy = heads.array("object:named")
figure, ax = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
heatmap = ax.imshow(accuracy, vmin=0.5, vmax=1, cmap="viridis", origin="lower", aspect="auto")
ax.set(xlabel="head", ylabel="layer", title="object:named at the last token")
significant = table[table["p_family"] <= 0.05]
ax.plot(significant["head"].astype(int), significant["layer"], "w.", markersize=4)
_ = figure.colorbar(heatmap, label="balanced accuracy")
# %% [markdown]
# Dots: significant with all heads allowed for. The best cell is chosen on the training rows, so its held-out score is not
# inflated by the choice:

# %%
heads.best("object:named")

# %% [markdown]
# ## Is it there where the answer is wrong?
# The probes above were fitted on neutral questions. Here they read the questions in which the prior misled the model.

# %%
wrong = (examples["split"] == "conflict") & (examples["model_answer"] != examples["answer"])
rows = np.flatnonzero(wrong & examples["attribute:green"].notna())
for name, grid in grids.items():
    layer = grid.layers[-1]
    x = store.read(grid.site(layer), grid.tokens, examples=rows)
    read = grid.decision("attribute:green", layer, None, x) > 0
    agreed = np.mean(read == (examples["attribute:green"].to_numpy(float)[rows] == 1))
    print(f"{name:26} last layer: right about green in {agreed:.0%} of {len(rows)} wrong answers")

# %% [markdown]
# The run has its own grids, with every concept that had enough examples:

# %%
for path in sorted((run / "probes").glob("*/grid.json")):
    grid = ProbeGrid.load(path.parent)
    print(
        f"{path.parent.name:34} {len(grid.concepts):2} concepts, {len(grid.layers)} layers, {grid.n_heads or 1} a layer"
    )
