"""A GPT-2's hidden states over a packed prefix tree, computed with the modules of `transformers` and `peft`.

The formulas are GPT-2's, in fewer passes over memory: LoRA is merged into its projection once per
step, the activation is one kernel, and all layers share one mask. This is the only file that reads
submodules of these libraries (seen on transformers 5.23 and peft 0.21); a test compares the results.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention

from duoka.recipes.models.pair_scoring import gather_rows
from duoka.recipes.models.prefix_packing import PackedTree

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of the same activation


def hidden_states(network: Any, packed: PackedTree) -> Tensor:
    """Return the last hidden states of a ``transformers.GPT2Model`` at each node, ``(nodes, width)``.

    Its projections may have peft's LoRA.
    """
    pairs = network.wte(packed.tokens) + network.wpe(packed.positions)
    hidden = gather_rows(pairs, packed.pair_of_node)
    mask = packed.attention_mask
    bias = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, -torch.inf)
    for number, block in enumerate(network.h):
        if number:
            qkv, rows = _project(block.attn.c_attn, block.ln_1(hidden)), packed.node_of_slot
        else:  # before the first attention a state depends on token and position alone
            qkv, rows = _project(block.attn.c_attn, block.ln_1(pairs)), packed.pair_of_node[packed.node_of_slot]
        attended = _attention(gather_rows(qkv, rows), bias, network.config, number)
        hidden = hidden + _project(block.attn.c_proj, gather_rows(attended, packed.slot_of_node))
        inner = _project(block.mlp.c_fc, block.ln_2(hidden))
        is_tanh = network.config.activation_function in TANH_GELU
        inner = gelu(inner, approximate="tanh") if is_tanh else block.mlp.act(inner)
        hidden = hidden + _project(block.mlp.c_proj, inner)
    return network.ln_f(hidden)  # type: ignore[no-any-return]


def _attention(qkv: Tensor, bias: Tensor, config: Any, layer: int) -> Tensor:
    """Return the attention output of each slot, ``(slots, width)``, for ``qkv (rows, row length, 3 * width)``."""
    heads = torch.unflatten(qkv, 2, (3, config.n_head, -1))
    query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
    scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    attended = scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def _project(layer: Any, inputs: Tensor) -> Tensor:
    """Return the output of a projection with or without LoRA, ``(tokens, out)``, for ``inputs (tokens, in)``."""
    if not hasattr(layer, "lora_A") or torch.is_autocast_enabled(inputs.device.type):
        return layer(inputs)  # type: ignore[no-any-return]
    base, (name, scale) = layer.get_base_layer(), next(iter(layer.scaling.items()))
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    merged: Tensor = _MergedLora.apply(inputs, base.weight, base.bias, down, up, scale)
    return merged


class _MergedLora(torch.autograd.Function):
    """``inputs @ (weight + scale * (up @ down).T) + bias`` for a frozen weight, whose gradient is not computed."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        merged = torch.addmm(weight, down.T, up.T, alpha=scale)
        ctx.save_for_backward(inputs, merged, down, up)
        ctx.scale = scale
        return torch.addmm(bias, inputs, merged)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, merged, down, up = ctx.saved_tensors
        grad_inputs = grad @ merged.T if ctx.needs_input_grad[0] else None
        grad_down = ctx.scale * ((grad @ up).T @ inputs)
        grad_up = ctx.scale * (grad.T @ (inputs @ down.T))
        return grad_inputs, None, None, grad_down, grad_up, None
