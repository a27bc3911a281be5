"""Checkpoints: prefix-free, atomic, safe to load, and complete enough to resume a run bit for bit."""

from duoka.checkpoint.key_names import unwrap
from duoka.checkpoint.load_state import load_state
from duoka.checkpoint.optimizer import load_optimizer_state, optimizer_state
from duoka.checkpoint.save_load import check_suffix, load, model_state, save
from duoka.checkpoint.train_state import load_training, save_training
from duoka.utils.files import atomic_write, check_writable
from duoka.utils.rng_state import rng_state, set_rng_state

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
