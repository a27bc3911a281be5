"""Checkpoints: prefix-free, atomic, safe to load, and complete enough to resume a run bit for bit."""

from __future__ import annotations

from duoka.checkpoint.fitting import load_state
from duoka.checkpoint.model import check_suffix, load, model_state, save
from duoka.checkpoint.names import unwrap
from duoka.checkpoint.optimizer import load_optimizer_state, optimizer_state
from duoka.checkpoint.rng import rng_state, set_rng_state
from duoka.checkpoint.storage import atomic_write, check_writable
from duoka.checkpoint.training import load_training, save_training

__all__ = [
    "atomic_write",
    "check_suffix",
    "check_writable",
    "load",
    "load_optimizer_state",
    "load_state",
    "load_training",
    "model_state",
    "optimizer_state",
    "rng_state",
    "save",
    "save_training",
    "set_rng_state",
    "unwrap",
]
