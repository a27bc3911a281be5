"""Common mistakes in calls of duoka's functions are errors with a suggestion."""

import pytest
import torch
from torch import nn

import duoka
from duoka.errors import ConfigError


def test_data_parallel_names_mistaken_arguments():
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"axis=1.*devices"):
        duoka.DataParallel(model, axis=1)
    with pytest.raises(ConfigError, match=r"DataParallel\(Linear\(...\)\)"):
        duoka.DataParallel(nn.Linear, devices="cpu:2")
    with pytest.raises(ConfigError, match="module='cpu:2' is a str"):
        duoka.DataParallel("cpu:2")
    with pytest.raises(ConfigError, match=r"torch's DataParallel.*model\.module"):
        duoka.DataParallel(nn.DataParallel(model), devices="cpu:2")
    with pytest.raises(ConfigError, match=r"device_ids=2.*devices='2'.*devices='0,1'"):
        duoka.DataParallel(model, 2)
    with pytest.raises(ConfigError, match="device='cpu:2' and devices='cpu:3'"):
        duoka.DataParallel(model, device="cpu:2", devices="cpu:3")


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
