"""Emulation of several GPUs by CPU workers, for the script alone.

The script takes the branches that it takes on a machine with GPUs: ``torch.cuda.device_count()`` is the number of CPU
workers, and ``cuda:0`` means the CPU. Code of torch and duoka still gets the machine's real answers. What has no
counterpart on the CPU raises an error that names it. The values are in ``fake_cuda``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import multiprocessing.spawn
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from duoka.data_parallel.device_remap import RemapCuda, is_cuda
from duoka.errors import UnsupportedError
from duoka.script_runner import fake_cuda
from duoka.script_runner.patching import Patches
from duoka.utils.torch_private import data_parallel_modules

_LIBRARIES = ("torch", "duoka")
_PATCHES = ("duoka.script_runner.patching", "duoka.script_runner.trainer_gpu_count")
"""Modules whose functions call on behalf of their caller."""
_CPU = torch.device("cpu")
_Generator = torch.Generator
_WITHOUT_COUNTERPART = (
    "CUDAGraph", "Graph", "graph", "MemPool", "use_mem_pool", "CUDAPluggableAllocator", "GreenContext",
)  # fmt: skip
"""Classes and context managers of ``torch.cuda`` and ``torch.accelerator`` that CPU workers cannot emulate."""
_NO_GPU = ("cuda", "nvidia", "accelerator", "nvtx", "nccl", "dummy")
"""A word in the messages of what torch raises without a GPU, in lower case."""
_IN_CHILD = """import sys
sys.path.append({path!r})
from duoka.script_runner.cuda_emulation import emulate_until_exit
emulate_until_exit({num_devices})"""


@contextlib.contextmanager
def emulate_cuda(num_devices: int) -> Iterator[None]:
    """Present ``num_devices`` CPU workers to the script as GPUs inside the ``with`` block."""

    def run_thread(original: Callable[..., Any], thread: threading.Thread) -> None:
        with RemapCuda(_CPU, num_devices):  # function modes are local to a thread
            original(thread)

    def prepare_child(original: Callable[..., Any], name: str) -> dict[str, Any]:
        return {**original(name), "duoka": _EmulateWhenLoaded(num_devices)}

    with Patches() as patches:
        for patch, owner, table in emulated_api(num_devices):
            for name, value in table.items():
                if hasattr(owner, name):  # older versions of torch lack some names
                    patch(patches, owner, name, value)
        patches.wrap(threading.Thread, "run", run_thread)
        patches.wrap(multiprocessing.spawn, "get_preparation_data", prepare_child)
        patches.enter_context(RemapCuda(_CPU, num_devices))
        yield


class _EmulateWhenLoaded:
    """Emulates CUDA in the process of the script that unpickles this: one that multiprocessing spawns."""

    def __init__(self, num_devices: int) -> None:
        self._program = _IN_CHILD.format(path=str(Path(__file__).parents[2]), num_devices=num_devices)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self._program,)


def emulate_until_exit(num_devices: int) -> None:
    """Emulate CUDA for the rest of this process."""
    emulation = emulate_cuda(num_devices)
    emulation.__enter__()
    atexit.register(emulation.__exit__, None, None, None)


def emulated_api(num_devices: int) -> list[tuple[Callable[..., None], Any, dict[str, Any]]]:
    """Return the names of torch to replace: how to patch, the owner, and a value for each name."""
    devices = fake_cuda.FakeDevices(num_devices)
    classes = {"Stream": fake_cuda.FakeStream, "Event": fake_cuda.FakeEvent, "ExternalStream": fake_cuda.FakeStream}
    guards = dict.fromkeys(("device", "device_of"), devices.guard())
    return [
        *_functions(devices),
        (Patches.set, torch.cuda, _tensor_types(torch.cuda, torch)),
        (Patches.set, torch.cuda.sparse, _tensor_types(torch.cuda.sparse, torch.sparse)),
        (Patches.set, torch.cuda, {**classes, **guards, "StreamContext": contextlib.nullcontext}),
        (Patches.set, torch.cuda, {"default_generators": (torch.default_generator,) * num_devices}),
        (Patches.set, torch.cuda.streams, classes),
        (Patches.set, torch.accelerator, {"device_index": devices.guard()}),
        (Patches.set, torch, {"Generator": _FakeGenerator}),
        (Patches.set, torch.Tensor, {"record_stream": fake_cuda.constant(None)}),
        (Patches.set, torch.UntypedStorage, {"cuda": lambda storage, *_, **__: storage}),
        (Patches.set, torch.TypedStorage, {"cuda": lambda storage, *_, **__: storage}),
        (Patches.set, nn.Module, {"cuda": _move_module}),
        (Patches.wrap, torch, {"load": _load, "set_default_device": _set_default_device}),
        (Patches.wrap, torch.random, {"fork_rng": _fork_rng}),
        (Patches.wrap, torch.amp.autocast_mode.autocast, {"__init__": _init_autocast}),
        (Patches.wrap, torch.amp.grad_scaler.GradScaler, {"__init__": _init_grad_scaler}),
        *_data_parallel_steps(),
        (Patches.wrap, torch.distributed, {"init_process_group": _init_process_group}),
    ]


def _tensor_types(cuda: ModuleType, cpu: ModuleType) -> dict[str, Any]:
    return {name: getattr(cpu, name) for name in vars(cuda) if name.endswith("Tensor") and hasattr(cpu, name)}


def _functions(devices: fake_cuda.FakeDevices) -> Iterator[tuple[Callable[..., None], Any, dict[str, Any]]]:
    """Yield what replaces the functions of ``torch.cuda``, ``torch.accelerator`` and their submodules."""
    own: dict[str, dict[str, Any]] = {
        "torch.cuda.nvtx": fake_cuda.NVTX_ANSWERS,
        "torch.cuda.profiler": fake_cuda.PROFILER_ANSWERS,
        "torch.cuda.comm": fake_cuda.COMM_ANSWERS,
    }
    packages = {torch.cuda: fake_cuda.cuda_answers(devices), torch.accelerator: fake_cuda.accelerator_answers(devices)}
    for package, answers in packages.items():
        for module in (package, *_submodules(package)):
            table = own.get(module.__name__) or _shared_with(package, module, answers)
            yield _answer_script, module, table
            refused = [name for name in _WITHOUT_COUNTERPART if name in vars(module)]
            yield _refuse, module, dict.fromkeys(refused, module.__name__)
            others = [name for name in _public_functions(package, module) if name not in (*table, *refused)]
            yield _explain_failure, module, dict.fromkeys(others, module.__name__)


def _submodules(package: ModuleType) -> list[ModuleType]:
    """Return the public modules in a package, which torch has imported."""
    names = [f"{package.__name__}.{one.name}" for one in pkgutil.iter_modules(package.__path__) if one.name[0] != "_"]
    return [sys.modules[name] for name in names if name in sys.modules]


def _shared_with(package: ModuleType, module: ModuleType, answers: dict[str, Any]) -> dict[str, Any]:
    """Return the answers to functions of a module, without those that mean something else in its package."""
    own = {name: vars(module)[name] for name in answers if name in vars(module)}
    return {name: answers[name] for name, value in own.items() if value is getattr(package, name, value)}


def _public_functions(package: ModuleType, module: ModuleType) -> list[str]:
    def is_function(value: Any) -> bool:
        is_torchs = str(getattr(value, "__module__", "")).startswith(package.__name__)
        return callable(value) and not isinstance(value, type) and is_torchs

    return [name for name in dir(module) if name[0] != "_" and is_function(getattr(module, name))]


def _answer_script(patches: Patches, owner: Any, name: str, answer: Callable[..., Any]) -> None:
    """Replace ``owner.name`` for the script; calls from torch and duoka reach the original."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (original if _is_library(sys._getframe(1)) else answer)(*args, **kwargs)

    patches.set(owner, name, call)


def _explain_failure(patches: Patches, owner: Any, name: str, where: str) -> None:
    """Let ``owner.name``, if it fails for the script because there is no GPU, raise an error that says so."""

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
            if isinstance(error, UnsupportedError) or not any(word in str(error).lower() for word in _NO_GPU):
                raise
            raise _without_counterpart(f"{where}.{name}") from error

    patches.wrap(owner, name, call)


def _is_library(frame: Any) -> bool:
    while frame.f_globals.get("__name__") in _PATCHES:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES


def _without_counterpart(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} needs a GPU, and in this run CPU workers take the place of GPUs. Leave this part of the script out of "
        "the rehearsal, or run on GPUs: --device 0,1"
    )


def _refuse(patches: Patches, owner: Any, name: str, where: str) -> None:
    """Let a call of ``owner.name``, a class or a function, raise an error that says what it needs."""

    def fail(*_: Any, **__: Any) -> Any:
        raise _without_counterpart(f"{where}.{name}")

    original = getattr(owner, name)
    is_class = isinstance(original, type)
    patches.set(
        owner, name, type(name, (original,), {"__new__": fail}) if is_class else functools.wraps(original)(fail)
    )


def _init_process_group(original: Callable[..., Any], backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """Refuse NCCL with the reason, before torch fails without one."""
    if "nccl" in str(backend or "").lower() or is_cuda(kwargs.get("device_id")):
        raise UnsupportedError(
            "the script creates a process group of GPUs, one process for each, and in this run CPU workers take the "
            "place of GPUs. For one process, leave the group out (Lightning: Trainer(devices=1)), and duoka splits the "
            "batches. For one process per device, start the script with torchrun, without duoka run"
        )
    return original(backend, *args, **kwargs)


def _data_parallel_steps() -> list[tuple[Callable[..., None], Any, dict[str, Any]]]:
    """Return replacements of the steps of nn.DataParallel for scripts that call them: torch's need CUDA."""
    appliers = [importlib.import_module(f"torch.nn.parallel{end}") for end in ("", ".parallel_apply", ".data_parallel")]
    scatter_gather, functions, comm = data_parallel_modules()
    return [
        (Patches.set, scatter_gather, {"Scatter": SimpleNamespace(apply=fake_cuda.scatter)}),
        (Patches.set, scatter_gather, {"Gather": SimpleNamespace(apply=fake_cuda.gather)}),
        (Patches.set, functions, {"Broadcast": SimpleNamespace(apply=fake_cuda.broadcast)}),
        (Patches.set, comm, {"broadcast_coalesced": fake_cuda.copy_buffers}),
        *((Patches.set, owner, {"parallel_apply": _parallel_apply}) for owner in appliers),
    ]


class _FakeGeneratorMeta(type):
    """Creates and recognizes generators of torch's own class, which allows no subclass."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _Generator(_CPU if is_cuda(device) or isinstance(device, int) else device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)


class _FakeGenerator(metaclass=_FakeGeneratorMeta):
    """``torch.Generator``, where ``"cuda"`` means the CPU."""


def _move_module(module: nn.Module, device: Any = None) -> nn.Module:
    is_index = device is None or isinstance(device, int)
    return module.to(torch.device("cuda", device or 0) if is_index else torch.device(device))


def _set_default_device(original: Callable[..., Any], device: Any) -> None:
    original(_CPU if is_cuda(device) else device)


def _fork_rng(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``torch.random.fork_rng`` without ``devices``: all of them share the CPU's generator."""
    return original([], *args[1:], **{name: value for name, value in kwargs.items() if name != "devices"})


def _load(original: Callable[..., Any], f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
    if is_cuda(map_location):
        map_location = _CPU
    elif isinstance(map_location, dict):
        map_location = {key: "cpu" if is_cuda(value) else value for key, value in map_location.items()}
    return original(f, map_location, *args, **kwargs)


def _init_autocast(original: Callable[..., Any], self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    """Disable CUDA's mixed precision: CPU workers compute in full precision."""
    if device_type == "cuda":
        args, kwargs = (), {"dtype": args[0] if args else kwargs.get("dtype"), "enabled": False}
    original(self, device_type, *args, **kwargs)


def _init_grad_scaler(original: Callable[..., Any], self: Any, device: Any = "cuda", *args: Any, **kwargs: Any) -> None:
    if is_cuda(device):
        device, args, kwargs = "cuda", (), {"enabled": False}
    original(self, device, *args, **kwargs)


def _parallel_apply(
    modules: Sequence[nn.Module], inputs: Sequence[Any], kwargs_tup: Sequence[Any] | None = None, _: Any = None
) -> list[Any]:
    positional = [value if isinstance(value, list | tuple) else (value,) for value in inputs]
    keyword = [kwargs or {} for kwargs in kwargs_tup or [None] * len(positional)]
    return [module(*args, **kwargs) for module, args, kwargs in zip(modules, positional, keyword, strict=True)]
