"""``duoka check``: every check passes here; a failed one prints its remedy, and the others run too."""

import json

import pytest
import torch

from duoka.cli import check as checking
from duoka.cli.main import main


@pytest.mark.parametrize(("device", "count"), [("cpu", 5), ("cpu:2", 5)])
def test_every_check_passes_on_this_machine(device, count, capsys):
    assert main(["check", "--device", device]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count
    assert all(line.startswith("pass  ") for line in lines)
    assert "64 per device" in lines[1]


def test_the_devices_really_reach_each_other(capsys):
    assert main(["check", "--device", "cpu:3", "--json"]) == 0
    (line,) = [line for line in json.loads(capsys.readouterr().out) if "all-reduce" in line["name"]]
    assert line["words"] == "3 devices added up to 6, as they should"


def test_a_wrong_computation_fails_with_its_remedy_and_other_checks_run(monkeypatch, capsys):
    real, calls = checking._small_model, []

    def small():
        model = real()
        calls.append(model)
        if len(calls) == 2:  # that of the device, not the reference
            torch.nn.init.ones_(model[0].weight)
        return model

    monkeypatch.setattr(checking, "_small_model", small)
    assert main(["check", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = [place for place, line in enumerate(lines) if line.startswith("FAIL")]
    assert "and on the CPU" in lines[failed]
    assert lines[failed + 1].startswith("      remedy: ")
    assert sum(line.startswith("pass") for line in lines) == 4


def test_an_absent_device_is_an_error(capsys):
    assert main(["check", "--device", "cuda:77"]) == 2
    assert "77" in capsys.readouterr().err
