"""What exact patching costs: every head of a random LLaVA of middle size, against one whole forward a patch.

The model is that of benchmarks/trace.py (hidden 512, 16 layers, 8 heads) and a prompt of 256 image and then 32 question
tokens. Patched are each head at the last token; each head at all 32 question tokens at once; each head at each of them
apart (4,096 patches). Everything is counted: `circuits`' time holds the two runs of the pair, the loop's too.

The loop is what one writes with plain torch hooks: the clean run's head outputs are kept, then one forward a patch of
the corrupt inputs with one hook, on the same threads, with logits at the last position alone. Long loops are timed on a
random sample of their patches and multiplied. Both take turns, in alternating order; figures are medians of the turns'
ratios. "Forwards" are plain forwards of one prompt of that pair. Memory is what live tensors add at their largest while
the patches run, counted at every operation, over the budget they were given.

    python benchmarks/patching.py [--quick] [--device cuda] [--dtype bfloat16] [--figure FILE.png]
"""

from __future__ import annotations

import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.trace import middle_processor, questions
from circuits import patch, patch_heads
from concepts.schema import CounterfactualPair
from lvlm import FamilySpec, Lvlm, wrap_lvlm
from lvlm.tiny.architecture import IMAGE, vocabulary

TEXT = " ".join(["Is there a big cat", *["or a dog"] * 8, "in the image"])  # 31 words and a question mark
Patch = tuple[int, int, tuple[int, ...]]
"""Layer, head, positions."""


def build(layers: int = 16, heads: int = 8, side: int = 16, seed: int = 0) -> Lvlm:
    """Build the model with random weights, large enough that heads differ; `side` is the image's tokens along an edge."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=14 * side,
            patch_size=14,
            projection_dim=256,
        ),
        text_config=LlamaConfig(
            vocab_size=8192,
            hidden_size=64 * heads,
            intermediate_size=172 * heads,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
        ),
        image_token_index=vocabulary().index(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=side**2,
    )
    network = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 2
    processor = middle_processor()
    processor.image_processor.size = {"height": 14 * side, "width": 14 * side}
    # The image's tokens and then the question's, and nothing else.
    spec = FamilySpec("llava", template="{image}{question}", special_tokens=False)
    return wrap_lvlm(network, processor, spec=spec, validate=False)


def pair_of(seed: int = 0) -> CounterfactualPair:
    """The same question about two pictures."""
    one, two = questions(2 + seed, f"{TEXT}?").examples[-2:]
    return CounterfactualPair(one, replace(two, question=one.question, answer="no"), "image", "another image")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time a piece of work to its end on the device."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# -- the loop ------------------------------------------------------------------------------------------------------------


class Loop:
    """One whole forward a patch, with plain torch hooks on the Hugging Face modules."""

    def __init__(self, model: Lvlm, pair: CounterfactualPair) -> None:
        self.hf, self.device = model.hf, model.device
        self.dim = model.head_dim
        self.modules = [layer.self_attn.o_proj for layer in model.hf.model.language_model.layers]
        self.clean, self.corrupt = (model.collate([model.encode(e)]) for e in (pair.clean, pair.corrupt))
        self.kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits at the last position."""
        return self.hf(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]

    def own_runs(self) -> None:
        """Run both sides, and keep the clean one's head outputs."""
        hooks = [
            m.register_forward_pre_hook(lambda _m, args, i=i: self.kept.update({i: args[0].clone()}))
            for i, m in enumerate(self.modules)
        ]
        self.forward(self.clean)
        for hook in hooks:
            hook.remove()
        self.forward(self.corrupt)

    def patch(self, patch: Patch) -> Tensor:
        """Return the logits of the corrupt run with one head's output of the clean run."""
        layer, head, positions = patch
        at, columns = slice(positions[0], positions[-1] + 1), slice(head * self.dim, (head + 1) * self.dim)

        def change(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            z[:, at, columns] = self.kept[layer][:, at, columns]
            return (z,)

        hook = self.modules[layer].register_forward_pre_hook(change)
        try:
            return self.forward(self.corrupt)
        finally:
            hook.remove()


# -- what is compared ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """One thing to patch, both ways."""

    name: str
    run: Callable[[], Any]
    patches: list[Patch]


def sweeps(model: Lvlm, pair: CounterfactualPair) -> list[Sweep]:
    """Return the three sweeps of the figures."""
    last = model.encode(pair.clean).tokens.last
    image = model.encode(pair.clean).tokens.image
    suffix = tuple(range(max(image) + 1, last + 1))
    heads = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    return [
        Sweep(
            "each head, last token",
            lambda: patch_heads(model, [pair], min_effect=0, progress=False),
            [(i, h, (last,)) for i, h in heads],
        ),
        Sweep(
            "each head, all question tokens at once",
            lambda: patch_heads(model, [pair], "suffix", min_effect=0, progress=False),
            [(i, h, suffix) for i, h in heads],
        ),
        Sweep(
            "each head, each question token",
            lambda: patch(model, [pair], "z", "suffix:each", min_effect=0, progress=False),
            [(i, h, (p,)) for i, h in heads for p in suffix],
        ),
    ]


@dataclass(frozen=True)
class Measured:
    """Medians over turns."""

    forward: float
    """Seconds of a plain forward."""
    ours: float
    loop: float
    """Seconds of the whole loop, long ones from a sample."""
    forwards: float
    speedup: float
    n: int


def measure(model: Lvlm, pair: CounterfactualPair, sweep: Sweep, turns: int, sample: int) -> Measured:
    """Time a sweep and its loop in turn."""
    loop, device = Loop(model, pair), model.device
    draw = np.random.default_rng(0)
    seconds(loop.own_runs, device)
    rows = []
    for turn in range(turns):
        chosen = [
            sweep.patches[i] for i in draw.choice(len(sweep.patches), min(sample, len(sweep.patches)), replace=False)
        ]
        plain = statistics.median(seconds(lambda: loop.forward(loop.corrupt), device) for _ in range(3))
        work = [lambda: seconds(sweep.run, device), lambda c=chosen: _loop_seconds(loop, c, len(sweep.patches))]
        times = [w() for w in work] if turn % 2 else [w() for w in work[::-1]][::-1]
        again = statistics.median(seconds(lambda: loop.forward(loop.corrupt), device) for _ in range(3))
        rows.append((min(plain, again), *times))
    forward, ours, whole = (statistics.median(column) for column in zip(*rows, strict=True))
    return Measured(
        forward,
        ours,
        whole,
        statistics.median(o / f for f, o, _ in rows),
        statistics.median(w / o for _, o, w in rows),
        turns,
    )


def _loop_seconds(loop: Loop, chosen: list[Patch], count: int) -> float:
    own = seconds(loop.own_runs, loop.device)
    return own + seconds(lambda: [loop.patch(p) for p in chosen], loop.device) * count / len(chosen)


def largest_difference(model: Lvlm, pair: CounterfactualPair, count: int) -> float:
    """Return the largest difference of any logit to the loop's, over a sample of each sweep's patches."""
    from circuits.engine import resume
    from circuits.recording import observe, record
    from circuits.sweep import rows_of
    from lvlm import Site

    loop = Loop(model, pair)
    loop.own_runs()
    sites = [Site("decoder", i, "z") for i in range(model.n_layers)]
    draw, worst = np.random.default_rng(1), 0.0
    for sweep in sweeps(model, pair):
        chosen = [sweep.patches[i] for i in draw.choice(len(sweep.patches), count, replace=False)]
        start = min(p[0] for _, _, p in chosen)
        source, run = observe(model, loop.clean, start, sites), record(model, loop.corrupt, start, sites)
        rows = [rows_of(model, [((sites[i], h),)], [at], source)[0] for i, h, at in chosen]
        ours = resume(model, run, rows, lambda x: x[:, :, -1], memory=2**30)[0]
        theirs = torch.stack([loop.patch(p) for p in chosen])
        worst = max(worst, float((ours.float() - theirs.float()).abs().max()))
    return worst


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(model: Lvlm, pair: CounterfactualPair, memory: int) -> int:
    """Return the most bytes that live while every head is patched at all question tokens within a budget."""
    from circuits import engine

    counted: list[int] = []
    inner = engine._run

    def watched(*args: Any) -> Any:
        with counting() as live:
            out = inner(*args)
        counted.append(live.most)
        return out

    engine._run = watched
    try:
        patch_heads(model, [pair], "suffix", min_effect=0, memory=memory, progress=False)
    finally:
        engine._run = inner
    return max(counted)


@contextmanager
def counting() -> Iterator[Live]:
    """Count bytes while the context is open."""
    with Live() as live:
        yield live
