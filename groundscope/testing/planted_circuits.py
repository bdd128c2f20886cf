"""Models with a planted circuit: ground truth for methods that localize heads.

A LLaVA (CLIP tower, projector, Llama decoder; a few thousand weights) is built with every weight set explicitly. Its
inputs are pictures of one red or blue square on black, and the question what color some noun is. Exactly the heads of the
planted circuit distinguish red from blue.

**Subspaces.** The residual stream of width D has an orthonormal basis, drawn from the seed, whose first vectors have
names: ``const`` (the same large number at every token, so that RMS norms divide by nearly the same number everywhere and
the model is linear except for its attention), ``red`` (+1 on the red square, -1 on the blue square), ``square`` and
``image`` (1 on the square; on every image token), ``noun``, ``bos`` and ``last`` (1 on the noun, the first and the last
token), ``prior`` (the usual color of a noun: +1, -1 or 0), ``moved``, ``found`` and ``done`` (written by heads and MLPs,
below) and ``answer``, the only direction that the unembedding of the two answers reads. All other directions are *junk*:
heads write there, and nothing that affects the answer reads it.

**The tower** does not mix patches: CLIP's embedding and first norm map a patch's mean color to the named features, and
its layers add nothing. The projector is one linear map into the named directions.

**Attention** depends on token features, not on positions: rotary frequencies decrease so fast that the last pairs of a
head's dimensions are not rotated. A head that attends from the last token to the square has a query that reads ``last``
and a key that reads ``square``, with a logit of `SHARP`. At every other token, and if there is no square, the head attends
to the first token with half that logit; its value there is 0.

**Backups** attend to the square unless an earlier head has found it: the MLP of each layer writes ``done`` = the size of
``found`` at each token, which suppresses their query. If the grounding head is ablated (zero or mean), the first backup
takes over, and suppresses the next one in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from concepts.counterfactual_pair import CounterfactualPair
from concepts.scenes.icons import NOUNS
from concepts.schema import Example
from groundscope.core.errors import ConfigError
from groundscope.testing.square_scenes import ANSWERS, GRID, PATCH, SIDE, Square, draw_example, make_example, usual
from lvlm import wrap_lvlm
from lvlm.model import Lvlm
from lvlm.sites import Head

__all__ = ["ANSWERS", "Planted", "Square", "plant", "usual"]

WIDTH, HEAD_DIM = 32, 8
CONST = 30.0
"""Length of ``const``; all other components of a token have a length of about 2."""
SHARP = 40.0
"""Attention logit of a head's planted target."""
_NAMES = "const red square image noun bos last prior moved found done answer".split()


@dataclass(frozen=True, eq=False)
class Planted:
    """A model and the heads of its planted circuit; returned by `plant`."""

    model: Lvlm
    seed: int
    grounding: Head | None
    """Attends from the last token to the square and writes its color to the answer; None for a two-step circuit."""
    decoys: tuple[Head, ...]
    """Attend from the last token to the image with full mass, and write to directions that nothing reads."""
    prior: Head | None
    """Attends to the noun and promotes its usual color, from text only."""
    mover: Head | None
    """First step: writes the square's color to the noun's token."""
    reader: Head | None
    """Second step: reads the color there from the last token and writes it to the answer."""
    backups: tuple[Head, ...]
    """Replace `grounding` if no earlier head has found the square; in the order of their layers."""

    @property
    def answering(self) -> Head:
        """The head that writes the color to the answer: `grounding`, or `reader`."""
        return next(head for head in (self.grounding, self.reader) if head is not None)

    def examples(self, count: int, seed: int = 0) -> tuple[Example, ...]:
        """Return questions, each about its own picture, with random cell, color and noun."""
        return tuple(draw_example(i, seed) for i in range(count))

    def pairs(self, count: int, seed: int = 0) -> tuple[CounterfactualPair, ...]:
        """Return pairs of the same questions, each with a picture whose square has the other color."""
        pairs = []
        for example in self.examples(count, seed):
            other = ANSWERS[1 - ANSWERS.index(example.answer)]
            cell = example.image.cell if isinstance(example.image, Square) else 0
            change = f"square: {example.answer} -> {other}"
            noun = example.objects[0].noun
            corrupt = make_example(f"{example.id}|{change}", Square(cell, other), noun, example.group)
            pairs.append(CounterfactualPair(example, corrupt, "color", change))
        return tuple(pairs)


def plant(
    seed: int = 0,
    circuit: Literal["direct", "two_step"] = "direct",
    *,
    decoys: int = 3,
    prior: bool = True,
    backups: int = 0,
    n_layers: int = 4,
    n_heads: int = 4,
) -> Planted:
    """Return a model with a circuit at random heads; all other heads read at random and write to junk directions.

    Parameters
    ----------
    seed
        Seed of the heads' places, the basis of the residual stream and the weights of other heads.
    circuit
        ``direct``: a grounding head at the last token; ``two_step``: a mover at the noun and, in a later layer, a
        reader at the last token.
    decoys
        Number of decoys. They alternate: one attends to the square and copies its color, the next to the background.
    prior
        Whether to add a head that answers from the noun, with half the strength of the image.
    backups
        Number of backups, each in a separate layer after the grounding head's; only with ``direct``.
    n_layers, n_heads
        Shape of the decoder.

    Raises
    ------
    ConfigError
        If the circuit is unknown, or needs more heads or layers than the model has.

    Examples
    --------
    >>> from groundscope.testing.planted_circuits import plant
    >>> planted = plant(seed=0)
    >>> planted.grounding, len(planted.decoys)
    (Head(layer=2, head=1), 3)
    >>> planted.pairs(1)[0].change
    'square: blue -> red'
    """
    if circuit not in ("direct", "two_step") or (circuit == "two_step" and backups):
        msg = f"invalid circuit '{circuit}' with {backups} backups; choose 'direct', or 'two_step' without backups"
        raise ConfigError(msg)
    steps = 2 if circuit == "two_step" else 1 + backups
    extra = decoys + int(prior)
    if steps > n_layers or steps + extra > n_layers * n_heads or min(decoys, backups, n_layers - 1, n_heads - 1) < 0:
        msg = (
            f"{steps} heads in separate layers, {decoys} decoys and {int(prior)} prior heads do not fit into "
            f"{n_layers} layers of {n_heads} heads"
        )
        raise ConfigError(msg)
    rng = np.random.default_rng(seed)
    layers = np.sort(rng.permutation(n_layers)[:steps])
    chain = tuple(Head(int(layer), int(rng.integers(n_heads))) for layer in layers)
    free = [Head(i, h) for i in range(n_layers) for h in range(n_heads) if Head(i, h) not in chain]
    others = [free[int(i)] for i in rng.permutation(len(free))[:extra]]
    direct = circuit == "direct"
    model = _build(n_layers, n_heads)
    planted = Planted(
        model=model,
        seed=seed,
        grounding=chain[0] if direct else None,
        decoys=tuple(others[:decoys]),
        prior=others[decoys] if prior else None,
        mover=None if direct else chain[0],
        reader=None if direct else chain[1],
        backups=chain[1:] if direct else (),
    )
    with torch.no_grad():
        _WeightWriter(model, rng).write(planted)
    return planted


class _WeightWriter:
    """Writes weights by named directions of the residual stream."""

    def __init__(self, model: Lvlm, rng: np.random.Generator) -> None:
        self.hf, self.rng = model.hf.model, rng
        self.head_ids = model.hf.lm_head.weight
        basis = torch.tensor(np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0], dtype=torch.float32)
        self.d: dict[str, Tensor] = dict(zip(_NAMES, basis, strict=False))
        self.junk = basis[len(_NAMES) :]  # [J, D]
        self.ids = model.processor.tokenizer.convert_tokens_to_ids
        # Approximate factor of an RMS norm: rows that read its output divide by it.
        self.gain = WIDTH**0.5 / CONST

    def write(self, p: Planted) -> None:
        for parameter in self.hf.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        self._write_vision()
        self._embed()
        for layer in self.hf.language_model.layers:
            for h in range(p.model.n_heads):
                self._randomize(layer.self_attn, h)
        for k, head in enumerate(p.decoys):
            key = {"square": 1.0} if k % 2 == 0 else {"image": 1.0, "square": -1.0}
            value = self.d["red"] if k % 2 == 0 else self.d["image"]
            self._head(head, {"last": 1.0}, key, value, self._junk())
        if p.grounding is not None:
            self._head(p.grounding, {"last": 1.0}, {"square": 1.0}, self.d["red"], self.d["answer"] + self.d["found"])
        for head in p.backups:
            query = {"last": 1.0, "done": -2.0}
            self._head(head, query, {"square": 1.0}, self.d["red"], self.d["answer"] + self.d["found"])
        if p.mover is not None and p.reader is not None:
            self._head(p.mover, {"noun": 1.0}, {"square": 1.0}, self.d["red"], self.d["moved"])
            self._head(p.reader, {"last": 1.0}, {"noun": 1.0}, self.d["moved"], self.d["answer"])
        if p.prior is not None:
            self._head(p.prior, {"last": 1.0}, {"noun": 1.0}, self.d["prior"], 0.5 * self.d["answer"])
        if p.backups:
            self._write_done()
        self.head_ids.copy_(0.3 * self._random(len(self.head_ids), len(self.junk)) @ self.junk)
        for answer, sign in zip(ANSWERS, (1.0, -1.0), strict=True):
            self.head_ids[self.ids(answer)] = sign * 3.0 / self.gain * self.d["answer"]

    def _write_vision(self) -> None:
        """Map a patch's mean color to the features of its token; pixels are -1 for black, +1 for full color."""
        vision = self.hf.vision_tower
        vision = getattr(vision, "vision_model", vision)
        red, blue = 0, 2  # channels
        weight = torch.zeros(vision.embeddings.patch_embedding.weight.shape[:2])  # [hidden, 3]
        # Each feature takes two dimensions of opposite sign, so that the norm's mean is 0.
        for k, sign in ((0, 0.5), (1, -0.5)):
            weight[k, red], weight[k, blue] = sign, -sign  # +1 red, -1 blue, 0 black
            weight[2 + k, red] = weight[2 + k, blue] = sign  # 0 for color, -1 for black; the position embedding adds 1
        area = PATCH * PATCH
        vision.embeddings.patch_embedding.weight.copy_((weight / area)[:, :, None, None].expand(-1, -1, PATCH, PATCH))
        vision.embeddings.class_embedding.zero_()
        vision.embeddings.position_embedding.weight.copy_(torch.tensor([0, 0, 1, -1, 1, -1, 0, 0.0]))
        # On the square, six of eight dimensions are +-1: the norm multiplies by this factor.
        scale = (8 / 6) ** 0.5
        first, second = self.hf.multi_modal_projector.linear_1, self.hf.multi_modal_projector.linear_2
        first.weight[:, 0], first.weight[:, 1] = self.d["red"] / 2 / scale, -self.d["red"] / 2 / scale
        first.weight[:, 2], first.weight[:, 3] = self.d["square"] / 2 / scale, -self.d["square"] / 2 / scale
        first.bias.copy_(CONST * self.d["const"] + self.d["image"])
        second.weight.copy_(torch.eye(WIDTH))
        second.bias.zero_()

    def _embed(self) -> None:
        table = self.hf.language_model.embed_tokens.weight
        table.copy_(
            CONST * self.d["const"] + self._random(len(table), len(self.junk)) @ self.junk / len(self.junk) ** 0.5
        )
        table[self.ids("<s>")] += self.d["bos"]
        table[self.ids(":")] += self.d["last"]
        for noun in NOUNS:
            table[self.ids(noun)] += self.d["noun"] + usual(noun) * self.d["prior"]

    def _head(self, head: Head, query: dict[str, float], key: dict[str, float], value: Tensor, out: Tensor) -> None:
        """Set a head; dimensions 3 and 7 of queries and keys are not rotated, dimension 0 of values carries the read value."""
        attention = self.hf.language_model.layers[head.layer].self_attn
        rows = slice(head.head * HEAD_DIM, (head.head + 1) * HEAD_DIM)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows] = 0
        attention.o_proj.weight[:, rows] = 0
        size = (SHARP * HEAD_DIM**0.5) ** 0.5 / self.gain
        start = rows.start
        attention.q_proj.weight[start + 3] = size * self._sum(query)
        attention.k_proj.weight[start + 3] = size * self._sum(key)
        attention.q_proj.weight[start + 7] = size / CONST * self.d["const"]
        attention.k_proj.weight[start + 7] = size / 2 * self.d["bos"]
        attention.v_proj.weight[start] = value / self.gain
        attention.o_proj.weight[:, start] = out

    def _randomize(self, attention: Any, head: int) -> None:
        """Give a head random weights that write to junk directions and do not read ``const``, which would dominate."""
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        other_directions = torch.stack([v for name, v in self.d.items() if name != "const"])
        read = torch.cat([other_directions, self.junk])  # [D - 1, D]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows] = 0.5 * self._random(HEAD_DIM, len(read)) @ read / self.gain
        attention.v_proj.weight[rows] *= 0.5
        attention.o_proj.weight[:, rows] = (self.junk.T @ self._random(len(self.junk), HEAD_DIM)) / WIDTH

    def _write_done(self) -> None:
        """Set every MLP to write ``done`` = |found|: silu(x) + silu(-x) is approximately |x| for large x."""
        for layer in self.hf.language_model.layers:
            mlp, steep = layer.mlp, 20.0
            mlp.gate_proj.weight[0] = steep / self.gain * self.d["found"]
            mlp.gate_proj.weight[1] = -mlp.gate_proj.weight[0]
            mlp.up_proj.weight[:2] = self.d["const"] / self.gain / CONST
            mlp.down_proj.weight[:, :2] = (self.d["done"] / steep)[:, None]

    def _sum(self, parts: dict[str, float]) -> Tensor:
        return torch.stack([weight * self.d[name] for name, weight in parts.items()]).sum(0)

    def _junk(self) -> Tensor:
        coefficients = self._random(len(self.junk))
        return coefficients @ self.junk / coefficients.norm()

    def _random(self, *shape: int) -> Tensor:
        return torch.tensor(self.rng.standard_normal(shape), dtype=torch.float32)


def _build(n_layers: int, n_heads: int) -> Lvlm:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from lvlm.tiny.architecture import IMAGE, build_tokenizer

    tokenizer = build_tokenizer()
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=64,
            # So large that from a head's third pair of dimensions on there is no rotation within a prompt.
            rope_parameters={"rope_type": "default", "rope_theta": 1e12},
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=tokenizer.get_vocab()[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        projector_hidden_act="linear",
        tie_word_embeddings=False,
        **special,
    )
    pictures = CLIPImageProcessorPil(
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    return wrap_lvlm(model.eval(), processor, name="planted")
