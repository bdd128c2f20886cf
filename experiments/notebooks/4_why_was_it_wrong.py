# %% [markdown]
# # 4 · Why was it wrong?
#
# A wrong answer alone does not say what to correct. Was the truth never seen, lost on the way, or known and overridden?

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml

from activation_store import ActivationStore
from concepts import scenes
from diagnosis import diagnose, fit_directions
from lvlm import load_lvlm

run = Path(os.environ.get("GROUNDSCOPE_RUN", "../../runs/default"))
store = ActivationStore(run / "activations")
examples = store.frame()
model = load_lvlm("tiny")

# %% [markdown]
# ## The wrong answers
# Scenes are drawn again from the run's own configuration, so that their pictures are at hand.

# %%
drawn = yaml.safe_load((run / "config.yaml").read_text())["data"]
data = scenes.dataset(n_images=drawn["n_images"], seed=drawn["seed"]).filter(lambda e: bool(e.candidates))
told = dict(zip(examples["id"], examples["model_answer"], strict=True))
wrong = [e for e in data if told[e.id] != e.answer]
misled = [e for e in wrong if e.split == "conflict"][:24]
print(
    f"{len(wrong)} of {len(data)} answers are wrong; {len(misled)} of those where the image contradicts the prior are looked at"
)

# %% [markdown]
# ## Where the truth was lost
# Probes for every stage, fitted on questions that nothing misleads in, then read on the wrong answers; what undoes an answer is
# tried on the model. It is *overridden by the prior* only if the answer about a blank picture is the same, else *overridden
# late*; what no probe can decide is *not readable*.

# %%
neutral = (examples["split"] == "neutral").to_numpy()
found = diagnose(
    model, store, fit_directions(store, neutral), [*misled, *[e for e in data if e not in wrong][:150]], progress=False
)
found.table()

# %%
for number in range(3):
    print(found.text(number), end="\n\n")

# %% [markdown]
# ## Image, prompt, or prior?
# The log-odds of each wrong answer, divided exactly among the image, the question and what the model says without either
# (Shapley values). Bars above 0 speak for the wrong answer.

# %%
shown = [one for one in found.wrong if one.sources][:12]
figure, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
for k, (name, color) in enumerate((("prior", "#b3342d"), ("image", "#2563a8"), ("prompt", "#8a8f98"))):
    heights = [one.sources[name] for one in shown]
    ax.bar(np.arange(len(shown)) + 0.27 * (k - 1), heights, width=0.25, color=color, label=name)
ax.axhline(0, color="black", linewidth=0.8)
ax.set(xlabel="wrong answer", ylabel="share of its log-odds", xticks=range(len(shown)))
_ = ax.legend(frameon=False)

# %% [markdown]
# How well each place can be read at all, on examples no probe was fitted to; a verdict rests on readable places only.

# %%
found.calibration().query("chosen").round(2)

# %% [markdown]
# One answer, from the first layer of the vision tower to the last of the decoder:

# %%
one = found.wrong[0]
readings = [r for r in one.readings if np.isfinite(r.log_odds)]
figure, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
ax.plot([r.log_odds for r in readings], "o-", color="#2563a8")
ax.axhline(0, color="black", linewidth=0.8)
ax.set_xticks(
    range(len(readings)),
    [r.site + (" (last token)" if r.stage == "last" else "") for r in readings],
    rotation=60,
    ha="right",
    fontsize=7,
)
_ = ax.set(
    ylabel="log-odds of the truth", title=f"{one.example['question']}  {one.example['truth']}, it said {one.said}"
)
