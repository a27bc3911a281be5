"""Operations of the Informer's forward per window: duoka's as torch counts them, and a count for the authors' code.

The count is for https://github.com/zhouhaoyi/Informer2020 with the same layers. There, each query is measured on its own
gathered keys, and the decoder computes all positions to the end, of which the forecast's are kept. The benchmark prints
both counts, and the time of duoka's training step.

    python benchmarks/informer.py [--seconds 20]
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from duoka.recipes.models.informer import Informer, InformerSize

BATCH, HORIZON, MARKS = 32, 24, 4
CASES = {"M": (7, 48, 48), "S": (1, 720, 168)}
"""Columns, seq_len and label_len of the authors' script for ETTh1, horizon 24."""


def authors_operations(columns: int, past: int, start: int, size: InformerSize) -> int:
    """Return the multiplications and additions of one window's forward in the authors' code."""
    d, hidden = size.width, size.hidden
    total, length = 0, past
    for layer in range(size.encoder_layers):
        if layer:
            total += 2 * length * 3 * d * d
            length = math.ceil(length / 2)
        total += 8 * length * d * d + 4 * length * d * hidden + prob_sparse(length, d)
    decoder = start + HORIZON
    total += 8 * decoder * d * d + prob_sparse(decoder, d)
    total += 4 * (decoder + length) * d * d + 4 * decoder * length * d
    total += 4 * decoder * d * hidden + 2 * decoder * d * columns
    return total + 2 * (past + decoder) * (3 * columns + MARKS) * d


def prob_sparse(length: int, d: int) -> int:
    """Operations: a score for each query and sampled key, then scores and values for the top queries."""
    top = min(length, 5 * math.ceil(math.log(length)))
    return 2 * length * top * d + 4 * top * length * d


def gathered_bytes(length: int, d: int) -> tuple[int, int]:
    """Bytes that the first encoder layer gathers for a batch: the authors' code for each query, duoka for all queries."""
    top = min(length, 5 * math.ceil(math.log(length)))
    return 4 * BATCH * length * top * d, 4 * BATCH * top * d


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20, help="how long to time each case")
    seconds = parser.parse_args().seconds
    for name, (columns, past, start) in CASES.items():
        size = InformerSize()
        model = Informer(columns, columns, MARKS, label_length=start, horizon=HORIZON, size=size)
        history, marks = torch.randn(BATCH, past, columns), torch.randn(BATCH, past + HORIZON, MARKS)
        truth = torch.randn(BATCH, HORIZON, columns)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(history[:1], marks[:1])
        theirs, ours = authors_operations(columns, past, start, size), counter.get_total_flops()
        print(
            f"{name}: duoka {ours / 1e6:,.0f} M operations a window, the authors' {theirs / 1e6:,.0f} M: {ours / theirs:.2f}"
        )
        each, shared = gathered_bytes(past, size.width)
        print(
            f"   gathered by the first layer for a batch: duoka {shared / 1e6:,.1f} MB, the authors' code {each / 1e6:,.0f} MB"
        )
        print(f"   a training step of {BATCH} windows: {step_s(model, history, marks, truth, seconds):.2f} s")


def step_s(model: Informer, history: torch.Tensor, marks: torch.Tensor, truth: torch.Tensor, seconds: float) -> float:
    """Return the median time of a training step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        began = time.perf_counter()
        optimizer.zero_grad()
        mse_loss(model(history, marks), truth).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
