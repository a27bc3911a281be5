"""Attention layers in float64 against plain loops and torch's own attention."""

import math

import pytest
import torch
from torch import Tensor, nn

from duoka.errors import ConfigError
from duoka.recipes.models.attention import (
    CrossAttention,
    SelfAttention,
    log_length,
    prob_sparse_attention,
    sample_positions,
)


def qkv(length: int, keys: int | None = None, batch: int = 2, heads: int = 3, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    lengths = (length, keys or length, keys or length)
    return [torch.randn(batch, heads, n, width, generator=generator, dtype=torch.float64) for n in lengths]


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query ``(width,)`` to ``(keys, width)``."""
    return (keys @ query / math.sqrt(len(query))).softmax(0) @ values


def loop_attention(query: Tensor, key: Tensor, value: Tensor, sample: list[int], top: int, causal: bool) -> Tensor:
    """ProbSparse attention, one query at a time."""
    result = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k, v = query[b, h], key[b, h], value[b, h]
            spread = []
            for i in range(len(q)):
                scores = [float(q[i] @ k[j]) for j in sample]
                spread.append(max(scores) - sum(scores) / len(scores))
            chosen = sorted(range(len(q)), key=lambda i: -spread[i])[:top]
            for i in range(len(q)):
                seen = i + 1 if causal else len(k)
                result[b, h, i] = attend(q[i], k[:seen], v[:seen]) if i in chosen else v[:seen].mean(0)
    return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("top", [1, 4, 11])
def test_probsparse_equals_a_loop_over_all_queries(causal, top):
    query, key, value = qkv(11)
    sample = [3, 0, 7, 9]
    found = prob_sparse_attention(query, key, value, torch.tensor(sample), top, causal=causal)
    torch.testing.assert_close(found, loop_attention(query, key, value, sample, top, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_probsparse_of_all_queries_is_full_attention(causal):
    query, key, value = qkv(13)
    found = prob_sparse_attention(query, key, value, torch.arange(13), 13, causal=causal)
    full = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(found, full, rtol=1e-12, atol=1e-12)


def test_probsparse_takes_fewer_keys_than_queries():
    query, key, value = qkv(9, keys=5)
    found = prob_sparse_attention(query, key, value, torch.tensor([1, 4]), 3, causal=False)
    torch.testing.assert_close(found, loop_attention(query, key, value, [1, 4], 3, False), rtol=1e-12, atol=1e-12)


def test_probsparse_gradients_equal_finite_differences():
    tensors = [tensor.requires_grad_() for tensor in qkv(6, batch=1, heads=2)]
    sample = torch.tensor([0, 2, 5])
    assert torch.autograd.gradcheck(lambda q, k, v: prob_sparse_attention(q, k, v, sample, 3, causal=True), tensors)


def torch_attention(layer: SelfAttention | CrossAttention, width: int, heads: int) -> nn.MultiheadAttention:
    """Torch's attention with the weights of ``layer``."""
    reference = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    inputs = [layer.qkv_proj] if isinstance(layer, SelfAttention) else [layer.query_proj, layer.key_value_proj]
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in inputs]),
            "in_proj_bias": torch.cat([part.bias for part in inputs]),
            "out_proj.weight": layer.out_proj.weight,
            "out_proj.bias": layer.out_proj.bias,
        }
    )
    return reference


@pytest.mark.parametrize(("factor", "causal"), [(None, False), (None, True), (100, False), (100, True)])
def test_self_attention_with_all_queries_equals_torch(factor, causal):
    layer = SelfAttention(12, 3, factor=factor, causal=causal).double()
    inputs = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = torch_attention(layer, 12, 3)(inputs, inputs, inputs, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-10, atol=1e-10)


def test_cross_attention_equals_torch():
    layer = CrossAttention(12, 3).double()
    inputs, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 8, 12).double()
    expected, _ = torch_attention(layer, 12, 3)(inputs, memory, memory, need_weights=False)
    torch.testing.assert_close(layer(inputs, memory), expected, rtol=1e-10, atol=1e-10)


def test_sampled_positions_are_distinct_and_uniform():
    counts = torch.zeros(48)
    for draw in range(400):
        keys = sample_positions(48, 20, torch.tensor(draw), salt=1)
        assert len(keys.unique()) == 20
        counts[keys] += 1
    assert counts.min() > 110  # 167 on average, with a deviation of 10
    assert counts.max() < 225


def test_layers_draw_new_positions_each_step_and_fixed_ones_in_evaluation():
    draws = {
        tuple(sample_positions(96, 25, torch.tensor(step), salt).tolist()) for step in range(9) for salt in range(3)
    }
    assert len(draws) == 27
    layer = SelfAttention(8, 2, factor=1)
    inputs, state = torch.randn(1, 40, 8), torch.random.get_rng_state()
    first, second = layer(inputs), layer(inputs)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(inputs), layer(inputs))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_restored_layer_continues_its_draws():
    layer, inputs = SelfAttention(8, 2, factor=1), torch.randn(1, 40, 8)
    layer(inputs)
    other = SelfAttention(8, 2, factor=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(inputs), other(inputs))


def test_log_length_is_logarithmic_and_at_most_the_length():
    assert [log_length(5, length) for length in (1, 2, 10, 48, 96, 720)] == [1, 2, 10, 20, 25, 35]


def test_heads_that_do_not_divide_the_width_are_rejected():
    for kind in (lambda: SelfAttention(10, 3, factor=None), lambda: CrossAttention(10, 3)):
        with pytest.raises(ConfigError, match=r"heads=3 .*width=10"):
            kind()
