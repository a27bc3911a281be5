"""A GPT-2's states over packed rows: the modules are those of `transformers` and `peft`, the order of operations is ours.

The same formulas, to rounding, in fewer passes over memory: LoRA's addition is merged into its projection once a step (the rank
is small, so that costs next to nothing) instead of being added to what comes out for every token; the activation is one kernel;
and the mask is made once for all layers. `packing` makes the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention

from duoka.recipes.models.pair_scoring import rows_of
from duoka.recipes.models.prefix_packing import PackedTree

__all__ = ["states"]


def states(network: Any, packed: PackedTree) -> Tensor:
    """Return the last states of a ``transformers.GPT2Model``, with peft's LoRA or without, at each node: ``(nodes, width)``."""
    pairs = network.wte(packed.tokens) + network.wpe(packed.places)
    found = rows_of(pairs, packed.pairs)
    blind = torch.zeros_like(packed.seen, dtype=found.dtype).masked_fill_(~packed.seen, -torch.inf)
    for number, block in enumerate(network.h):
        if number:
            asked, rows = _project(block.attn.c_attn, block.ln_1(found)), packed.rows
        else:  # before any attention a state depends on token and place alone
            asked, rows = _project(block.attn.c_attn, block.ln_1(pairs)), packed.pairs[packed.rows]
        attended = _attend(rows_of(asked, rows), blind, network.config, number)
        found = found + _project(block.attn.c_proj, rows_of(attended, packed.homes))
        inner = _project(block.mlp.c_fc, block.ln_2(found))
        inner = gelu(inner, approximate="tanh") if network.config.activation_function in TANH else block.mlp.act(inner)
        found = found + _project(block.mlp.c_proj, inner)
    return network.ln_f(found)  # type: ignore[no-any-return]


def _attend(asked: Tensor, blind: Tensor, config: Any, layer: int) -> Tensor:
    """Return what each slot gets, ``(slots, width)``, of queries, keys and values ``(rows, row length, 3 * width)``."""
    heads = torch.unflatten(asked, 2, (3, config.n_head, -1))
    query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
    scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    attended = scaled_dot_product_attention(query, key, value, attn_mask=blind.to(query.dtype), scale=scale)
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


TANH = ("gelu_new", "gelu_pytorch_tanh")
"""Names of one formula."""


def _project(layer: Any, inputs: Tensor) -> Tensor:
    """Return what ``layer`` makes of ``inputs (tokens, in)``: ``(tokens, out)``."""
    if not hasattr(layer, "lora_A"):
        return layer(inputs)  # type: ignore[no-any-return]
    base, (name, scale) = layer.get_base_layer(), next(iter(layer.scaling.items()))
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if torch.is_autocast_enabled(inputs.device.type):
        return layer(inputs)  # type: ignore[no-any-return]
    merged: Tensor = _Merged.apply(inputs, base.weight, base.bias, down, up, scale)
    return merged


class _Merged(torch.autograd.Function):
    """``inputs @ (weight + scale * (up @ down).T) + bias`` with a frozen weight: its gradient is never made."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        merged = torch.addmm(weight, down.T, up.T, alpha=scale)
        ctx.save_for_backward(inputs, merged, down, up)
        ctx.scale = scale
        return torch.addmm(bias, inputs, merged)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, merged, down, up = ctx.saved_tensors
        below = gradient @ merged.T if ctx.needs_input_grad[0] else None
        of_down = ctx.scale * ((gradient @ up).T @ inputs)
        of_up = ctx.scale * (gradient.T @ (inputs @ down.T))
        return below, None, None, of_down, of_up, None
