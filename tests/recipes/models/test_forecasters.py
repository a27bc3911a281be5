"""Informer, tabular regressor and DLinear: shapes, sizes and what their outputs depend on."""

import math

import pytest
import torch

from duoka.errors import ConfigError
from duoka.recipes.models.dlinear import DLinear
from duoka.recipes.models.informer import (
    DecoderLayer,
    DistillingLayer,
    Informer,
    InformerSize,
    TabularRegressor,
    sinusoidal_positions,
)

SMALL = InformerSize(width=16, heads=2, hidden=32, dropout=0.0, factor=1)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def forecast(size: InformerSize = SMALL, inputs: int = 3, outputs: int = 2, horizon: int = 6) -> torch.Tensor:
    model = Informer(inputs, outputs, 4, label_length=5, horizon=horizon, size=size)
    return model(torch.randn(2, 20, inputs), torch.randn(2, 20 + horizon, 4))


@pytest.mark.parametrize("factor", [None, 1, 5])
@pytest.mark.parametrize(("encoder", "decoder", "distil"), [(1, 1, True), (2, 1, False), (3, 2, True)])
def test_a_forecast_has_one_row_per_step_and_one_column_per_target(factor, encoder, decoder, distil):
    size = InformerSize(16, 2, 32, encoder, decoder, factor, distil)
    assert forecast(size).shape == (2, 6, 2)
    assert forecast(size, inputs=1, outputs=1, horizon=1).shape == (2, 1, 1)


def test_the_papers_size_has_the_parameters_of_its_layers():
    width, hidden = 512, 2048
    attention, feed_forward, norm = 4 * (width**2 + width), 2 * width * hidden + width + hidden, 2 * width
    embedding = 3 * 7 * width + width + 4 * width
    encoder = 2 * (attention + feed_forward + 2 * norm) + (3 * width**2 + width + norm) + norm
    decoder = 2 * attention + feed_forward + 3 * norm + norm
    model = Informer(7, 7, 4, label_length=48, horizon=24)
    assert count(model) == 2 * embedding + encoder + decoder + width * 7 + 7


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_distilling_halves_the_sequence(length):
    assert DistillingLayer(8)(torch.randn(2, length, 8)).shape == (2, math.ceil(length / 2), 8)


def test_the_last_decoder_layer_may_skip_positions_before_the_forecast():
    layer = DecoderLayer(SMALL).double().eval()
    hidden, memory = torch.randn(2, 11, 16).double(), torch.randn(2, 5, 16).double()
    torch.testing.assert_close(layer(hidden, memory, 4), layer(hidden, memory, 11)[:, 7:], rtol=1e-12, atol=1e-12)


def test_a_forecast_does_not_depend_on_the_rest_of_the_batch():
    model = Informer(3, 3, 4, label_length=8, horizon=6, size=SMALL).double().eval()
    history, marks = torch.randn(5, 24, 3).double(), torch.randn(5, 30, 4).double()
    torch.testing.assert_close(model(history[2:3], marks[2:3]), model(history, marks)[2:3], rtol=1e-10, atol=1e-10)


def test_a_forecast_depends_on_the_whole_past_and_the_future_calendar():
    model = Informer(1, 1, 4, label_length=4, horizon=3, size=SMALL).double().eval()
    history, marks = torch.randn(1, 12, 1).double(), torch.randn(1, 15, 4).double()
    history.requires_grad_()
    marks.requires_grad_()
    model(history, marks).sum().backward()
    assert bool((history.grad.abs().sum(2) > 0).all())
    assert bool((marks.grad.abs().sum(2) > 0).all())


def test_wrong_lengths_are_rejected():
    model = Informer(1, 1, 4, label_length=8, horizon=6, size=SMALL)
    with pytest.raises(ConfigError, match=r"history has 7 steps.*label_length=8"):
        model(torch.randn(1, 7, 1), torch.randn(1, 13, 4))
    with pytest.raises(ConfigError, match="horizon=6"):
        model(torch.randn(1, 8, 1), torch.randn(1, 13, 4))


def test_positions_are_sines_and_cosines_of_falling_frequency():
    code = sinusoidal_positions(9, 6)
    for position in range(9):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert code[position, 2 * pair] == pytest.approx(math.sin(angle), abs=1e-6)
            assert code[position, 2 * pair + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("features", [1, 2, 10, 30])
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(features):
    model = TabularRegressor(features, 2).double().eval()
    rows = torch.randn(6, features).double()
    assert model(rows).shape == (6, 2)
    torch.testing.assert_close(model(rows[3:4]), model(rows)[3:4], rtol=1e-10, atol=1e-10)


def test_the_regressor_depends_on_the_order_of_features():
    model = TabularRegressor(4, 1).eval()
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert not torch.allclose(model(row), model(row.flip(1)))


def test_dlinear_starts_as_the_mean_of_each_targets_past():
    model = DLinear(past=30, horizon=4, targets=[2, 0]).double()
    history = torch.randn(3, 30, 4).double()
    for layer in (model.trend, model.remainder):
        torch.nn.init.zeros_(layer.bias)
    found = model(history, torch.zeros(3, 34, 1))
    expected = history[:, :, [2, 0]].mean(1, keepdim=True).expand(-1, 4, -1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
