# %% [markdown]
# # 3 · Which heads, and do cheap scores agree?
#
# Patching measures exactly which heads carry the answer. Attention to the image is a cheaper and common substitute. This notebook
# computes both on the same pairs and compares them.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt

from circuits import HeadScores, HeadSet, ablate, head_table, patch_heads
from concepts import counterfactuals, scenes
from lvlm import load_lvlm

run = Path(os.environ.get("GROUNDSCOPE_RUN", "../../runs/default"))
model = load_lvlm("tiny")
data = scenes.dataset(n_images=40, seed=77)  # not the scenes of the run
neutral = data.where(split="neutral")

# %% [markdown]
# ## Pairs that differ in one thing
# Two pictures of one scene, and a question whose answer changes with them.

# %%
pairs = counterfactuals.pairs(neutral, kind="object", limit=24)
pair = pairs[0]
figure, axes = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
for ax, side in zip(axes, (pair.clean, pair.corrupt), strict=True):
    ax.imshow(side.image.load(), interpolation="nearest")
    ax.set(title=side.answer, xticks=[], yticks=[])
_ = figure.suptitle(pair.clean.question)
# %% [markdown]
# ## Every head, patched
# Each head's output from the clean run, put into the other run at the last token: what share of the difference comes back?

# %%
scores = patch_heads(model, pairs)
figure, ax = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
scores.heatmap(ax=ax)
scores.frame().sort_values("rank").head(5).round(3)

# %% [markdown]
# Half of the scenes against the other half: is the ranking more than noise?

# %%
stability = scores.stability(k=3)
print(f"rank correlation {stability.rank_correlation}")
print(f"first three in common {stability.overlap}; by chance {stability.chance:.2f}")

# %% [markdown]
# ## Comparison with cheap scores
# Attention that falls on the image, on the object's box, localisation, the difference the image makes to the head, and what the
# head writes toward the answer. All heads' Spearman correlation with patching, intervals over scenes:

# %%
table = head_table(model, pairs, methods=["image_mass", "box_mass", "localisation", "vhd", "direct", "patching"])
agreement = table.agreement(truth="patching", k=[3])
agreement.loc[
    agreement["level"] == "object",
    ["method", "rank_correlation", "rank_correlation_low", "rank_correlation_high", "overlap@3"],
].round(2)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained", sharey=True)
for ax, method in zip(axes, ("image_mass", "direct"), strict=True):
    ax.plot(table.mean(method).ravel(), table.mean("patching").ravel(), "o", color="#2563a8", markersize=4)
    ax.set(xlabel=method)
_ = axes[0].set_ylabel("patching effect")
# %% [markdown]
# ## The test of a ranking: take the heads away
# What do questions about *other* scenes lose without the best two heads, and without two at random?

# %%
others = scenes.dataset(n_images=30, seed=78).where(split="neutral").filter(lambda e: e.level == "object")
sets = {"best": HeadSet(scores.top(2)), "random": HeadSet(scores.random_heads(2, seed=0))}
lost = ablate(model, others, list(sets.values()), method="mean")
lost.frame().assign(heads=list(sets))[["name", "heads", "effect", "effect_low", "effect_high", "accuracy"]].round(3)

# %% [markdown]
# ## The heads of the run
# One ranking for each kind of pair; different questions are carried by different heads.

# %%
for path in sorted((run / "circuits").glob("*.safetensors")):
    run_scores = HeadScores.load(path)
    print(f"{path.stem:10} {run_scores.n_pairs:3} pairs  " + ", ".join(map(str, run_scores.top(4))))
