"""``launch`` without failures: results, copies, reuse of workers, and the state of the user's process afterwards."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

import duoka
from duoka import errors
from support.processes import worker_pids


def ranks() -> tuple[int, int, int, int]:
    world = duoka.current_world()
    return world.rank, world.size, dist.get_rank(), dist.get_world_size()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_device_runs_the_function_in_one_process_group(size: int) -> None:
    assert duoka.launch(ranks, devices=f"cpu:{size}", returns="all") == [(r, size, r, size) for r in range(size)]


def test_the_caller_is_rank_zero_and_gets_its_value() -> None:
    assert duoka.launch(lambda: (os.getpid(), duoka.current_world().rank), devices="cpu:2") == (os.getpid(), 0)


def test_a_group_that_could_not_be_created_before_does_no_harm() -> None:
    with pytest.raises(ValueError, match=r"MASTER_ADDR|RANK"):
        dist.init_process_group("gloo")
    assert duoka.launch(dist.get_rank, devices="cpu:2", returns="all") == [0, 1]


def test_collectives_reach_every_rank() -> None:
    def collect() -> tuple[float, str, list[int], bool]:
        world = duoka.current_world()
        total = world.all_reduce(torch.tensor([float(world.rank)]))
        return (
            total.item(),
            world.broadcast_object(f"from {world.rank}"),
            world.all_gather_object(world.rank),
            world.any_rank(world.rank == 2),
        )

    assert duoka.launch(collect, devices="cpu:3", returns="all") == [(3.0, "from 0", [0, 1, 2], True)] * 3


def test_rank_zero_gets_the_users_own_objects() -> None:
    model = nn.Linear(2, 2)

    def fill(given: nn.Linear) -> bool:
        nn.init.constant_(given.weight, 5.0 + duoka.current_world().rank)
        return given is model

    assert duoka.launch(fill, model, devices="cpu:2")
    assert model.weight.unique().tolist() == [5.0]


def test_workers_get_copies_that_keep_types_views_and_ties() -> None:
    base = torch.arange(1_000_000, dtype=torch.float32)
    array = np.arange(500_000)

    def look(data: dict[str, object]) -> tuple[object, ...]:
        whole, part, kept = data["whole"], data["part"], data["array"]
        assert isinstance(whole, torch.Tensor)
        assert isinstance(part, torch.Tensor)
        assert isinstance(kept, np.ndarray)
        whole[0] = 7.0  # each rank's own copy, and writable
        kept[0] = 9
        return (
            whole[1:3].tolist(),
            part[0].item(),
            int(kept[1]),
            part.untyped_storage()._cdata == whole.untyped_storage()._cdata,
        )

    def on_worker(data: dict[str, object]) -> tuple[object, ...] | None:
        return look(data) if duoka.current_world().rank else None

    values = duoka.launch(on_worker, {"whole": base, "part": base[:10], "array": array}, devices="cpu:3", returns="all")
    assert values[1:] == [([1.0, 2.0], 7.0, 1, True)] * 2
    assert base[0] == 0
    assert array[0] == 0


def test_workers_map_a_large_tensor_instead_of_copying_it() -> None:
    data = torch.ones(64 << 20, dtype=torch.uint8)

    def anonymous_bytes_used(given: torch.Tensor) -> int:
        before = anonymous_bytes()
        assert int(given.sum()) == given.numel()
        return anonymous_bytes() - before

    def anonymous_bytes() -> int:
        """Memory that belongs to no file: a page of a mapped file counts as one process's own until another reads it too."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    used = duoka.launch(anonymous_bytes_used, data, devices="cpu:3", returns="all")
    assert max(used[1:]) < data.numel() / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.float64])
def test_tensors_of_every_type_arrive_in_both_directions(dtype: torch.dtype) -> None:
    sent = torch.eye(3).to(dtype)
    empty, scalar = torch.empty(0, 4, dtype=dtype), torch.ones((), dtype=dtype)
    returned = duoka.launch(lambda *given: given, sent, empty, scalar, devices="cpu:2", returns="all")[1]
    for before, after in zip((sent, empty, scalar), returned, strict=True):
        assert torch.equal(before, after)
        assert before.dtype == after.dtype


def test_a_returned_parameter_still_requires_gradients() -> None:
    def train() -> nn.Parameter:
        parameter = nn.Parameter(torch.ones(3))
        (parameter * 2).sum().backward()
        return parameter

    returned = duoka.launch(train, devices="cpu:2", returns="all")[1]
    assert isinstance(returned, nn.Parameter)
    assert returned.requires_grad


def test_a_second_launch_reuses_the_warm_workers() -> None:
    duoka.launch(ranks, devices="cpu:3")
    first = set(worker_pids())
    duoka.launch(ranks, devices="cpu:3")
    duoka.launch(ranks, devices="cpu:2")
    assert set(worker_pids()) == first
    assert len(first) == 2


def test_workers_get_the_current_directory_variables_path_and_argv(tmp_path, monkeypatch) -> None:
    def look() -> tuple[str, str | None, bool, list[str]]:
        return os.getcwd(), os.environ.get("DUOKA_TEST_X"), "extra" in sys.path, sys.argv

    duoka.launch(look, devices="cpu:2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUOKA_TEST_X", "1")
    monkeypatch.syspath_prepend("extra")
    monkeypatch.setattr(sys, "argv", ["train.py", "--fast"])
    assert duoka.launch(look, devices="cpu:2", returns="all")[1] == (str(tmp_path), "1", True, ["train.py", "--fast"])
    monkeypatch.delenv("DUOKA_TEST_X")
    assert duoka.launch(look, devices="cpu:2", returns="all")[1][1] is None


def test_workers_run_the_new_version_of_an_edited_module(tmp_path, monkeypatch) -> None:
    import importlib

    source = tmp_path / "duoka_edited_module.py"
    source.write_text("def answer():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("duoka_edited_module")
    try:
        assert duoka.launch(module.answer, devices="cpu:2", returns="all") == [1, 1]
        source.write_text("def answer():\n    return 22\n")
        importlib.reload(module)
        assert duoka.launch(module.answer, devices="cpu:2", returns="all") == [22, 22]
    finally:
        del sys.modules["duoka_edited_module"]


def test_the_callers_process_state_is_restored() -> None:
    def disturb() -> None:
        os.environ["DUOKA_LEFT_BEHIND"] = "1"
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        torch.set_num_threads(1)

    duoka.launch(disturb, devices="cpu:2")  # starts the workers
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    expected = (
        dict(os.environ),
        torch.get_num_threads(),
        signal.getsignal(signal.SIGINT),
        threading.enumerate(),
        sys.excepthook,
    )
    descriptors = psutil.Process().num_fds()
    duoka.launch(disturb, devices="cpu:2")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), str(np.random.get_state())) == state[1:]
    assert expected == (
        dict(os.environ),
        torch.get_num_threads(),
        signal.getsignal(signal.SIGINT),
        threading.enumerate(),
        sys.excepthook,
    )
    assert signal.set_wakeup_fd(-1) == -1
    assert not dist.is_initialized()
    assert duoka.current_world().size == 1
    assert psutil.Process().num_fds() == descriptors


def test_a_seed_repeats_the_draws_and_ranks_draw_differently() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    torch.manual_seed(3)
    first = duoka.launch(draw, devices="cpu:3", returns="all")
    torch.manual_seed(3)
    again = duoka.launch(draw, devices="cpu:3", returns="all")
    torch.manual_seed(4)
    other = duoka.launch(draw, devices="cpu:3", returns="all")
    assert first[1:] == again[1:]
    assert first[0][0] == again[0][0]
    assert len({value[0] for value in first + other}) == 6


def test_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert sum(duoka.launch(torch.get_num_threads, devices="cpu:2", returns="all")) <= max(cores, 2)


def test_workers_output_is_hidden_or_labelled(capfd) -> None:
    def print_rank() -> None:
        print(f"hello from {duoka.current_world().rank}")

    duoka.launch(print_rank, devices="cpu:2")
    assert capfd.readouterr().out == "hello from 0\n"
    duoka.launch(print_rank, devices="cpu:2", output="all")
    assert "[rank 1 cpu:1] hello from 1\n" in capfd.readouterr().out


def test_a_worker_with_much_output_does_not_stall() -> None:
    def print_rank() -> int:
        if duoka.current_world().rank:
            for _ in range(3000):
                print("x" * 1000)
        return 1

    assert duoka.launch(print_rank, devices="cpu:2", returns="all") == [1, 1]


def test_a_launch_inside_a_launch_is_an_error() -> None:
    with pytest.raises(errors.LaunchError, match="launch already runs"):
        duoka.launch(lambda: duoka.launch(ranks, devices="cpu:2"), devices="cpu:2")


def test_arguments_that_cannot_be_pickled_are_named() -> None:
    with pytest.raises(errors.LaunchError, match="lock"):
        duoka.launch(print, threading.Lock(), devices="cpu:2")


def test_an_existing_process_group_is_an_error_and_stays() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(errors.LaunchError, match="destroy_process_group"):
            duoka.launch(ranks, devices="cpu:2")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("option", "value"), [("returns", "some"), ("output", "loud")])
def test_an_invalid_option_is_named(option: str, value: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"{option}='{value}'"):
        duoka.launch(ranks, devices="cpu:2", **{option: value})


def test_workers_outlive_the_thread_that_started_them() -> None:
    values: list[object] = []
    thread = threading.Thread(target=lambda: values.append(duoka.launch(ranks, devices="cpu:2")))
    thread.start()
    thread.join()
    warm = worker_pids()
    duoka.launch(ranks, devices="cpu:2")
    assert values == [(0, 2, 0, 2)]
    assert worker_pids() == warm


def test_a_dataloader_with_processes_works_in_workers() -> None:
    def load() -> float:
        data = torch.utils.data.TensorDataset(torch.arange(8.0))
        return sum(float(batch.sum()) for (batch,) in torch.utils.data.DataLoader(data, batch_size=2, num_workers=2))

    assert duoka.launch(load, devices="cpu:2", returns="all") == [28.0, 28.0]


@pytest.mark.extended
def test_a_rank_may_join_a_collective_after_the_connect_timeout() -> None:
    def join_late() -> float:
        if duoka.current_world().rank:
            time.sleep(5)
        return duoka.current_world().all_reduce(torch.ones(1)).item()

    assert duoka.launch(join_late, devices="cpu:2", timeout_s=30) == 2.0


def test_a_collective_that_a_rank_does_not_join_times_out() -> None:
    def wait_alone() -> None:
        if duoka.current_world().rank:
            time.sleep(150)  # longer than this test may take
        duoka.current_world().barrier()

    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        duoka.launch(wait_alone, devices="cpu:2", timeout_s=2)


def test_functions_may_use_torchs_special_module_objects() -> None:
    def look() -> tuple[bool, bool, bool]:
        torch.backends.cudnn.benchmark = bool(torch.backends.cudnn.benchmark)
        return torch.backends.mkldnn.is_available(), torch.backends.cuda.is_built(), callable(torch.ops.aten.add)

    first, second = duoka.launch(look, devices="cpu:2", returns="all")
    assert first == second


def test_a_loader_with_running_processes_can_be_an_argument() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(4.0))
    loader = torch.utils.data.DataLoader(data, num_workers=1, persistent_workers=True)
    next(iter(loader))
    try:
        assert (
            duoka.launch(lambda given: sum(float(x) for (x,) in given), loader, devices="cpu:2", returns="all")
            == [6.0] * 2
        )
    finally:
        loader._iterator._shutdown_workers()


def test_torch_settings_of_the_caller_hold_on_every_rank() -> None:
    def look() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    before = look()
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    try:
        changed = look()
        assert duoka.launch(look, devices="cpu:2", returns="all") == [changed] * 2
    finally:
        torch.set_default_dtype(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.use_deterministic_algorithms(False)
    assert changed != before
    assert duoka.launch(look, devices="cpu:2", returns="all") == [before] * 2


def test_a_value_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(errors.LaunchError, match=r"a lock, cannot be sent to rank 0.*state_dict"):
        duoka.launch(threading.Lock, devices="cpu:2", returns="all")


def test_a_default_device_of_the_script_does_not_affect_launch() -> None:
    torch.set_default_device("meta")
    torch.autograd.set_detect_anomaly(True)
    try:
        found = duoka.launch(torch.is_anomaly_enabled, devices="cpu:2", returns="all")
        summed = duoka.launch(lambda: duoka.current_world().any_rank(True), devices="cpu:2")
    finally:
        torch.set_default_device("cpu")
        torch.autograd.set_detect_anomaly(False)
    assert found == [True, True]
    assert summed is True
    assert duoka.launch(torch.is_anomaly_enabled, devices="cpu:2", returns="all") == [False, False]
