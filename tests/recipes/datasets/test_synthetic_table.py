"""Synthetic table: reproducible, and drawn by the formulas of its docstring."""

import math

import pytest
import torch

from duoka.recipes.datasets import csv_table, synthetic_table


def test_rows_are_a_function_of_the_seed():
    first, again, other = synthetic_table.make(50, 3), synthetic_table.make(50, 3), synthetic_table.make(50, 4)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)


def test_rows_of_seed_0_are_the_documented_ones():
    example = synthetic_table.make(10_000, 0)
    assert example.best_r2() == pytest.approx({"Pressure": 0.9948, "SWAT": 0.9869}, abs=1e-4)
    assert example.features[0, 0].item() == pytest.approx(2352.085, abs=1e-3)


def test_features_are_uniform_and_targets_follow_the_formulas():
    example = synthetic_table.make(4000, 1)
    low, high = (torch.tensor([feature[end] for feature in synthetic_table.FEATURES]).double() for end in (1, 2))
    share = (example.features - low) / (high - low)
    assert share.min() >= 0
    assert share.max() <= 1
    assert share.mean(0).tolist() == pytest.approx([0.5] * 10, abs=0.02)
    for row in (0, 1999):
        x = dict(zip((feature[0] for feature in synthetic_table.FEATURES), share[row].tolist(), strict=True))
        pressure = 80 + 120 * x["Depth"]
        pressure += 45 * math.tanh(3 * (x["Injection"] - x["Production"])) * math.exp(-x["Distance"])
        pressure += 15 * math.sin(2 * math.pi * x["Days"]) * x["Porosity"]
        front = 0.5 * x["Days"] + 0.6 * x["Injection"] * x["Permeability"] - 0.4 * x["Distance"] - 0.1
        viscosity = example.features[row, 4].item()
        water = 0.15 + 0.7 / (1 + math.exp(-6 * front)) - 0.08 * math.log(viscosity) / math.log(20)
        assert example.ground_truth[row].tolist() == pytest.approx([pressure, water])


def test_noise_has_the_stated_deviation():
    example = synthetic_table.make(20_000, 2)
    assert (example.targets - example.ground_truth).std(0).tolist() == pytest.approx([3.0, 0.02], rel=0.03)


def test_file_has_the_features_then_the_targets(tmp_path):
    example = synthetic_table.make(20)
    synthetic_table.write(tmp_path / "d.csv", example)
    found = csv_table.read(tmp_path / "d.csv")
    assert len(found.columns) == 12
    assert found.columns[-2:] == ("Pressure", "SWAT")
    assert torch.allclose(found.numbers(range(10, 12)), example.targets, rtol=1e-6)
