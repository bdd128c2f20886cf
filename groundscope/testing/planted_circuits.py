"""Models whose circuit is known because it was put there: what a method that finds heads must find.

A genuine LLaVA (CLIP tower, projector, Llama decoder; a few thousand weights) is built with every weight set by hand.
It is shown pictures with one red or blue square on black and asked what color some noun is; red and blue are told
apart by exactly the heads that `plant` names.

**Subspaces.** The residual stream of width D has an orthonormal basis, drawn from the seed, whose first vectors have
names: ``const`` (the same large number at every token, so that RMS norms divide by nearly the same everywhere and the
model is linear but for its attention), ``red`` (+1 on the red square, -1 on the blue one), ``square`` and ``image`` (1
on the square; on every image token), ``noun``, ``bos`` and ``last`` (1 on the noun, the first and the last token),
``prior`` (what a noun is said to be without looking: +1, -1 or 0), ``moved``, ``found`` and ``done`` (written by heads
and MLPs, below) and ``answer``, the only one that the unembedding of the two answers reads. All others are *junk*: heads
write there, and nothing that matters reads it.

**The tower** does not mix patches: a patch's mean color becomes the named features, through CLIP's embedding and first
norm, and its layers add nothing. The projector is one linear map into the named directions.

**Attention is forced** by keys and queries that read token features, not by positions: rotary frequencies fall so fast that
the last pairs of a head's dimensions do not turn. A head that is to look from the last token to the square has a query that
reads ``last`` and a key that reads ``square``, with a logit of `SHARP`; at every other token, and wherever there is
nothing to find, half that logit goes to the first token, whose value is 0.

**Backups** look at the square as long as no head before them has found anything: the MLP of each layer writes ``done`` =
the size of ``found`` at each token, which turns their query away from it. With the grounding head gone, by zero or mean ablation,
the first backup does its work, and hides the next one the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from concepts.icons import NOUNS
from concepts.schema import CounterfactualPair, Example
from groundscope.core.errors import ConfigError
from groundscope.testing.square_scenes import ANSWERS, GRID, PATCH, SIDE, Square, asked, drawn, usual
from lvlm import wrap_lvlm
from lvlm.model import Lvlm
from lvlm.sites import Head

__all__ = ["ANSWERS", "Planted", "Square", "plant", "usual"]

WIDTH, HEAD_DIM = 32, 8
CONST = 30.0
"""Length of ``const``; everything else at a token is of length about 2."""
SHARP = 40.0
"""Attention logit of what a head is made to look at."""
_NAMES = "const red square image noun bos last prior moved found done answer".split()


@dataclass(frozen=True, eq=False)
class Planted:
    """A model and where its circuit was put; made by `plant`."""

    model: Lvlm
    seed: int
    grounding: Head | None
    """Looks from the last token at the square and writes its color to the answer; None with a two-step circuit."""
    decoys: tuple[Head, ...]
    """Look from the last token at the image with full mass, and write what they see where nothing reads."""
    prior: Head | None
    """Looks at the noun and pushes the answer that is usual for it, from text alone."""
    mover: Head | None
    """First step: writes the square's color to the noun's token."""
    reader: Head | None
    """Second step: reads it there from the last token and writes it to the answer."""
    backups: tuple[Head, ...]
    """Do what `grounding` does where no head before them has, in the order of their layers."""

    @property
    def answering(self) -> Head:
        """The head that writes what is seen to the answer: `grounding`, or `reader`."""
        return next(head for head in (self.grounding, self.reader) if head is not None)

    def examples(self, count: int, seed: int = 0) -> tuple[Example, ...]:
        """Return questions about pictures of their own: cell, color and noun are drawn."""
        return tuple(drawn(i, seed) for i in range(count))

    def pairs(self, count: int, seed: int = 0) -> tuple[CounterfactualPair, ...]:
        """Return the same questions, each with the picture whose square has the other color."""
        made = []
        for example in self.examples(count, seed):
            other = ANSWERS[1 - ANSWERS.index(example.answer)]
            cell = example.image.cell if isinstance(example.image, Square) else 0
            change = f"square: {example.answer} -> {other}"
            noun = example.objects[0].noun
            corrupt = asked(f"{example.id}|{change}", Square(cell, other), noun, example.group)
            made.append(CounterfactualPair(example, corrupt, "color", change))
        return tuple(made)


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
    """Make a model with a circuit at places that the seed draws; all other heads read and write at random, in junk.

    Parameters
    ----------
    seed
        Decides every place, the basis of the residual stream and what the other heads do.
    circuit
        ``direct``: a grounding head at the last token; ``two_step``: a mover at the noun and, in a later layer, a
        reader at the last token.
    decoys
        How many. Every second one looks at the square and copies its color, the others look at the background.
    prior
        Whether there is a head that answers from the noun; half as strong as the picture.
    backups
        How many, each in a layer of its own after the grounding head's; only with ``direct``.
    n_layers, n_heads
        Shape of the decoder.

    Raises
    ------
    ConfigError
        For a circuit that does not exist, or more heads or layers than there are.
    """
    if circuit not in ("direct", "two_step") or (circuit == "two_step" and backups):
        msg = f"circuit='{circuit}' with {backups} backups: choose 'direct', or 'two_step' without backups"
        raise ConfigError(msg)
    steps = 2 if circuit == "two_step" else 1 + backups
    extra = decoys + int(prior)
    if steps > n_layers or steps + extra > n_layers * n_heads or min(decoys, backups, n_layers - 1, n_heads - 1) < 0:
        msg = (
            f"{steps} heads in layers of their own, {decoys} decoys and {int(prior)} prior heads do not fit into "
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
        _Hand(model, rng).write(planted)
    return planted


class _Hand:
    """Writes weights in terms of named directions of the residual stream."""

    def __init__(self, model: Lvlm, rng: np.random.Generator) -> None:
        self.hf, self.rng = model.hf.model, rng
        self.head_ids = model.hf.lm_head.weight
        basis = torch.tensor(np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0], dtype=torch.float32)
        self.d: dict[str, Tensor] = dict(zip(_NAMES, basis, strict=False))
        self.junk = basis[len(_NAMES) :]  # [J, D]
        self.ids = model.processor.tokenizer.convert_tokens_to_ids
        # An RMS norm multiplies the residual by nearly this: rows that read it divide by it.
        self.gain = WIDTH**0.5 / CONST

    def write(self, p: Planted) -> None:
        for parameter in self.hf.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        self._see()
        self._embed()
        for layer in self.hf.language_model.layers:
            for h in range(p.model.n_heads):
                self._idle(layer.self_attn, h)
        for k, head in enumerate(p.decoys):
            key = {"square": 1.0} if k % 2 == 0 else {"image": 1.0, "square": -1.0}
            seen = self.d["red"] if k % 2 == 0 else self.d["image"]
            self._head(head, {"last": 1.0}, key, seen, self._junk())
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
            self._flag()
        self.head_ids.copy_(0.3 * self._random(len(self.head_ids), len(self.junk)) @ self.junk)
        for answer, sign in zip(ANSWERS, (1.0, -1.0), strict=True):
            self.head_ids[self.ids(answer)] = sign * 3.0 / self.gain * self.d["answer"]

    def _see(self) -> None:
        """Make a patch's mean color the features of its token; its pixels are -1 for black, +1 for full color."""
        vision = self.hf.vision_tower
        vision = getattr(vision, "vision_model", vision)
        red, blue = 0, 2  # channels
        weight = torch.zeros(vision.embeddings.patch_embedding.weight.shape[:2])  # [hidden, 3]
        # Every feature in two dimensions of opposite sign, so that the norm's mean is 0.
        for k, sign in ((0, 0.5), (1, -0.5)):
            weight[k, red], weight[k, blue] = sign, -sign  # +1 red, -1 blue, 0 black
            weight[2 + k, red] = weight[2 + k, blue] = sign  # 0 in color, -1 black: the position's 1 is added
        area = PATCH * PATCH
        vision.embeddings.patch_embedding.weight.copy_((weight / area)[:, :, None, None].expand(-1, -1, PATCH, PATCH))
        vision.embeddings.class_embedding.zero_()
        vision.embeddings.position_embedding.weight.copy_(torch.tensor([0, 0, 1, -1, 1, -1, 0, 0.0]))
        # On the square the three features are +-1, 1, 1 in six of eight dimensions: the norm multiplies by this.
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
        """Set a head; dimensions 3 and 7 of its queries and keys do not turn, 0 of its values carries what it reads."""
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

    def _idle(self, attention: Any, head: int) -> None:
        """Let a head look and read at random, but not ``const``, which would outweigh all else, and write junk."""
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        rest = torch.stack([v for name, v in self.d.items() if name != "const"])
        read = torch.cat([rest, self.junk])  # [D - 1, D]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows] = 0.5 * self._random(HEAD_DIM, len(read)) @ read / self.gain
        attention.v_proj.weight[rows] *= 0.5
        attention.o_proj.weight[:, rows] = (self.junk.T @ self._random(len(self.junk), HEAD_DIM)) / WIDTH

    def _flag(self) -> None:
        """Let every MLP write ``done`` = |found|: silu(x) + silu(-x) is nearly |x| for large x."""
        for layer in self.hf.language_model.layers:
            mlp, steep = layer.mlp, 20.0
            mlp.gate_proj.weight[0] = steep / self.gain * self.d["found"]
            mlp.gate_proj.weight[1] = -mlp.gate_proj.weight[0]
            mlp.up_proj.weight[:2] = self.d["const"] / self.gain / CONST
            mlp.down_proj.weight[:, :2] = (self.d["done"] / steep)[:, None]

    def _sum(self, parts: dict[str, float]) -> Tensor:
        return torch.stack([weight * self.d[name] for name, weight in parts.items()]).sum(0)

    def _junk(self) -> Tensor:
        drawn = self._random(len(self.junk))
        return drawn @ self.junk / drawn.norm()

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
            # So steep that from a head's third pair of dimensions on nothing turns within a prompt.
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
