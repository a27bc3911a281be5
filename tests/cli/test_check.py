"""``duoka check``: every line passes here, and one that fails says so, with its remedy, beside the others."""

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


def test_a_device_that_computes_wrongly_fails_with_its_remedy_and_the_others_are_checked(monkeypatch, capsys):
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


def test_a_device_that_is_not_there_is_said(capsys):
    assert main(["check", "--device", "cuda:77"]) == 2
    assert "77" in capsys.readouterr().err
