# %% [markdown]
# # 5 · Derive, test and export a correction
#
# The effect of a steering vector is measured against controls, on questions that were not used to choose anything. Its cost is
# the change on questions that should not change.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from activation_store import ActivationStore
from behavior import answer, compare
from circuits import HeadScores
from concepts import scenes
from lvlm import load_lvlm
from mitigation import Contrast, derive, export

run = Path(os.environ.get("GROUNDSCOPE_RUN", "../../runs/default"))
store = ActivationStore(run / "activations")
model = load_lvlm("tiny")

# %% [markdown]
# ## Where, and from what
# At the heads that patching found, from the run's activations: what tells questions answered yes from those answered no,
# misled ones among them.

# %%
heads = list(
    dict.fromkeys(
        h for kind in ("object", "color") for h in HeadScores.load(run / f"circuits/{kind}.safetensors").top(3)
    )
)
model_answers = store.frame()["answer"].to_numpy()
vector = derive.discriminant(
    Contrast.from_store(store, positive=model_answers == "yes", negative=model_answers == "no"), heads=heads, doubt=0.5
)
vector

# %% [markdown]
# ## How strongly
# Chosen on validation scenes; a random direction of the same size is evaluated next to it.


# %%
def answer_with(data, vector, strength):
    """Ask about the data with a vector applied."""
    with vector.applied(model, strength):
        return answer(model, data, progress=False)


def rates(result):
    """Return the two rates to look at: the harm and its price."""
    neutral = result.where(split="neutral").rate("accuracy")
    return {"wrong by prior": result.rate("wrong_by_prior").value, "neutral, right": neutral.value}


scene_sets = {"validation": (30, 501), "test": (60, 502)}
data = {
    name: scenes.dataset(n_images=n, seed=seed).filter(
        lambda e: e.split in {"neutral", "conflict"} and bool(e.candidates)
    )
    for name, (n, seed) in scene_sets.items()
}
plain = rates(answer(model, data["validation"], progress=False))
rows = []
for name, what in (("vector", vector), ("random direction", vector.randomized(0))):
    rows.append({"vector": name, "strength": 0.0, **plain})
    for strength in (0.5, 1.0, 1.5):
        rows.append({"vector": name, "strength": strength, **rates(answer_with(data["validation"], what, strength))})
sweep = pd.DataFrame(rows)

figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for name, color in (("vector", "#2563a8"), ("random direction", "#888888")):
    part = sweep[sweep["vector"] == name]
    ax.plot(part["neutral, right"], part["wrong by prior"], "o-", color=color, label=name)
    for _, row in part.iterrows():
        ax.annotate(
            f"{row['strength']:g}",
            (row["neutral, right"], row["wrong by prior"]),
            fontsize=8,
            xytext=(4, 4),
            textcoords="offset points",
        )
ax.set(xlabel="neutral questions right", ylabel="wrong by prior", title="validation scenes; numbers are strengths")
_ = ax.legend(frameon=False)
# %% [markdown]
# ## The test
# Once, on scenes that nothing was derived or chosen from; changes are paired, question by question.

# %%
mine = sweep[(sweep["vector"] == "vector") & (sweep["neutral, right"] >= sweep["neutral, right"].iloc[0] - 0.015)]
strength = float(mine.sort_values(["wrong by prior", "strength"])["strength"].iloc[0])
before = answer(model, data["test"], progress=False)
after = answer_with(data["test"], vector, strength)
control = answer_with(data["test"], vector.randomized(0), strength)
pd.DataFrame(
    {"not steered": rates(before), f"steered, {strength:g}": rates(after), "random direction": rates(control)}
).round(3)

# %%
for name, result in (("steered", after), ("random direction", control)):
    change = compare(before, result, rate="wrong_by_prior")
    print(f"{name:17} {change.difference}  {change.gained} more errors, {change.lost} fewer, p = {change.p_value:.2g}")

# %% [markdown]
# The vector acts inside `with` only; afterwards the model is unchanged, bit for bit.
#
# ## Export
# A format accepts the vectors that its consumer supports, and refuses all others with the reason.

# %%
export.formats_for(vector)

# %%
with tempfile.TemporaryDirectory() as folder:
    path = export.safetensors(vector.scaled(strength), Path(folder) / "correction.safetensors")
    print(path.name, f"{path.stat().st_size / 1e3:.0f} kB")
    print(type(vector).load(path))

# %% [markdown]
# A plain direction (`derive.mean_difference` and the like) goes into more: a bias that any Hugging Face code loads, GGUF, vLLM.

# %%
direction = derive.mean_difference(
    Contrast.from_store(store, positive=model_answers == "yes", negative=model_answers == "no"),
    heads=heads,
    positions="all",
)
export.formats_for(direction)
