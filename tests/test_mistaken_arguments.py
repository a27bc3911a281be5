"""What is easily mistaken in a call of duoka's own functions is said with what was meant."""

import pytest
from torch import nn

import duoka
from duoka.errors import ConfigError


def test_data_parallel_says_what_was_meant():
    with pytest.raises(ConfigError, match="no option 'device'; did you mean devices='cpu:2'"):
        duoka.DataParallel(nn.Linear(1, 1), device="cpu:2")
    with pytest.raises(ConfigError, match="no option 'axis': module, devices, dim and compile are its own"):
        duoka.DataParallel(nn.Linear(1, 1), axis=1)
    with pytest.raises(ConfigError, match=r"Linear is its class: make one first, DataParallel\(Linear\(...\)\)"):
        duoka.DataParallel(nn.Linear, devices="cpu:2")
    with pytest.raises(ConfigError, match=r"wraps a torch\.nn\.Module, and was given a str: 'cpu:2'"):
        duoka.DataParallel("cpu:2")


def test_launch_says_what_was_meant():
    with pytest.raises(ConfigError, match="did you mean devices='cpu:2'"):
        duoka.launch(print, device="cpu:2")
    with pytest.raises(ConfigError, match="no option 'epochs'; what is for the function stands after it"):
        duoka.launch(print, epochs=3)


def test_swapped_arguments_of_save_and_load_are_said():
    model = nn.Linear(1, 1)
    for swapped in (model, model.state_dict()):
        with pytest.raises(ConfigError, match=r"the model first, then the path: duoka.save\(model, 'm.pt'\)"):
            duoka.save("m.pt", swapped)
    with pytest.raises(ConfigError, match=r"the path first, then the model: duoka.load\('m.pt', into=model\)"):
        duoka.load(model, "m.pt")
