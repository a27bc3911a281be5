"""Trainer: one training loop for any number of devices, with options, state and callbacks."""

from duoka.trainer.callbacks import Best, Callback, State
from duoka.trainer.config import TrainerConfig
from duoka.trainer.trainer import FitResult, Trainer

__all__ = ["Best", "Callback", "FitResult", "State", "Trainer", "TrainerConfig"]
