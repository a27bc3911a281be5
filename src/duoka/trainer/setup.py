"""What happens to a rank before its first step: its own copies, its own random numbers, its place for the model."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from duoka.checkpoint import rng_state, set_rng_state
from duoka.data import DeviceResidentLoader, LocalBatch, ShardedLoader, same_stream, shard, to_device
from duoka.errors import ConfigError, DataError
from duoka.strategy import Strategy, choose
from duoka.trainer.callbacks import Callback
from duoka.trainer.config import TrainerConfig
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.trainer.train_step import batch_norm_at_rest
from duoka.world import World

__all__ = [
    "FitSpec",
    "RankZeroOnly",
    "modes_kept",
    "prepared_objective",
    "seed_rank",
    "sharded",
    "unshuffled",
    "unused_parameters",
]


class RankZeroOnly:
    """Holds what is for rank 0 alone: it travels to helper processes as nothing, so it need not be picklable."""

    def __init__(self, callbacks: tuple[Callback, ...] = ()) -> None:
        self.callbacks = callbacks

    def __reduce__(self) -> tuple[type[RankZeroOnly], tuple[()]]:
        return RankZeroOnly, ()


@dataclass
class FitSpec:
    """Everything that a rank needs to train, evaluate or predict. Rank 0 has the user's own objects, helpers copies."""

    model: nn.Module
    config: TrainerConfig
    train_data: Any = None
    eval_data: Any = None
    test_data: Any = None
    loss: Callable[..., Any] | str | None = None
    metrics: Any = None
    train_metrics: Any = None
    devices: tuple[torch.device, ...] = ()
    """All devices; those of one process with ``strategy="dp"``."""
    reason: str = ""
    """Why these."""
    save_model: bool = False
    model_path: str | None = None
    main: RankZeroOnly = field(default_factory=RankZeroOnly)

    def strategy(self, world: World) -> tuple[Strategy, str]:
        """Return this rank's strategy, and why it is this one."""
        if world.size > 1 and not self.config.use_multi_gpu:
            raise ConfigError(
                f"use_multi_gpu=False takes one device, and this job has {world.size} processes, one a device each; start "
                "one process, or leave use_multi_gpu out"
            )
        options = dict(self.config.ddp_options)
        return choose(self.config.strategy, world, devices=self.devices, ddp_options=options)


def seed_rank(seed: int, world: World) -> None:
    """Seed every generator of this process; ranks differ on purpose, so that their random masks do."""
    mixed = (seed + 1_000_003 * world.rank) % 2**63
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 - the global generator is what users' code draws from
    torch.manual_seed(mixed)


class CheckedLoader:
    """A rank's part of a user's data, which has at least one sample and is the same on every rank.

    Raises:
        DataError: there is none, when it is built or, for data that do not tell their length, when it has been read; or a
            stream is another one on this rank.

    """

    def __init__(self, loader: ShardedLoader, empty: DataError, name: str, world: World) -> None:
        self.loader = loader
        self.empty = empty
        self.name, self.world = name, world
        self.set_position, self.close = loader.set_position, loader.close
        with contextlib.suppress(TypeError, NotImplementedError):  # its length is not known
            if len(loader) == 0:
                raise empty
        if loader.samples_per_epoch == 0:
            raise empty

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LocalBatch]:
        begins = self.loader.position.samples == 0
        parts = iter(self.loader)
        part = next(parts, None)
        self._check_same()
        if part is None:
            if begins:
                raise self.empty
            return
        yield part
        yield from parts

    def _check_same(self) -> None:
        """Compare what the ranks have read first of a stream, of which each is to read all, and to keep its part."""
        read = self.world.all_gather_object(self.loader.fingerprint)
        if any(one is not None for one in read) and not all(
            one and read[0] and same_stream(one, read[0]) for one in read
        ):
            raise DataError(
                f"{self.name} yields other samples on another rank: it divides itself by rank (or draws from a generator that "
                "duoka does not know), so that samples would be lost, as duoka divides every global batch itself. Let it yield "
                "all samples in one order on every rank: leave torch.distributed.get_rank() and RANK out of it"
            )


def sharded(job: FitSpec, name: str, strategy: Strategy) -> CheckedLoader:
    """Return this rank's part of the ``train_data``, ``eval_data`` or ``test_data`` of ``job``."""
    world, data, training = strategy.world, getattr(job, name), name == "train_data"
    merge = strategy.replicas if job.config.batch_size_means == "per_device" else 1
    loader = shard(
        data, rank=world.rank, world_size=world.size, seed=job.config.seed, batches_per_step=merge, training=training
    )
    return CheckedLoader(loader, _empty(name, data, merge if training else 1), name, world)


def _empty(name: str, data: Any, merge: int) -> DataError:
    """Return the error for data without a sample; ``merge`` is how many batches a step needs."""
    dataset = getattr(data, "dataset", None)
    length = len(dataset) if isinstance(dataset, Sized) else 0
    size = getattr(data, "batch_size", None) or getattr(getattr(data, "batch_sampler", None), "batch_size", None)
    drops = getattr(data, "drop_last", False) or getattr(getattr(data, "batch_sampler", None), "drop_last", False)
    if not (length and drops):
        return DataError(f"{name} has no sample (a {type(data).__name__} of length 0); give data with at least one")
    devices = f" on each of {merge} devices" if merge > 1 else ""
    return DataError(
        f"{name} has no batch: its {length} samples are fewer than batch_size={size}{devices}, and drop_last=True leaves an "
        "incomplete batch out; give drop_last=False or a smaller batch_size"
    )


def unshuffled(data: Any) -> Any:
    """Return ``data``, or in place of a shuffled ``DataLoader`` the same one in the order of its data set."""
    if isinstance(data, DeviceResidentLoader):
        return data.in_order()
    batches = getattr(data, "batch_sampler", None)
    if (
        not isinstance(data, DataLoader)
        or type(batches) is not BatchSampler
        or type(batches.sampler) is not RandomSampler
    ):
        return data
    ordered = copy.copy(data)
    sampler = SequentialSampler(data.dataset)  # type: ignore[arg-type]
    in_order = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    vars(ordered).update(sampler=sampler, batch_sampler=in_order)  # a loader lets nobody set them; this one is new
    return ordered


@contextlib.contextmanager
def prepared_objective(job: FitSpec, world: World) -> Iterator[ModelWithLoss]:
    """Put model and loss together on this rank's device; batch norm is the model's own again afterwards."""
    config = job.config
    objective = ModelWithLoss(
        job.model,
        job.loss,
        target=config.target_key,
        predict=config.predict_fn,
        precision=config.precision,
        device_type=world.device.type,
    ).to(world.device)
    with contextlib.ExitStack() as stack:
        if config.sync_batchnorm:
            stack.enter_context(_synchronised_batch_norm(objective, world))
        yield objective


@contextlib.contextmanager
def _synchronised_batch_norm(objective: ModelWithLoss, world: World) -> Iterator[None]:
    """Replace batch norm by ``SyncBatchNorm`` on the same tensors, and put the user's own modules back in the end."""
    if world.device.type == "cpu":
        raise ConfigError(
            "sync_batchnorm=True needs accelerators, as torch has no SyncBatchNorm for the CPU; leave it out"
        )
    before = [(parent, name, child) for parent in objective.modules() for name, child in parent.named_children()]
    nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for parent, name, child in before:
            setattr(parent, name, child)


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Give every submodule the mode (training or evaluation) back that it had before the block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def unused_parameters(objective: ModelWithLoss, batch: Any, world: World) -> list[str] | None:
    """Return the trained parameters that take no part in the loss of ``batch`` on some rank.

    One forward and backward of a copy find out, so that what modules count or keep is as before; so are random generators.
    ``None`` where a module cannot be copied on some rank: then nothing is called.
    """
    try:
        trial = copy.deepcopy(objective)
    except Exception:  # locks, open files, tensors with a graph: whatever a user's module holds
        trial = None
    if world.any_rank(trial is None) or trial is None:
        return None
    generators = rng_state()
    with batch_norm_at_rest(trial.modules()):  # a part of one sample has no variance, and need not have one here
        loss = trial(to_device(batch, world.device))
    (loss[0] if isinstance(loss, tuple) else loss).backward()
    trained = ((name, parameter) for name, parameter in trial.named_parameters() if parameter.requires_grad)
    unused = [name for name, parameter in trained if parameter.grad is None]
    set_rng_state(generators)
    return sorted({name for names in world.all_gather_object(unused) for name in names})
