"""A script's CUDA_VISIBLE_DEVICES does not change the devices of a run, and the report says so."""

from __future__ import annotations

import pytest

from support.run_script import run_duoka

pytestmark = pytest.mark.timeout(300)

HIDES = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
import torch
model = torch.nn.Linear(4, 1).cuda()
with torch.no_grad():
    for _ in range(3):
        model(torch.zeros(8, 4, device="cuda:1"))
print(torch.cuda.device_count(), os.environ["CUDA_VISIBLE_DEVICES"])
"""


def test_a_script_that_hides_a_device_runs_on_all_and_the_report_says_so(tmp_path) -> None:
    ended = run_duoka(tmp_path, HIDES)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "2 0"
    note = "The script sets CUDA_VISIBLE_DEVICES=0, which changes nothing here: the run keeps 2 CPU workers."
    assert note in " ".join(ended.stderr.split())
