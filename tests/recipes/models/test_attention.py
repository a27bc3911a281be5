"""Attention in float64 against loops that say what is meant, and against torch's own."""

import math

import pytest
import torch
from torch import Tensor, nn

from duoka.errors import ConfigError
from duoka.recipes.models.attention import CrossAttention, SelfAttention, log_length, prob_sparse, sampled_keys


def qkv(length: int, keys: int | None = None, batch: int = 2, heads: int = 3, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    lengths = (length, keys or length, keys or length)
    return [torch.randn(batch, heads, n, width, generator=generator, dtype=torch.float64) for n in lengths]


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query ``(width,)`` over ``(keys, width)``."""
    return (keys @ query / math.sqrt(len(query))).softmax(0) @ values


def by_loops(query: Tensor, key: Tensor, value: Tensor, sample: list[int], top: int, causal: bool) -> Tensor:
    """ProbSparse attention, one query at a time."""
    result = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k, v = query[b, h], key[b, h], value[b, h]
            telling = []
            for i in range(len(q)):
                scores = [float(q[i] @ k[j]) for j in sample]
                telling.append(max(scores) - sum(scores) / len(scores))
            chosen = sorted(range(len(q)), key=lambda i: -telling[i])[:top]
            for i in range(len(q)):
                seen = i + 1 if causal else len(k)
                result[b, h, i] = attend(q[i], k[:seen], v[:seen]) if i in chosen else v[:seen].mean(0)
    return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("top", [1, 4, 11])
def test_probsparse_is_what_loops_over_every_query_say(causal, top):
    query, key, value = qkv(11)
    sample = [3, 0, 7, 9]
    found = prob_sparse(query, key, value, torch.tensor(sample), top, causal=causal)
    torch.testing.assert_close(found, by_loops(query, key, value, sample, top, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_probsparse_of_all_queries_is_full_attention(causal):
    query, key, value = qkv(13)
    found = prob_sparse(query, key, value, torch.arange(13), 13, causal=causal)
    full = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(found, full, rtol=1e-12, atol=1e-12)


def test_probsparse_may_have_other_keys_than_queries():
    query, key, value = qkv(9, keys=5)
    found = prob_sparse(query, key, value, torch.tensor([1, 4]), 3, causal=False)
    torch.testing.assert_close(found, by_loops(query, key, value, [1, 4], 3, False), rtol=1e-12, atol=1e-12)


def test_gradients_of_probsparse_are_those_of_finite_differences():
    tensors = [tensor.requires_grad_() for tensor in qkv(6, batch=1, heads=2)]
    sample = torch.tensor([0, 2, 5])
    assert torch.autograd.gradcheck(lambda q, k, v: prob_sparse(q, k, v, sample, 3, causal=True), tensors)


def copied(layer: SelfAttention | CrossAttention, width: int, heads: int) -> nn.MultiheadAttention:
    """The attention of torch with the weights of ``layer``."""
    own = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    inward = [layer.inward] if isinstance(layer, SelfAttention) else [layer.asking, layer.answering]
    own.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in inward]),
            "in_proj_bias": torch.cat([part.bias for part in inward]),
            "out_proj.weight": layer.outward.weight,
            "out_proj.bias": layer.outward.bias,
        }
    )
    return own


@pytest.mark.parametrize(("factor", "causal"), [(None, False), (None, True), (100, False), (100, True)])
def test_self_attention_with_every_query_is_torchs(factor, causal):
    layer = SelfAttention(12, 3, factor=factor, causal=causal).double()
    places = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = copied(layer, 12, 3)(places, places, places, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(layer(places), expected, rtol=1e-10, atol=1e-10)


def test_cross_attention_is_torchs():
    layer = CrossAttention(12, 3).double()
    places, others = torch.randn(2, 5, 12).double(), torch.randn(2, 8, 12).double()
    expected, _ = copied(layer, 12, 3)(places, others, others, need_weights=False)
    torch.testing.assert_close(layer(places, others), expected, rtol=1e-10, atol=1e-10)


def test_drawn_keys_are_different_places_and_all_of_them_come_up():
    counts = torch.zeros(48)
    for draw in range(400):
        keys = sampled_keys(48, 20, torch.tensor(draw), salt=1)
        assert len(keys.unique()) == 20
        counts[keys] += 1
    assert counts.min() > 110  # 167 on average, with a deviation of 10
    assert counts.max() < 225


def test_layers_draw_others_at_every_step_and_the_same_ones_in_evaluation():
    draws = {tuple(sampled_keys(96, 25, torch.tensor(step), salt).tolist()) for step in range(9) for salt in range(3)}
    assert len(draws) == 27
    layer = SelfAttention(8, 2, factor=1)
    places, state = torch.randn(1, 40, 8), torch.random.get_rng_state()
    first, second = layer(places), layer(places)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(places), layer(places))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_resumed_layer_draws_what_it_would_have():
    layer, places = SelfAttention(8, 2, factor=1), torch.randn(1, 40, 8)
    layer(places)
    other = SelfAttention(8, 2, factor=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(places), other(places))


def test_log_length_grows_with_the_logarithm_and_ends_at_the_length():
    assert [log_length(5, length) for length in (1, 2, 10, 48, 96, 720)] == [1, 2, 10, 20, 25, 35]


def test_heads_that_do_not_share_the_width_are_refused():
    for kind in (lambda: SelfAttention(10, 3, factor=None), lambda: CrossAttention(10, 3)):
        with pytest.raises(ConfigError, match="3 heads cannot share a width of 10"):
            kind()
