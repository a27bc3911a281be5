"""Multi-head attention layers: full, and ProbSparse, which computes full attention for a few queries only."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from duoka.data.counter_rng import splitmix64
from duoka.utils.validation import invalid_option


def prob_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, sample: Tensor, top: int, *, causal: bool
) -> Tensor:
    """Return ProbSparse attention, shaped as ``query`` (Zhou et al., https://arxiv.org/abs/2012.07436, section 3).

    The ``top`` queries whose largest score stands out most from their mean score get full
    attention. All other queries get the mean of the values; causal ones the mean so far, where the
    authors' code takes the running sum. `docs/results/informer.md` compares both.

    Args:
        query: ``(batch, heads, queries, width)``.
        key: ``(batch, heads, keys, width)``.
        value: as ``key``.
        sample: positions of the keys to measure scores on, ``(sampled,)``, the same for all queries.
        top: number of queries that get full attention.
        causal: query ``i`` sees keys ``0 .. i`` only; requires as many queries as keys.
    """
    scores = query @ key[:, :, sample].transpose(-2, -1)
    active = (scores.amax(-1) - scores.mean(-1)).topk(top, sorted=False).indices
    index = active.unsqueeze(-1).expand(-1, -1, -1, query.shape[-1])
    mask = torch.arange(key.shape[2], device=key.device) <= active.unsqueeze(-1) if causal else None
    attended = scaled_dot_product_attention(query.gather(2, index), key, value, attn_mask=mask)
    if causal:
        mean = value.cumsum(2) / torch.arange(1, value.shape[2] + 1, device=value.device).unsqueeze(1)
    else:
        mean = value.mean(2, keepdim=True).expand_as(query)
    return mean.scatter(2, index, attended.to(mean.dtype))


def hash_at_step(numbers: Tensor, step: Tensor, salt: int) -> Tensor:
    """Return 64 random bits for each of the int64 ``numbers``, a function of it, ``step`` and ``salt`` alone.

    So every rank draws the same bits at the same ``step`` (an int64 scalar), and so does a resumed run.
    """
    return splitmix64(numbers * -7046029254386353131 + (step + 1) * 2862933555777941757 + salt)


def sample_positions(length: int, count: int, step: Tensor, salt: int) -> Tensor:
    """Return ``count`` distinct positions below ``length``, a function of ``step`` and ``salt`` alone."""
    return hash_at_step(torch.arange(1, length + 1, device=step.device), step, salt).topk(count).indices


def log_length(factor: int, length: int) -> int:
    """Return ``factor * ceil(ln(length))``, at most ``length``: ProbSparse's number of queries and keys.

    >>> log_length(5, 48), log_length(5, 720), log_length(100, 48)
    (20, 35, 48)
    """
    return min(length, max(1, factor * math.ceil(math.log(max(length, 2)))))


class SelfAttention(nn.Module):
    """Self-attention over a sequence; full where ProbSparse would select every query anyway.

    Args:
        width: features of each position.
        heads: number of heads; divides ``width``.
        factor: ProbSparse's sampling factor; ``None`` for full attention.
        causal: each position attends to itself and earlier ones only.
        dropout: dropout of the attention weights, used where ``factor`` is ``None`` only.
        salt: tells this layer's draws from another's.
    """

    def __init__(
        self, width: int, heads: int, *, factor: int | None, causal: bool = False, dropout: float = 0.0, salt: int = 0
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.factor, self.causal, self.dropout, self.salt = heads, factor, causal, dropout, salt
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` for ``inputs`` of that shape."""
        length = inputs.shape[1]
        query, key, value = self.qkv_proj(inputs).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        count = length if self.factor is None else log_length(self.factor, length)
        if count == length:
            dropout = self.dropout if self.training and self.factor is None else 0.0
            attended = scaled_dot_product_attention(query, key, value, is_causal=self.causal, dropout_p=dropout)
        else:
            if self.training:
                self.step += 1
            step = self.step if self.training else torch.zeros_like(self.step)  # evaluation samples fixed positions
            sample = sample_positions(length, count, step, self.salt)
            attended = prob_sparse_attention(query, key, value, sample, count, causal=self.causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Full attention from one sequence to another; arguments as for ``SelfAttention``."""

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.dropout = heads, dropout
        self.query_proj = nn.Linear(width, width)
        self.key_value_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` for ``inputs`` of that shape and ``memory (batch, any, width)``."""
        query = self.query_proj(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value_proj(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def check_heads(width: int, heads: int) -> None:
    """Check that ``heads`` divides ``width``."""
    if heads < 1 or width % heads:
        raise invalid_option("heads", heads, f"a divisor of width={width}")
