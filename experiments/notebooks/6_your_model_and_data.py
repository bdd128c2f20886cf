# %% [markdown]
# # 6 · Your own model, your own data
#
# Any of the families loads from a Hugging Face id, a folder, or memory; questions come from files in formats people use. This
# page makes both on the spot, so that it runs anywhere: a small random LLaVA (its answers mean nothing) and ten pictures with
# a POPE file.

# %%
import json
import tempfile
from pathlib import Path

from activation_store import ActivationStore, trace
from behavior import answer
from circuits import patch_heads
from concepts import counterfactuals, loaders, scenes
from groundscope import GroundscopeError
from lvlm import wrap_lvlm
from lvlm.tiny.architecture import build_model, build_processor

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Data
# A POPE file is a line of JSON a question. Every other loader works the same way: `loaders.coco(…)`, `loaders.gqa(…)`, …

# %%
scene_data = scenes.dataset(n_images=10, seed=3).filter(lambda e: e.kind == "existence")
lines = []
for number, example in enumerate(scene_data):
    name = f"{example.group.replace('/', '-')}.png"
    example.image.load().save(folder / name)
    lines.append({"question_id": number, "image": name, "text": example.question, "label": example.answer})
(folder / "random.json").write_text("\n".join(map(json.dumps, lines)))

data = loaders.pope(folder / "random.json", folder)
print(f"{len(data)} questions on {len({e.group for e in data})} images; {data.provenance['left_out']}")

# %% [markdown]
# An invalid file gives an error with the place:

# %%
broken = folder / "broken.json"
broken.write_text(json.dumps({**lines[0], "label": "maybe"}))
try:
    loaders.pope(broken, folder)
except GroundscopeError as error:
    print(str(error).replace(str(folder), "…"))

# %% [markdown]
# ## Model
# Yours: `load_lvlm("llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device="cuda")`, or `wrap_lvlm(model, processor)` for one in
# memory. At load a forward on one small example proves that every named tensor is what it is called.

# %%
model = wrap_lvlm(build_model(), build_processor(), name="mine")
model

# %% [markdown]
# ## The same steps as for the embedded model

# %%
result = answer(model, data, progress=False)
result.accuracy(by="split")

# %%
trace(model, data, sites=["resid_post", "z"], tokens=["last", "image:mean"], out=folder / "activations", progress=False)
store = ActivationStore(folder / "activations")
store.read("decoder.L2.z", "last", head=1).shape

# %% [markdown]
# Photographs cannot be drawn again with one object less; a blank image can always be shown instead.

# %%
pairs = counterfactuals.pairs(data, kind="blank", limit=6)
scores = patch_heads(model, pairs, min_effect=0.0, progress=False)
scores.top(3)

# %% [markdown]
# ## The same from the command line
#
#     groundscope model=hf model.path=FOLDER_OR_ID data=pope data.questions=FILE data.images=FOLDER
#
# A model of a family that is not in the table needs a few lines that say what is different about it: `docs/extending.md`.
