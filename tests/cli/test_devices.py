"""``duoka devices``: the table, the JSON, and the reported choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duoka.cli.devices import print_devices, run
from duoka.cli.main import main
from duoka.devices import DeviceInfo, DeviceProcess, DeviceSelection, Link, describe, resolve
from duoka.devices.cpu import Cores, available_cores

GIB = 2**30
TWO_GPUS = [
    DeviceInfo(
        "cuda:0",
        0,
        "NVIDIA GeForce RTX 3090",
        24 * GIB,
        2 * GIB,
        7,
        (DeviceProcess(os.getpid(), "me", "python", GIB, own=True),),
        (Link(1, "NV4", "4 NVLinks"),),
        "aa",
        "nvml",
    ),
    DeviceInfo(
        "cuda:1",
        1,
        "NVIDIA GeForce RTX 3090",
        24 * GIB,
        12 * GIB,
        99,
        (DeviceProcess(4711, "ann", "python [train].py --多卡", 11 * GIB), DeviceProcess(5, None, None, None)),
        (Link(0, "NV4", "4 NVLinks"),),
        "bb",
        "nvml",
    ),
]
BOTH = DeviceSelection(
    (torch.device("cuda:0"), torch.device("cuda:1")), "auto takes all 2 accelerators: cuda:0 and cuda:1."
)


def test_the_table_shows_memory_use_users_links_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    print_devices("auto", BOTH, TWO_GPUS, Cores(16, "16 cores"))
    output = capsys.readouterr().out
    first, second = (next(line for line in output.splitlines() if name in line) for name in ("│ cuda:0", "│ cuda:1"))
    assert [text for text in ("RTX 3090", "2.0 GiB / 24.0 GiB", "7 %", "none", "1: NV4") if text not in first] == []
    expected = ("12.0 GiB / 24.0 GiB", "99 %", "ann: python [train].py --多卡", "process 4711, 11.0 GiB", "0: NV4")
    assert [text for text in expected if text not in second] == []
    assert "another container: hidden process (process 5)" in output
    assert "NV4: 4 NVLinks" in output
    assert f"auto chooses: cuda:0, cuda:1\nwhy: {BOTH.reason}\n" in output


def test_memory_of_hidden_processes_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    print_devices("auto", BOTH, [replace(TWO_GPUS[1], processes=())], Cores(1, "1 core"))
    output = capsys.readouterr().out
    assert "hidden processes" in output
    assert "none" not in output


def test_unknown_values_are_dashes_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    print_devices("all", BOTH, [DeviceInfo("xpu:0", 0, "Arc", source="torch")], Cores(1, "1 core"))
    output = capsys.readouterr().out
    assert "- / -" in output
    assert "none" not in output
    assert "nvidia-ml-py" in output


def test_json_holds_the_facts_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--device", "cpu:2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["choice"] == {"devices": ["cpu", "cpu"], "reason": resolve("cpu:2").reason}
    assert printed["spec"] == "cpu:2"
    assert printed["cores"] == available_cores()
    assert [fact["device"] for fact in printed["devices"]] == [fact.device for fact in describe()]
    assert all(fact["memory_total_bytes"] > 0 for fact in printed["devices"])


@pytest.mark.parametrize("spec", ["99", "cpu:0", "gpu0", "-1"])
def test_a_bad_device_is_one_message_and_no_table(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--device", spec]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert f"'{spec}'" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_piped_output_is_plain_unbroken_lines(encoding: str) -> None:
    program = (
        "import sys; from duoka.cli.main import main; status = main(['devices']);"
        "print(*{'torchmetrics', 'matplotlib', 'torchvision'} & set(sys.modules)); sys.exit(status)"
    )
    unset = {"COLUMNS", "FORCE_COLOR", "NO_COLOR"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONIOENCODING"] = encoding
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, timeout=120)
    lines = ran.stdout.decode(encoding).splitlines()
    assert b"\x1b" not in ran.stdout
    assert max(map(len, lines)) <= 160
    assert any(describe()[0].name in line for line in lines)
    assert lines[-1] == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_behind_the_output_is_one_message(options: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        words = [sys.executable, "-m", "duoka", "devices", *options]
        ran = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == ["duoka: the disk is full. Free some space, or choose another folder."]


@pytest.mark.parametrize("words", [["--devices", "cpu:2"], ["--devices=cpu:2"], ["cpu:2"]])
def test_devices_may_be_named_in_other_ways(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"] == "cpu:2"


def test_many_workers_are_counted_and_too_many_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    print_devices("cpu:999", resolve("cpu:999"), describe(), Cores(2, "2 cores"))
    output = capsys.readouterr().out
    assert "cpu:999 chooses: 999 CPU workers\n" in output
    assert "999 CPU workers on 2 cores: too many" in output
    print_devices("cpu:2", resolve("cpu:2"), describe(), Cores(2, "2 cores"))
    assert "too many" not in capsys.readouterr().out
