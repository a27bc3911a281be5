"""Optimizer, schedule and gradient scaler of a fit, joined to the object that takes its steps."""

import torch

from duoka.strategy import Strategy
from duoka.trainer.config import TrainerConfig
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.lr_schedule import build_schedule, scaled_learning_rate
from duoka.trainer.metrics import Metrics
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.trainer.optimizers import build_optimizer
from duoka.trainer.train_step import TrainStep


def build_train_step(
    config: TrainerConfig,
    module: ModelWithLoss,
    strategy: Strategy,
    train_metrics: Metrics,
    steps_per_epoch: int | None,
) -> TrainStep:
    """Return what takes the steps of a fit, as the options say; ``steps_per_epoch`` is ``None`` for data without length."""
    factor, device = scaled_learning_rate(config, strategy.replicas).factor, strategy.world.device
    optimizer = build_optimizer(config, module, factor)
    schedule = build_schedule(config, optimizer, steps_per_epoch, factor)
    may_split = config.micro_batch_size is not None or config.on_out_of_memory == "halve"
    is_plain = strategy.name == "single" and not config.compile
    module.single_batch_step = is_plain and config.gradient_accumulation_steps == 1 and not may_split
    scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
    parts = module, strategy, optimizer, schedule, LossMeter(device), train_metrics
    step = TrainStep(*parts, max_grad_norm=config.max_grad_norm, scaler=scaler)
    step.may_split = may_split
    step.micro_batch = config.micro_batch_size if isinstance(config.micro_batch_size, int) else None
    return step
