"""The Informer and its relatives: shapes, sizes, what they see and what they must not."""

import math

import pytest
import torch

from duoka.errors import ConfigError
from duoka.recipes.models.dlinear import DLinear
from duoka.recipes.models.informer import DecoderLayer, Distilling, Informer, Size, sinusoids
from duoka.recipes.models.tabular_regressor import Regressor

SMALL = Size(width=16, heads=2, hidden=32, dropout=0.0, factor=1)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def forecast(size: Size = SMALL, inputs: int = 3, outputs: int = 2, horizon: int = 6) -> torch.Tensor:
    model = Informer(inputs, outputs, 4, label_length=5, horizon=horizon, size=size)
    return model(torch.randn(2, 20, inputs), torch.randn(2, 20 + horizon, 4))


@pytest.mark.parametrize("factor", [None, 1, 5])
@pytest.mark.parametrize(("encoder", "decoder", "distil"), [(1, 1, True), (2, 1, False), (3, 2, True)])
def test_a_forecast_has_a_row_a_step_and_a_column_a_target(factor, encoder, decoder, distil):
    size = Size(16, 2, 32, encoder, decoder, factor, distil)
    assert forecast(size).shape == (2, 6, 2)
    assert forecast(size, inputs=1, outputs=1, horizon=1).shape == (2, 1, 1)


def test_the_papers_size_has_as_many_parameters_as_its_layers():
    width, hidden = 512, 2048
    attention, feed_forward, norm = 4 * (width**2 + width), 2 * width * hidden + width + hidden, 2 * width
    embedding = 3 * 7 * width + width + 4 * width
    encoder = 2 * (attention + feed_forward + 2 * norm) + (3 * width**2 + width + norm) + norm
    decoder = 2 * attention + feed_forward + 3 * norm + norm
    model = Informer(7, 7, 4, label_length=48, horizon=24)
    assert count(model) == 2 * embedding + encoder + decoder + width * 7 + 7


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_distilling_halves_the_sequence(length):
    assert Distilling(8)(torch.randn(2, length, 8)).shape == (2, math.ceil(length / 2), 8)


def test_computing_the_forecasts_places_alone_changes_nothing():
    layer = DecoderLayer(SMALL).double().eval()
    places, memory = torch.randn(2, 11, 16).double(), torch.randn(2, 5, 16).double()
    torch.testing.assert_close(layer(places, memory, 4), layer(places, memory, 11)[:, 7:], rtol=1e-12, atol=1e-12)


def test_a_window_is_forecast_alike_alone_and_among_others():
    model = Informer(3, 3, 4, label_length=8, horizon=6, size=SMALL).double().eval()
    history, marks = torch.randn(5, 24, 3).double(), torch.randn(5, 30, 4).double()
    torch.testing.assert_close(model(history[2:3], marks[2:3]), model(history, marks)[2:3], rtol=1e-10, atol=1e-10)


def test_the_calendar_of_the_future_and_all_of_the_past_are_seen():
    model = Informer(1, 1, 4, label_length=4, horizon=3, size=SMALL).double().eval()
    history, marks = torch.randn(1, 12, 1).double(), torch.randn(1, 15, 4).double()
    history.requires_grad_()
    marks.requires_grad_()
    model(history, marks).sum().backward()
    assert bool((history.grad.abs().sum(2) > 0).all())
    assert bool((marks.grad.abs().sum(2) > 0).all())


def test_lengths_that_do_not_fit_are_said():
    model = Informer(1, 1, 4, label_length=8, horizon=6, size=SMALL)
    with pytest.raises(ConfigError, match="the past has 7 steps and the calendar 13: they must have 8 or more"):
        model(torch.randn(1, 7, 1), torch.randn(1, 13, 4))
    with pytest.raises(ConfigError, match="and 6 more than the past"):
        model(torch.randn(1, 8, 1), torch.randn(1, 13, 4))


def test_positions_are_sines_and_cosines_of_falling_frequency():
    code = sinusoids(9, 6)
    for place in range(9):
        for pair in range(3):
            angle = place / 10_000 ** (2 * pair / 6)
            assert code[place, 2 * pair] == pytest.approx(math.sin(angle), abs=1e-6)
            assert code[place, 2 * pair + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("features", [1, 2, 10, 30])
def test_a_row_is_predicted_alike_alone_and_among_others(features):
    model = Regressor(features, 2).double().eval()
    rows = torch.randn(6, features).double()
    assert model(rows).shape == (6, 2)
    torch.testing.assert_close(model(rows[3:4]), model(rows)[3:4], rtol=1e-10, atol=1e-10)


def test_the_regressor_tells_its_features_apart():
    model = Regressor(4, 1).eval()
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert not torch.allclose(model(row), model(row.flip(1)))


def test_dlinear_begins_as_the_mean_of_the_past_of_each_target():
    model = DLinear(past=30, horizon=4, targets=[2, 0]).double()
    history = torch.randn(3, 30, 4).double()
    for layer in (model.trend, model.rest):
        torch.nn.init.zeros_(layer.bias)
    found = model(history, torch.zeros(3, 34, 1))
    expected = history[:, :, [2, 0]].mean(1, keepdim=True).expand(-1, 4, -1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
