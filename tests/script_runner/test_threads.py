"""Threads and executors of a script end as under Python, and the run goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from duoka.script_runner.threads import join_threads
from support.run_script import run_duoka

pytestmark = pytest.mark.timeout(300)

TRAINING = """
import torch
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
if __name__ == "__main__":
    pool = EXECUTOR(1)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 4)).square().mean().backward()
        optimizer.step()
        done = pool.submit(abs, -3)
    print(done.result())
    LAST
    print("last line")
"""


@pytest.mark.parametrize(
    ("executor", "last", "status"),
    [("ThreadPoolExecutor", "", 0), ("ProcessPoolExecutor", "", 0), ("ThreadPoolExecutor", "raise SystemExit(3)", 3)],
)
def test_an_open_executor_does_not_hang_the_end_of_a_script(executor, last, status, tmp_path: Path) -> None:
    ended = run_duoka(tmp_path, TRAINING.replace("EXECUTOR", executor).replace("LAST", last))
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.split("\n")[0] == "3"
    assert "trained by SGD" in " ".join(ended.stderr.replace("│", " ").split())  # the report


def test_work_that_is_waiting_is_done_and_later_executors_work() -> None:
    done: list[int] = []
    pool = ThreadPoolExecutor(1)
    for number in range(3):
        pool.submit(done.append, number)
    join_threads()
    assert done == [0, 1, 2]
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(done.append, 3)
    with ThreadPoolExecutor(1) as later:
        assert later.submit(abs, -1).result() == 1
