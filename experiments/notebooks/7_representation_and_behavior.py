# %% [markdown]
# # 7 · Representation and behavior
#
# Does what the model represents bound what it says? Three measures, each with its null or control: alignment of images with
# texts, information along the path, and the ceiling of behavior.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import yaml

import groundscope as gs
from activation_store import ActivationStore
from probes import alignment

run = Path(os.environ.get("GROUNDSCOPE_RUN", "../../runs/default"))
store = ActivationStore(run / "activations")
examples = store.frame()
model = gs.load_lvlm("tiny")

# %% [markdown]
# ## Alignment: each modality alone
# In a prompt, the question has seen the image. So images and their descriptions run alone. The gray band is what unrelated
# pairs give: images are permuted, and the choice of the best layer is repeated in every permutation.

# %%
stored = yaml.safe_load((run / "config.yaml").read_text())["data"]
data = gs.scenes.dataset(n_images=stored["n_images"], seed=stored["seed"], splits=("neutral",))
captions = gs.caption_images(data)
folder = Path(tempfile.mkdtemp())
images = gs.trace(
    model, captions, ["resid_post"], ["image:mean"], folder / "images", input="image", unembedding=False, progress=False
)
texts = gs.trace(
    model, captions, ["resid_post"], ["answer:mean"], folder / "texts", input="text", unembedding=False, progress=False
)
aligned = alignment.measure_layers(
    images, texts, text="answer:mean", measures=["cosine", "cka", "mutual_knn"], k=5, progress=False
)
aligned.best().round(3)

# %%
table = aligned.table()
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
for ax, (name, rows) in zip(axes, table.groupby("measure", sort=False), strict=True):
    band = 2 * rows["baseline_sd"]
    ax.fill_between(rows["image_layer"], rows["baseline"] - band, rows["baseline"] + band, color="#8a8f98", alpha=0.3)
    ax.plot(rows["image_layer"], rows["value"], "o-", color="#2563a8")
    ax.set(title=name, xlabel="layer")

# %% [markdown]
# ## Information along the image's path
# V-information: by how many nats the log-loss of a linear reader falls when it reads a place. At the object's tokens the color
# is there from the start; the last token reads it late. The same reader of the question alone shows what the words say.

# %%
colors = [f"attribute:{color}" for color in ("red", "green", "blue", "yellow", "orange", "purple")]
neutral = (examples["split"] == "neutral").to_numpy() & examples["kind"].isin(["color", "what_color"]).to_numpy()
path = gs.information_path(
    gs.image_sites(store, tokens="object:mean"), colors, rows=neutral, families=("linear",), folds=3, progress=False
)
_ = path.plot(ax=plt.subplots(figsize=(9, 3.6), layout="constrained")[1])

# %%
path.frame()[["site", "nats", "low", "high", "change", "p_holm", "words"]].round(3).tail(8)

# %% [markdown]
# ## Ceilings of behavior
# The ceiling of a kind of question and a split is the accuracy at which cross-fitted probes read the true answers at the best
# layer, chosen on other images. Below the diagonal: what is represented is not used in full (headroom). Above it, beyond chance:
# a violation.

# %%
ceilings = gs.representation_ceiling(store, skip=True, folds=3, resamples=500, progress=False)
ceilings.frame()[["concept", "condition", "n", "behavior", "ceiling", "low", "high", "violated"]].round(3)

# %%
_ = ceilings.plot()
print(f"{sum(cell.violated for cell in ceilings.cells)} violations in {len(ceilings.cells)} cells")

# %% [markdown]
# `groundscope representation` measures all of this for a run, with a nonlinear reader, the questions alone and a regression of
# right answers, and adds a section to its report. None of these measures shows that the model uses what it represents: heads
# and layers are tested by patching (notebook 3), single answers by causal checks (notebook 4).
