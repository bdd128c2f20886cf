# %% [markdown]
# # 4 · Why was it wrong?
#
# A correction depends on the cause of the error: the truth is not encoded, is lost between two stages, or is decodable and
# overridden.

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
# Scenes are stored again from the run's own configuration, so that their pictures are at hand.

# %%
stored = yaml.safe_load((run / "config.yaml").read_text())["data"]
data = scenes.dataset(n_images=stored["n_images"], seed=stored["seed"]).filter(lambda e: bool(e.candidates))
answers = dict(zip(examples["id"], examples["model_answer"], strict=True))
wrong = [e for e in data if answers[e.id] != e.answer]
misled = [e for e in wrong if e.split == "conflict"][:24]
print(
    f"{len(wrong)} of {len(data)} answers are wrong; {len(misled)} of those, where the image contradicts the prior, are diagnosed"
)

# %% [markdown]
# ## Where the truth was lost
# Probes for every stage are fitted on neutral questions and read on the wrong answers; causal checks test which parts of the
# model change an answer. It is *overridden by the prior* if the words alone, about blank images, favor the wrong answer,
# else *overridden late*; if no probe can decide, it is *not readable*.

# %%
neutral = (examples["split"] == "neutral").to_numpy()
diagnoses = diagnose(
    model, store, fit_directions(store, neutral), [*misled, *[e for e in data if e not in wrong][:150]], progress=False
)
diagnoses.table()

# %%
for number in range(3):
    print(diagnoses.text(number), end="\n\n")

# %% [markdown]
# ## Image, or words?
# Four shares sum to the log-odds of the true answer against the wrong one: the lean to an answer whatever is asked, the form of
# the question, the knowledge about its nouns, and the image. Bars below 0 favor the wrong answer.

# %%
attributed = [d for d in diagnoses.wrong if d.sources][:12]
figure, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
for k, (name, color) in enumerate(
    (("lean", "#8a8f98"), ("form", "#7a4fa3"), ("knowledge", "#b3342d"), ("image", "#2563a8"))
):
    heights = [d.sources[name] for d in attributed]
    ax.bar(np.arange(len(attributed)) + 0.2 * (k - 1.5), heights, width=0.18, color=color, label=name)
ax.axhline(0, color="black", linewidth=0.8)
ax.set(xlabel="wrong answer", ylabel="share of its log-odds", xticks=range(len(attributed)))
_ = ax.legend(frameon=False)

# %% [markdown]
# Accuracy of the probes at each place, on examples that no probe was fitted to. Verdicts use readable places only.

# %%
diagnoses.calibration().query("chosen").round(2)

# %% [markdown]
# One answer, from the first layer of the vision tower to the last of the decoder:

# %%
diagnosis = diagnoses.wrong[0]
readings = [r for r in diagnosis.readings if np.isfinite(r.log_odds)]
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
    ylabel="log-odds of the truth",
    title=f"{diagnosis.example['question']}  {diagnosis.example['truth']}, answer: {diagnosis.model_answer}",
)
