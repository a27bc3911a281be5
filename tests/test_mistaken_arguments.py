"""Common mistakes in calls of duoka's functions are errors with a suggestion."""

import pytest
import torch
from torch import nn

import duoka
from duoka.errors import ConfigError


def test_data_parallel_names_mistaken_arguments():
    with pytest.raises(ConfigError, match="no option 'device'; did you mean devices='cpu:2'"):
        duoka.DataParallel(nn.Linear(1, 1), device="cpu:2")
    with pytest.raises(ConfigError, match="no option 'axis': module, devices, dim and compile are its own"):
        duoka.DataParallel(nn.Linear(1, 1), axis=1)
    with pytest.raises(ConfigError, match=r"Linear is its class: make one first, DataParallel\(Linear\(...\)\)"):
        duoka.DataParallel(nn.Linear, devices="cpu:2")
    with pytest.raises(ConfigError, match=r"wraps a torch\.nn\.Module, and was given a str: 'cpu:2'"):
        duoka.DataParallel("cpu:2")
    with pytest.raises(
        ConfigError, match=r"wrapped in torch's DataParallel already; give the model itself, model\.module"
    ):
        duoka.DataParallel(nn.DataParallel(nn.Linear(1, 1)), devices="cpu:2")
    with pytest.raises(
        ConfigError, match=r"one number; for device 2 alone write devices='2', for two devices devices='0,1'"
    ):
        duoka.DataParallel(nn.Linear(1, 1), 2)


def test_data_parallel_takes_devices_as_second_argument():
    for spec in ("cpu:2", [torch.device("cpu")] * 2):
        assert duoka.DataParallel(nn.Linear(1, 1), spec).device_ids == [0, 1]
    assert duoka.DataParallel(nn.Linear(1, 1), torch.device("cpu")).device_ids == [0]
    with pytest.raises(ConfigError, match="both name devices"):
        duoka.DataParallel(nn.Linear(1, 1), "cpu:2", devices="cpu:3")


def test_launch_names_mistaken_arguments():
    with pytest.raises(ConfigError, match="device='cpu:2' and devices='cpu:3'"):
        duoka.launch(print, device="cpu:2", devices="cpu:3")
    with pytest.raises(ConfigError, match="no option 'epochs'"):
        duoka.launch(print, epochs=3)


def test_launch_takes_device_and_devices():
    def size() -> int:
        return duoka.current_world().size

    assert duoka.launch(size, device="cpu:2") == duoka.launch(size, device="cpu:2", devices=["cpu", "cpu"]) == 2


def test_swapped_arguments_of_save_and_load_are_errors():
    model = nn.Linear(1, 1)
    for swapped in (model, model.state_dict()):
        with pytest.raises(ConfigError, match=r"the model first, then the path: duoka.save\(model, 'm.pt'\)"):
            duoka.save("m.pt", swapped)
    with pytest.raises(ConfigError, match=r"the path first, then the model: duoka.load\('m.pt', into=model\)"):
        duoka.load(model, "m.pt")
