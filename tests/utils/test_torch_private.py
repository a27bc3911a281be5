"""Every private torch interface that duoka uses works in the installed torch."""

from __future__ import annotations

import datetime
import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from duoka.errors import UnsupportedError
from duoka.utils import torch_private


class KeepsGraph(torch.autograd.Function):
    """Notes inside a backward what torch_private reports, and when the callback runs."""

    @staticmethod
    def forward(ctx, x, notes):
        ctx.notes = notes
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append(("keeps graph", torch_private.backward_keeps_graph()))
        torch_private.run_after_backward(lambda: ctx.notes.append("callback"))
        return grad * 2, None


def test_a_backward_knows_retain_graph_and_runs_its_callback_at_the_end():
    notes: list = []
    x = torch.ones(1, requires_grad=True)
    y = KeepsGraph.apply(x, notes)
    y.backward(retain_graph=True)
    y.backward()
    assert notes == [("keeps graph", True), "callback", ("keeps graph", False), "callback"]


def test_the_use_count_of_a_storage_grows_with_each_view():
    tensor = torch.ones(3)
    storage = tensor.untyped_storage()
    before = torch_private.storage_use_count(storage)
    view = tensor[1:]
    assert torch_private.storage_use_count(storage) == before + 1
    assert torch_private.storage_id(view.untyped_storage()) == torch_private.storage_id(storage)
    del view
    assert torch_private.storage_use_count(storage) == before


def test_fused_kernels_work_in_place():
    one, two = torch.ones(2), torch.zeros(3)
    torch_private.copy_in_place([two], [torch.full((3,), 5.0)])
    torch_private.add_in_place([one, two], [torch.ones(2), torch.ones(3)])
    torch_private.multiply_in_place([one, two], torch.tensor(2.0))
    assert one.tolist() == [4.0, 4.0]
    assert two.tolist() == [12.0, 12.0, 12.0]


def test_a_replaced_call_is_called_and_can_be_restored():
    torch_private.check_replace_call()
    module = nn.Linear(2, 2)
    torch_private.replace_call(module, lambda x: "replaced")
    assert module(torch.ones(1, 2)) == "replaced"
    assert torch_private.replaced_call(module)(None) == "replaced"
    assert torch_private.call_module(module, (torch.ones(1, 2),), {}).shape == (1, 2)
    torch_private.restore_call(module)
    assert module(torch.ones(1, 2)).shape == (1, 2)


def test_a_torch_that_ignores_the_replaced_call_is_refused(monkeypatch):
    monkeypatch.setattr(torch_private, "replace_call", lambda module, call: None)
    with pytest.raises(UnsupportedError, match=torch.__version__.split("+")[0]):
        torch_private.check_replace_call()


def test_the_names_that_the_steps_of_data_parallel_use_exist():
    scatter_gather, functions, comm = torch_private.data_parallel_modules()
    assert all(
        hasattr(owner, "apply") for owner in (scatter_gather.Scatter, scatter_gather.Gather, functions.Broadcast)
    )
    assert callable(comm.broadcast_coalesced)
    module = nn.Linear(2, 2)
    replica = getattr(module, torch_private.REPLICATE_METHOD)()
    assert type(replica) is nn.Linear
    assert replica is not module


def test_functorch_transforms_are_noticed():
    seen = []

    def function(x):
        seen.append(torch_private.is_in_functorch())
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    function(torch.ones(2))
    assert seen == [True, False]


def test_a_parametrized_class_has_the_property():
    module = nn.Linear(2, 2)
    nn.utils.parametrizations.weight_norm(module)
    plain = nn.Linear(2, 2)
    del plain.weight
    torch_private.inject_parametrized_class(plain, ["weight"])
    assert type(plain).__name__ == type(module).__name__
    assert isinstance(type(plain).weight, property)


def test_batch_norm_layers_have_one_base_class():
    assert isinstance(nn.BatchNorm1d(1), torch_private.BatchNorm)
    assert isinstance(nn.SyncBatchNorm(1), torch_private.BatchNorm)


def test_private_gloo_groups_sum_without_a_default_group(tmp_path: Path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    group = torch_private.gloo_process_group(store, 0, 1, "lo", datetime.timedelta(seconds=20))
    tensor = torch.ones(2)
    group.allreduce([tensor]).wait()
    assert tensor.tolist() == [1.0, 1.0]
    assert not dist.is_initialized()


def test_an_abort_happens_in_a_separate_thread(monkeypatch):
    """Torch opens an NCCL group in the thread that aborts, which stays open there if the abort fails."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch_private.abort_default_process_group("gloo")
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threads = []

    def fail(*_: object) -> None:
        threads.append(threading.get_ident())
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", fail)
    try:
        torch_private.abort_default_process_group("gloo")
    finally:
        dist.destroy_process_group()
    assert threads[0] != threading.get_ident()
    assert "duoka-abort" not in {thread.name for thread in threading.enumerate()}


def test_the_default_group_has_a_store_a_timeout_and_a_broadcast(tmp_path: Path):
    assert torch_private.default_store() is None
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert torch_private.default_store() is not None
        torch_private.set_default_group_timeout(datetime.timedelta(seconds=5))
        tensor = torch.ones(3)
        torch_private.broadcast_coalesced([tensor], 1 << 20)
        assert tensor.tolist() == [1.0, 1.0, 1.0]
    finally:
        dist.destroy_process_group()


class UsesOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, tensor, count):
        for layer in self.layers[:count]:
            tensor = layer(tensor)
        return tensor.sum()


class SeenOperators(torch_private.DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.namespaces.add(function.namespace)
        return function(*args, **(kwargs or {}))


def test_a_group_shows_collectives_and_gradients_that_were_not_averaged(tmp_path: Path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with SeenOperators() as seen:
            dist.all_reduce(torch.ones(1))
        assert "c10d" in seen.namespaces
        wrapped = nn.parallel.DistributedDataParallel(UsesOne())
        wrapped(torch.ones(1, 2), 2).backward()
        torch_private.check_gradients_reduced(wrapped)
        wrapped(torch.ones(1, 2), 1).backward()
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            torch_private.check_gradients_reduced(wrapped)
        del wrapped
    finally:
        dist.destroy_process_group()
        gc.collect()  # DDP's reducer holds the group, and the traceback held the reducer


def test_the_names_that_need_nccl_exist():
    torch_private.forget_failed_process_groups()
    assert dist.distributed_c10d._world.group_count == 0
    assert callable(dist.distributed_c10d._abort_process_group)
    if dist.is_nccl_available():
        assert hasattr(dist.ProcessGroupNCCL, "eager_connect_single_device")
        assert hasattr(dist.ProcessGroupNCCL.Options(), "_timeout")


class Numbers(Dataset):
    """Three numbers, or the name of what a worker was given as its data set."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.utils.data.get_worker_info().dataset


def give_another_dataset(_):
    torch_private.set_worker_dataset("another")


def test_a_worker_sees_the_dataset_that_it_is_given():
    loader = DataLoader(Numbers(), num_workers=1, worker_init_fn=give_another_dataset, persistent_workers=True)
    assert list(loader) == [["another"]] * 3
    iterator = torch_private.take_dataloader_iterator(loader)
    assert isinstance(iterator, torch_private.DataLoaderIterator)
    assert torch_private.take_dataloader_iterator(loader) is None
    torch_private.stop_dataloader_workers(iterator)
    torch_private.stop_dataloader_workers(iter([]))


class Failing(Numbers):
    def __getitem__(self, index):
        raise ValueError("sample 0 is broken")


def test_worker_exceptions_arrive_in_the_wrapper():
    wrapper = torch_private.DataLoaderException
    try:
        raise ValueError("broken")
    except ValueError:
        wrapped = wrapper(where="in a test")
    with pytest.raises(ValueError, match="broken"):
        wrapped.reraise()


def test_list_of_loaded_sparse_tensors_is_emptied():
    torch._utils._sparse_tensors_to_validate.append(torch.ones(1).to_sparse())
    torch_private.forget_loaded_sparse_tensors()
    assert torch._utils._sparse_tensors_to_validate == []


def test_merged_states_of_a_torchmetrics_metric_are_those_of_all_updates():
    from torchmetrics import PearsonCorrCoef
    from torchmetrics.classification import BinaryAUROC

    for metric_class in (PearsonCorrCoef, BinaryAUROC):  # stacked states that merge_state refuses, and lists
        predictions, targets = torch.rand(12), (torch.arange(12) % 2)
        whole, *parts = (metric_class() for _ in range(4))
        targets = targets.float() if metric_class is PearsonCorrCoef else targets
        whole.update(predictions, targets)
        for metric, indices in zip(parts, ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], []), strict=True):
            if indices:
                metric.update(predictions[indices], targets[indices])
        torch_private.merge_metric_states(parts[0], [torch_private.metric_states(metric) for metric in parts])
        assert parts[0].update_count == 2
        assert torch.allclose(parts[0].compute(), whole.compute(), atol=1e-5)


def test_spare_gaussian_of_numpy_is_seen_and_kept():
    before = np.random.get_state()
    try:
        np.random.seed(0)
        expected = [*np.random.randn(3), np.random.rand()]
        np.random.seed(0)
        assert not torch_private.numpy_has_spare_gaussian()
        drawn = [np.random.randn()]
        assert torch_private.numpy_has_spare_gaussian()
        drawn.append(np.random.randn())
        assert not torch_private.numpy_has_spare_gaussian()
        assert [*drawn, np.random.randn(), np.random.rand()] == expected
    finally:
        np.random.set_state(before)


def test_active_modes_are_listed() -> None:
    assert torch_private.active_modes() == []
    with FlopCounterMode(display=False), torch.device("cpu"):
        assert len(torch_private.active_modes()) == 1
