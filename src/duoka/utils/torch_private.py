"""Private torch interfaces that duoka uses, one name each; no other file uses torch's private names.

Each was seen in torch 2.9 to 2.14. ``tests/utils/test_torch_private.py`` exercises every function, so that a torch release
that changes one fails a test that names it. Where torch offers no public equivalent, the docstring says why one is needed.
"""

import contextlib
import datetime
import importlib
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._utils import ExceptionWrapper
from torch.autograd import Variable
from torch.distributed import distributed_c10d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from duoka.errors import UnsupportedError
from duoka.utils.pytree import map_leaves

BatchNorm: type[nn.Module] = _BatchNorm
"""Common base class of all batch norm layers."""
DispatchMode: Any = TorchDispatchMode
"""Base class of modes that see every operator, those of ``torch.distributed`` too."""
DataLoaderIterator: type[Any] = _BaseDataLoaderIter
"""Base class of all iterators of a DataLoader, whose ``__next__`` loads a batch."""
DataLoaderException: type[Any] = ExceptionWrapper
"""Class in which a DataLoader worker sends an exception."""


# autograd


def backward_keeps_graph() -> bool:
    """Return whether the running backward has ``retain_graph=True``; call it inside a backward. False if unknown."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(ask()) if ask is not None else False


def run_after_backward(callback: Callable[[], Any]) -> None:
    """Call ``callback`` when the running backward has ended; call it inside a backward. DDP and FSDP use the same."""
    Variable._execution_engine.queue_callback(callback)


# tensors and storages


def storage_use_count(storage: torch.UntypedStorage) -> int:
    """Return the number of references to a storage, from C++ and from Python objects.

    A parameter may move into shared memory only if no other tensor views its storage.
    """
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return an integer that is the same for all Python objects of one storage."""
    return int(storage._cdata)


copy_in_place = torch._foreach_copy_
"""Copies each tensor of a second list into the one of the first list, with one fused kernel."""
add_in_place = torch._foreach_add_
"""Adds each tensor of a second list to the one of the first list, with one fused kernel."""
multiply_in_place = torch._foreach_mul_
"""Multiplies each tensor of a list by a scalar tensor, with one fused kernel."""


def forget_loaded_sparse_tensors() -> None:
    """Empty the list in which torch's unpickler keeps sparse tensors until ``torch.load`` validates them."""
    getattr(torch._utils, "_sparse_tensors_to_validate", []).clear()


# modules


def call_module(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run hooks and forward of ``module``, even if ``replace_call`` has replaced its call."""
    own: Any = module._call_impl
    return own(*args, **kwargs)


def replace_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Make ``module(...)`` call ``call``: the slot in which ``Module.compile`` stores its compiled call.

    The object, its class, its pickle and its copies stay as they are, which no public hook offers.
    """
    module._compiled_call_impl = call


def replaced_call(module: nn.Module) -> Any:
    """Return what ``replace_call`` or ``Module.compile`` has set on ``module``, or ``None``."""
    return module._compiled_call_impl


def restore_call(module: nn.Module) -> None:
    """Undo ``replace_call``."""
    module.__dict__.pop("_compiled_call_impl", None)


def check_replace_call() -> None:
    """Raise ``UnsupportedError`` if this torch does not call what ``replace_call`` sets."""
    probe = nn.Identity()
    try:
        replace_call(probe, lambda value: value + 1)
        works = probe(1) == 2 and call_module(probe, (1,), {}) == 1
        restore_call(probe)
        works = works and probe(1) == 1
    except (AttributeError, TypeError):
        works = False
    if not works:
        raise UnsupportedError(
            f"torch {torch.__version__} calls modules in another way than torch 2.9 to 2.14, so `duoka run` cannot "
            "parallelize a script's models; use duoka.DataParallel, or one of these torch versions"
        )


REPLICATE_METHOD = "_replicate_for_data_parallel"
"""Method with which ``nn.parallel.replicate`` copies a module; the copy keeps what ``replace_call`` has set."""


def data_parallel_modules() -> tuple[Any, ...]:
    """Return the modules in which ``nn.parallel`` finds what its steps call.

    These are ``Scatter`` and ``Gather``; ``Broadcast``; and ``broadcast_coalesced``. All need CUDA devices.
    """
    names = ("scatter_gather", "_functions", "comm")
    return tuple(importlib.import_module(f"torch.nn.parallel.{name}") for name in names)


def is_in_functorch() -> bool:
    """Return whether code runs inside ``torch.func.vmap``, ``grad`` or another functorch transform."""
    level = getattr(torch._C._functorch, "maybe_current_level", None)
    return level is not None and level() is not None


def is_transformed(module: nn.Module) -> bool:
    """Return whether a call is traced or transformed, or uses other tensors as parameters: it belongs to one device."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or is_in_functorch()
        or any(
            parameter is not None and not isinstance(parameter, nn.Parameter)
            for part in module.modules()
            for parameter in part._parameters.values()
        )
    )


def active_modes() -> list[Any]:
    """Return the active function and dispatch modes, which torch lists in private functions; not that of ``torch.device``."""
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
    return [mode for mode in modes if not isinstance(mode, DeviceContext)]


def inject_parametrized_class(module: nn.Module, names: Sequence[str]) -> None:
    """Give ``module`` the class with properties that ``torch.nn.utils.parametrize`` makes; that class refuses pickling."""
    from torch.nn.utils import parametrize

    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)


# torch.distributed


def gloo_process_group(store: Any, rank: int, size: int, interface: str, timeout: datetime.timedelta) -> Any:
    """Return a gloo group that ``torch.distributed`` does not know, on one network interface."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(interface=interface)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def nccl_process_group(store: Any, rank: int, size: int, device: torch.device, timeout: datetime.timedelta) -> Any:
    """Return an NCCL group that ``torch.distributed`` does not know, with one communicator, connected now."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def default_store() -> Any:
    """Return the store of the default process group; ``None`` if the group has none (MPI) or is not initialized."""
    try:
        return distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None


def set_default_group_timeout(timeout: datetime.timedelta) -> None:
    """Set the timeout of the default process group; ``dist.set_timeout`` is public from torch 2.14 on."""
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(timeout)


def forget_failed_process_groups() -> None:
    """Let this process name its next default process group as a fresh one: ``init_process_group`` counts failures, too."""
    if not dist.is_initialized():
        distributed_c10d._world.group_count = 0


def abort_default_process_group(backend: str) -> None:
    """Abort the default process group if it uses ``backend``, which frees ranks that wait in a collective.

    A separate thread does that. Up to torch 2.11 at least, torch opens an NCCL group in the calling thread, and leaves it
    open if the abort fails; NCCL then only queues the later collectives of that thread, and the other ranks wait for them.
    Ctrl-C is raised when the abort has ended.
    """

    def abort() -> None:
        with _abort_lock, contextlib.suppress(Exception):  # the collective may just have ended
            if dist.is_initialized() and backend in dist.get_backend_config():
                distributed_c10d._abort_process_group()

    thread = threading.Thread(target=abort, name="duoka-abort", daemon=True)
    thread.start()
    interrupt: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


_abort_lock = threading.Lock()


def broadcast_coalesced(tensors: Sequence[torch.Tensor], bytes_per_message: int) -> None:
    """Broadcast rank 0's tensors over the default group in few messages, as DDP does at its start."""
    group: Any = dist.group.WORLD
    dist._broadcast_coalesced(group, list(tensors), bytes_per_message, 0)  # type: ignore[attr-defined]


def check_gradients_reduced(wrapped: nn.Module) -> None:
    """Raise ``RuntimeError`` if a backward of ``DistributedDataParallel`` left a gradient that was not averaged.

    Without this check, DDP finds it in the next forward, and not at all after the last step.
    """
    wrapped._check_reducer_finalized()  # type: ignore[operator]


# torch.utils.data


def stop_dataloader_workers(iterator: Any) -> None:
    """End the worker processes of a DataLoader's iterator now; other iterators have none."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if callable(shutdown):
        shutdown()


def take_dataloader_iterator(loader: Any) -> Any:
    """Return the iterator that a DataLoader with persistent workers keeps, or ``None``, and let the loader forget it."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        loader._iterator = None
    return iterator


def set_worker_dataset(dataset: Any) -> None:
    """Set ``get_worker_info().dataset`` in a DataLoader worker; plain assignment is refused."""
    object.__setattr__(get_worker_info(), "dataset", dataset)


# torchmetrics, seen in 1.6 to 1.9


def metric_states(metric: Any) -> tuple[int, dict[str, Any]]:
    """Return a metric's number of updates, and its states on the CPU; a list may hold tuples, numbers and strings."""
    return metric.update_count, _to(torch.device("cpu"), dict(metric.metric_state))


def _to(device: torch.device, state: Any) -> Any:
    return map_leaves(lambda leaf: leaf.detach().to(device) if isinstance(leaf, torch.Tensor) else leaf, state)


def unregistered_attributes(metric: Any) -> dict[str, Any]:
    """Return a metric's attributes that are neither states nor torchmetrics' own."""
    from torchmetrics import SumMetric

    own = vars(SumMetric()).keys() - {"sum_value"}
    found = vars(metric).items()
    return {name: v for name, v in found if name not in own and name not in metric._defaults and not callable(v)}


def merge_metric_states(metric: Any, ranks: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Set a metric's states to those of all ranks, with the metric's own reductions; ranks without updates are left out.

    ``Metric.merge_state`` refuses metrics with ``full_state_update``, such as ``PearsonCorrCoef`` and most custom ones.
    """
    metric._update_count = sum(count for count, _ in ranks)
    metric._computed = None
    for name, reduction in metric._reductions.items():
        states = [_to(metric.device, rank[name]) for count, rank in ranks if count]
        if not states:
            continue
        if isinstance(states[0], list):
            merged: Any = [item for state in states for item in state]
        else:
            merged = torch.stack(states)
            merged = reduction(merged) if callable(reduction) else merged
        setattr(metric, name, merged)


# numpy


def numpy_has_spare_gaussian() -> bool:
    """Return whether the next legacy Gaussian of ``numpy.random`` is a spare one; true if unknown.

    ``numpy.random.get_state`` takes 100 times as long, because it also copies the bit generator's state. Seen in NumPy
    1.26 and 2.4.
    """
    generator: Any = getattr(np.random.mtrand, "_rand", None)
    if not isinstance(bits := getattr(generator, "_bit_generator", None), np.random.BitGenerator):
        return True
    generator._bit_generator = SimpleNamespace(state={"bit_generator": ""})  # ``get_state`` writes into it
    try:
        return bool(generator.get_state(legacy=False)["has_gauss"])
    finally:
        generator._bit_generator = bits
