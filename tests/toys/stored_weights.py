"""The embedded model with its weights stored in several ways, and the float32 model that each must agree with."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lvlm import Lvlm, load_lvlm, wrap_lvlm


class Packed(nn.Linear):
    """A linear layer whose weight is bytes of another shape, as in bitsandbytes: two codes of 4 bits, or one of 8, in a byte.

    Differentiable with respect to its input, by the matrix that the codes stand for.
    """

    def __init__(self, of: nn.Linear, bits: int) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features, self.bits = of.in_features, of.out_features, bits
        largest = 2 ** (bits - 1) - 1
        scale = of.weight.detach().abs().amax(1, keepdim=True) / largest
        codes = (of.weight.detach() / scale).round().to(torch.int16) + largest
        flat = codes.flatten()
        stored = flat if bits == 8 else flat[::2] * 16 + flat[1::2]
        self.weight = nn.Parameter(stored.to(torch.uint8)[:, None], requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if of.bias is None else nn.Parameter(of.bias.detach().clone(), requires_grad=False)

    def matrix(self) -> Tensor:
        stored = self.weight[:, 0].to(torch.int16)
        codes = stored if self.bits == 8 else torch.stack([stored // 16, stored % 16], 1).flatten()
        matrix = (codes - (2 ** (self.bits - 1) - 1)).float().unflatten(0, (self.out_features, self.in_features))
        return matrix * self.get_buffer("scale")

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        if self.bits == 8:  # inputs are rounded too, row by row; the gradient ignores it
            scale = input.detach().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            input = input + ((input.detach() / scale).round() * scale - input.detach())
        return nn.functional.linear(input, self.matrix().to(input), self.bias)


KINDS = ("bfloat16", "8-bit", "4-bit", "CPU offload")


@cache
def stored(kind: str) -> tuple[Lvlm, Lvlm]:
    """Return the model with its weights stored in a way, and the float32 model with the same values; no test may change them."""
    base = load_lvlm("tiny", validate=False)
    network: Any = copy.deepcopy(base.hf)
    reference: Any = copy.deepcopy(base.hf)
    if kind == "bfloat16":
        network = network.to(torch.bfloat16)
        reference.load_state_dict({k: v.bfloat16().to(v.dtype) for k, v in reference.state_dict().items()})
    elif kind == "CPU offload":
        import accelerate

        accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    else:
        for path, module in list(reference.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in path:
                packed = Packed(module, int(kind[0]))
                with torch.no_grad():
                    module.weight.copy_(packed.matrix())
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, packed)
    wrapped = [wrap_lvlm(n.eval(), base.processor, name=kind, validate=False) for n in (network, reference)]
    return wrapped[0], wrapped[1]
