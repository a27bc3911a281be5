"""Out of memory: a message with numbers and remedies, smaller micro-batches, and a trial that finds the largest."""

import contextlib
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from duoka.checkpoint.optimizer import optimizer_bytes
from duoka.data import LocalBatch
from duoka.devices import inventory
from duoka.errors import DuokaError
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.train_step import TrainStep, split_local_batch
from duoka.utils.rng_state import rng_state, set_rng_state
from duoka.utils.text import format_bytes

REMEDIES = (
    "What helps, in this order: a smaller batch_size of the loader; micro_batch_size='fit', which computes a batch in parts "
    "with the same result (or gradient_accumulation_steps with smaller batches); precision='bf16'; activation checkpointing "
    "in the model (torch.utils.checkpoint); more devices"
)


class DeviceMemoryError(DuokaError, torch.OutOfMemoryError):
    """The memory of a device does not suffice; the message has the numbers, and what helps."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation on an accelerator or on the CPU has failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


class MicroBatches:
    """Computes steps in parts of a batch, and chooses their size, the same on all ranks.

    A part that does not fit leaves no trace: neither gradients, losses, metrics and buffers, nor random numbers. So ranks
    communicate only after every rank has computed its part of the step.
    """

    def __init__(self, train_step: TrainStep, say: Callable[[str], None]) -> None:
        self.step_parts, self.say = train_step, say
        self.world = train_step.strategy.world

    def step(self, window: list[LocalBatch]) -> int:
        """Take a step; on all ranks halve the parts and repeat it as long as the memory of one does not suffice."""
        steps = self.step_parts
        steps.strategy.broadcast(steps.module.buffers())
        while not self._attempt(partial(steps.accumulate, window)):
            now = self._largest(window) if steps.micro_batch is None else steps.micro_batch
            if now <= 1:
                raise torch.OutOfMemoryError("a single sample does not fit")
            steps.micro_batch = -(-now // 2)
            self.say(f"out of memory: from here on at most {steps.micro_batch} samples of a device at once")
        trained = list(steps.trained.values())
        is_used = torch.tensor([one.grad is not None for one in trained], dtype=torch.int32, device="cpu")
        used = self.world.all_reduce(is_used, "max").tolist()
        steps.strategy.all_reduce_gradients(one for one, flag in zip(trained, used, strict=True) if flag)
        steps.update()
        return sum(local.global_count for local in window)

    def fit(self, window: list[LocalBatch]) -> None:
        """Find the largest part of the batch that fits, to an eighth, and use it from here on."""
        whole = self._largest(window)
        fits, fails = 0, whole + 1
        trial = whole
        while fails - fits > max(1, fits // 8):
            if self._attempt(partial(self._try, window[0], trial), is_trial=True):
                fits = trial
            else:
                fails = trial
            trial = (fits + fails) // 2
        if not fits:
            raise torch.OutOfMemoryError("a single sample does not fit")
        self.step_parts.micro_batch = None if fits == whole else fits
        self.say(f"micro-batch: {fits} of {whole} samples of a device at once")

    def _try(self, local: LocalBatch, size: int) -> None:
        """Compute two parts, so that gradients exist in the second, beside memory for the optimizer's state."""
        optimizer, steps = self.step_parts.optimizer, self.step_parts
        reserve = 0 if optimizer.state else optimizer_bytes(optimizer)
        if self.world.size > 1:  # the buckets of DDP
            reserve += sum(one.numel() * one.element_size() for one in steps.trained.values())
        held = torch.empty(reserve, dtype=torch.uint8, device=self.world.device)
        part = next(iter(split_local_batch(local, size)))
        steps.accumulate([part, part])
        del held

    def _attempt(self, compute: Callable[[], Any], *, is_trial: bool = False) -> bool:
        """Call ``compute``; return whether it has succeeded on all ranks. A failure, or a trial, is undone."""
        steps = self.step_parts
        state, buffers = rng_state(), [(one, one.detach().clone()) for one in steps.module.buffers()]
        meter, metrics = steps.loss_meter, steps.train_metrics
        steps.loss_meter, steps.train_metrics = LossMeter(self.world.device), _Calls()  # type: ignore[assignment]
        steps.loss_meter.step = meter.step
        is_done = True
        try:
            compute()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            is_done = False
        finally:
            losses, calls = steps.loss_meter, steps.train_metrics
            steps.loss_meter, steps.train_metrics = meter, metrics
        is_done = not self.world.any_rank(not is_done)
        if is_done and not is_trial:
            meter.merge(losses)
            calls.repeat(metrics.update)  # type: ignore[attr-defined]
            return True
        steps.drop_gradients()
        set_rng_state(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        _free_memory()
        return is_done

    def _largest(self, window: Sequence[LocalBatch]) -> int:
        """Return the largest number of samples that a rank computes at once."""
        mine = max(1, *(local.count for local in window))
        return int(self.world.all_reduce(torch.tensor(mine, device="cpu"), "max"))


class _Calls:
    """Keeps the arguments of ``update`` until the step has succeeded."""

    empty = False

    def __init__(self) -> None:
        self.arguments: list[tuple[Any, ...]] = []

    def update(self, *arguments: Any) -> None:
        """Keep the arguments."""
        self.arguments.append(arguments)

    def repeat(self, update: Callable[..., None]) -> None:
        """Call the real ``update``."""
        for arguments in self.arguments:
            update(*arguments)


def _free_memory() -> None:
    gc.collect()  # frames of the failed computation hold tensors
    if torch.accelerator.is_available():
        with contextlib.suppress(RuntimeError):
            torch.accelerator.memory.empty_cache()


def explain(
    error: BaseException, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, batch: object
) -> DeviceMemoryError:
    """Return the error with the numbers that are known, and what helps."""
    parameters = [*module.parameters(), *module.buffers()]
    sizes = {
        "parameters": sum(one.numel() * one.element_size() for one in parameters),
        "gradients": sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad),
        "optimizer": optimizer_bytes(optimizer),
    }
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    facts = [f"{batch or 'an unknown number of'} samples of a device at once", f"the model takes {parts}"]
    if device.type == "cuda":
        rest = torch.cuda.max_memory_allocated(device) - sum(sizes.values())
        facts.append(f"activations and temporary values about {format_bytes(max(0, rest))}")
    facts.append(_usage(device))
    return DeviceMemoryError(f"{device} is out of memory: {'; '.join(facts)}. {REMEDIES}. ({_first_sentence(error)})")


def _usage(device: torch.device) -> str:
    """Return how much of the device's memory is free, and which other programs use it, as far as that is known."""
    if device.type == "cpu":
        import psutil

        memory = psutil.virtual_memory()
        return f"{format_bytes(memory.available)} of {format_bytes(memory.total)} are available"
    if device.type != "cuda":
        return "its free memory is not known"
    free, total = torch.cuda.mem_get_info(device)
    text = f"{format_bytes(free)} of {format_bytes(total)} are free"
    known = inventory.device_usage(inventory.detect()) or []
    users = [user for info in known if info.index == device.index for user in info.users]
    names = [f"process {user.pid} ({user.user or '?'}) with {format_bytes(user.memory_bytes or 0)}" for user in users]
    return f"{text}; also used by {', '.join(names)}" if names else text


def _first_sentence(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
