"""The collective transport: what is broadcast and when, edits it must not miss, failures, and the user's own groups."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import optimizer as optimizer_hooks

from duoka import errors
from duoka.data_parallel.messages import ReceiveWeights, decode
from duoka.data_parallel.transport.buckets import BucketChecksum, gradient_buckets, value_buckets
from duoka.data_parallel.transport.process_group import PrivateProcessGroup
from duoka.data_parallel.worker_group import COLLECTIVE_ON_CPU
from support.comparison import assert_same_gradients
from support.waiting import wait_until


@pytest.fixture(params=["collective"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(COLLECTIVE_ON_CPU, "1")
    return request.param


def new_broadcasts(model) -> list[tuple[int, ...]]:
    """Return the buckets of each broadcast since the last call of this function; the first call starts recording."""
    group = model._duoka_controller.group
    if not hasattr(group, "recorded"):
        group.recorded, send = [], group._send

        def record_and_send(index, kind, payload):
            if index == 0 and isinstance(message := decode(payload), ReceiveWeights):
                group.recorded.append(message.buckets)
            send(index, kind, payload)

        group._send = record_and_send
    recorded, group.recorded = group.recorded, []
    return recorded


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


X = torch.arange(24.0).view(6, 4) / 24


def clamp(p):
    p.data.clamp_(-0.05, 0.05)


def negate(p):
    p.data.neg_()


def reverse(p):
    p.data.copy_(p.data.flip(0))


def one_bit(p):
    p.data.view(-1)[0] = torch.nextafter(p.data.view(-1)[0], torch.tensor(9.0))


def other_memory(p):
    p.data = p.data * 0.5


@pytest.mark.parametrize("edit", [clamp, negate, reverse, one_bit, other_memory])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_edit_through_data_after_the_step_is_seen(edit, frozen: bool, wrap) -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)), check="off")
    model.module[1].requires_grad_(not frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).pow(2).mean().backward()
        optimizer.step()
        for _ in range(2):  # the second edit follows a forward without a graph, after which checksums decide
            edit(model.module[1].weight)
            assert torch.equal(weight_in_worker(model), model.module[1].weight)


def weight_in_worker(model) -> torch.Tensor:
    """Return the middle layer's weight as the last device has it; a hook returns it as the output."""
    with torch.no_grad():
        handle = model.module.register_forward_hook(lambda m, _, o: m[1].weight.detach().clone().expand(len(o), -1, -1))
        weight = model(X)[-1]
        handle.remove()
    return weight


def test_unchanged_buckets_are_not_broadcast_again(wrap) -> None:
    model = wrap(net()).eval()
    with torch.no_grad():
        model(X)
        new_broadcasts(model)
        for _ in range(3):
            model(X)
        assert new_broadcasts(model) == []
        model.module[1].running_mean.add_(1)
        torch.testing.assert_close(model(X), model.module(X))
        assert len(new_broadcasts(model)[0]) == 1


def test_frozen_buckets_are_not_broadcast_while_others_train(wrap) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    module[0].requires_grad_(False)
    model = wrap(module)
    optimizer = torch.optim.SGD(module[1].parameters(), lr=0.1)
    model(X).sum().backward()
    new_broadcasts(model)
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
    assert set(new_broadcasts(model)) == {(0,)}
    module[0].weight.data.mul_(2)
    torch.testing.assert_close(model(X), module(X))
    assert any(1 in buckets for buckets in new_broadcasts(model))


def test_a_model_adds_no_optimizer_hook_and_no_group(wrap) -> None:
    hooks = dict(optimizer_hooks._global_optimizer_post_hooks)
    groups = dict(dist.distributed_c10d._world.pg_map)
    model = wrap(net())
    model(X).sum().backward()
    assert not dist.is_initialized()
    assert dict(optimizer_hooks._global_optimizer_post_hooks) == hooks
    model.close()
    assert dict(optimizer_hooks._global_optimizer_post_hooks) == hooks
    assert dist.distributed_c10d._world.pg_map == groups


@pytest.mark.slow
def test_a_script_may_end_while_a_model_is_collected(tmp_path: Path, transport: str) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import gc, torch, duoka
        model = duoka.DataParallel(torch.nn.Linear(2, 1), devices="cpu:2")
        model(torch.ones(4, 2)).sum().backward()
        del model
        gc.collect()
        """)
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_forked_child_may_collect_a_model_of_its_parent(tmp_path: Path, transport: str) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import gc, multiprocessing, os, sys, warnings
        import torch, duoka
        warnings.simplefilter("ignore")  # Python 3.12 and later warn of forks beside threads
        model = duoka.DataParallel(torch.nn.Linear(2, 1), devices="cpu:2")
        model(torch.ones(4, 2)).sum().backward()
        box = [model]

        def collect():
            box.clear()
            globals().pop("model")
            gc.collect()

        child = multiprocessing.get_context("fork").Process(target=collect)
        child.start()
        child.join(20)
        print(child.exitcode)
        child.kill()
        if (pid := os.fork()) == 0:
            sys.exit(0)  # runs exit handlers
        print(os.waitpid(pid, 0)[1], model(torch.ones(4, 2)).shape)
        """)
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n0 torch.Size([4, 1])\n"), done.stderr


def test_the_users_own_process_group_works_beside_it(wrap) -> None:
    model = wrap(nn.Linear(4, 3))
    model(X).sum().backward()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model(X).sum().backward()
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        model.close()
        dist.all_reduce(tensor)
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()
    assert model(X).shape == (6, 3)


class Doomed(nn.Module):
    """Its last device fails half-way through a backward, when only some gradients have been sent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.owner, self.what = os.getpid(), ""

    def forward(self, x):
        hidden = self.first(x)
        if os.getpid() != self.owner and x[0, 0] >= 0.5 and self.what:
            hidden.register_hook(self.fail)
        return self.last(hidden)

    def fail(self, _):
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("half-way")


@pytest.mark.parametrize(("what", "error"), [("die", errors.WorkerDied), ("raise", KeyError)])
@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
def test_a_backward_that_fails_half_way_blocks_no_device(what: str, error, devices: str, pair) -> None:
    model, reference = pair(Doomed(), devices)
    model(X)
    model.what = what
    with pytest.raises(error):
        model(X).sum().backward()
    model.what = ""
    for m in (model, reference):
        m.zero_grad()
        m(X).sum().backward()
    assert_same_gradients(model.module, reference)


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
def test_a_failure_on_the_first_device_keeps_transfers_in_order(devices: str, pair) -> None:
    class Picky(nn.Linear):
        def forward(self, x):
            if x[0, 0] < 0:
                raise ValueError("negative")
            return super().forward(x)

    model, reference = pair(Picky(4, 3), devices, check="off")
    for _ in range(3):
        with pytest.raises(ValueError, match="negative"):
            model(X - 0.01)
        for m in (model, reference):
            m.zero_grad()
            m(X).pow(2).sum().backward()
        assert_same_gradients(model, reference)


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
def test_a_failing_hook_of_the_user_keeps_transfers_in_order(devices: str, pair) -> None:
    class Watched(nn.Linear):
        fails = False

        def forward(self, x):
            out = super().forward(x)
            if self.fails and os.getpid() == self.owner:
                out.register_hook(lambda _: 1 / 0)
            elif self.fails:  # the worker's gradients arrive after rank 0 has failed
                out.register_hook(lambda _: time.sleep(0.2))
            return out

    model, reference = pair(Watched(4, 3), devices)
    model.module.owner = reference.owner = os.getpid()
    model(X)
    for fails in (True, False, True, False):
        for m in (model, reference):
            m.zero_grad()
            getattr(m, "module", m).fails = fails and m is model
        if fails:
            with pytest.raises(ZeroDivisionError):
                model(X).sum().backward()
        else:
            for m in (model, reference):
                m(X).pow(2).sum().backward()
            assert_same_gradients(model, reference)


def worker_pid(model) -> int:
    return model._duoka_controller.group._session.workers[0].pid


def test_a_death_during_a_step_is_raised_by_the_next_forward(wrap) -> None:
    model = wrap(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    os.kill(worker_pid(model), signal.SIGKILL)
    wait_until(lambda: not model._duoka_controller.group._session.workers[0].is_alive())
    before = model.module.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.module.weight, before)
    with pytest.raises(errors.WorkerDied):
        model(X)
    torch.testing.assert_close(model(X), model.module(X))


@pytest.mark.parametrize("devices", ["cpu:2", "cpu:3"])
def test_a_death_between_a_result_and_its_tensors_is_reported(devices: str, wrap, monkeypatch) -> None:
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).repeat(1, 1_000_000)

    model = wrap(Wide(4, 3), devices)
    receive = PrivateProcessGroup.receive

    def kill_and_receive(self, tensor, source):
        os.kill(worker_pid(model), signal.SIGKILL)
        return receive(self, tensor, source)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateProcessGroup, "receive", kill_and_receive)
        with pytest.raises(errors.WorkerDied, match="SIGKILL"):
            model(X)
    assert model(X).shape == (6, 3_000_000)


def test_buckets_are_split_and_complex_and_bfloat16_gradients_added(pair) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
            self.b = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
            self.c = nn.Parameter(torch.randn(600_000))
            self.empty = nn.Parameter(torch.empty(0))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.a).abs() * self.b + self.c.mean() + self.empty.sum()

    model, reference = pair(Mixed(), "cpu:3")
    dtypes = [bucket.dtype for bucket in gradient_buckets(list(model.parameters()))]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    for m in (model, reference):
        m(X).pow(2).sum().backward()
    assert_same_gradients(model, reference, 2e-2)


def test_buckets_hold_each_tensor_once_and_stay_small() -> None:
    tensors = [torch.empty(size) for size in (10, 8_000_000, 3, 0, 5_000_000, 4_000_000, 7)]
    buckets = value_buckets(tensors, [range(4), range(4, 7)])
    assert sorted(n for bucket in buckets for n in bucket.specs) == list(range(7))
    assert all(bucket.nbytes <= 25 << 20 or len(bucket.specs) == 1 for bucket in buckets)


def test_the_checksum_changes_when_all_signs_do() -> None:
    checksum = BucketChecksum(torch.device("cpu"))
    for seed in range(100):
        values = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        before = int(checksum(values.view(torch.uint8)))
        assert int(checksum(values.neg_().view(torch.uint8))) != before


def test_checksums_of_different_contents_differ() -> None:
    checksum = BucketChecksum(torch.device("cpu"))
    base = torch.randint(256, (1 << 23,), dtype=torch.uint8)
    values = base.view(torch.float32)
    seen = {int(checksum(base))}
    for change in (
        lambda: values[0].mul_(-1),
        lambda: values.copy_(values.flip(0)),
        lambda: values[[3, 1 << 20]].sum() and values[3].copy_(values[1 << 20]),
        lambda: base[-1].add_(1),
        lambda: base.view(torch.int32).neg_(),
    ):
        change()
        seen.add(int(checksum(base)))
    assert len(seen) == 6
    assert int(checksum(base.clone())) == int(checksum(base))


def test_three_threads_may_use_one_model(pair) -> None:
    model, reference = pair(nn.Linear(4, 3), "cpu:3")
    failures = []

    def work() -> None:
        try:
            for _ in range(10):
                model(X.clone().requires_grad_()).sum().backward()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for _ in range(30):
        reference(X).sum().backward()
    assert_same_gradients(model, reference, 1e-3)


def test_a_model_and_its_copy_keep_separate_values(wrap) -> None:
    first = wrap(net())
    first(X)
    second = wrap(copy.deepcopy(first.module))
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(0.5)
    for model in (first, second, first):
        model.eval()
        torch.testing.assert_close(model(X), model.module(X))
