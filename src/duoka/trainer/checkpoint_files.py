"""Checkpoint files of a run: the last one and those before it, newest first, and the disk space that they need."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from duoka.errors import CheckpointError, StorageError
from duoka.log import logger
from duoka.trainer.config import TrainerConfig
from duoka.utils.text import format_bytes

_NEXT = "next.pt"
"""A complete file that is about to become ``last.pt``."""


def checkpoint_path(out_dir: str | Path) -> Path:
    """Return the path of a run's last training checkpoint."""
    return Path(out_dir) / "checkpoint" / "last.pt"


def path_before(last: Path, number: int) -> Path:
    """Return the path of the checkpoint that is ``number`` older than ``last``: ``last-1.pt``, ..."""
    return last if number == 0 else last.with_name(f"{last.stem}-{number}{last.suffix}")


def existing_checkpoints(last: Path) -> list[Path]:
    """Return the complete checkpoints beside ``last``, newest first."""
    older = {int(number): path for path in last.parent.glob("last-*.pt") if (number := path.stem[5:]).isdecimal()}
    paths = [last.with_name(_NEXT), last, *(older[number] for number in sorted(older))]
    return [path for path in paths if path.exists()]


def find_checkpoints(config: TrainerConfig) -> list[Path]:
    """Return the checkpoints that ``config.resume`` names, newest first; none to begin a new run.

    Raises:
        CheckpointError: there is none, and ``resume`` is not ``"auto"``.

    """
    if config.resume is False:
        return []
    is_own = config.resume is True or config.resume == "auto"
    path = Path(config.out_dir if is_own else config.resume)  # type: ignore[arg-type]  # TrainerConfig has checked it
    if is_own or path.is_dir():
        path = checkpoint_path(path)
        found = existing_checkpoints(path)
    else:
        found = [path] if path.exists() else []
    if found or config.resume == "auto":
        return found
    raise CheckpointError(
        f"resume={config.resume!r}: there is no checkpoint {path}; resume='auto' begins a new run if there is none"
    )


def next_path(last: Path) -> Path:
    """Return where to write the checkpoint that ``rotate`` then makes ``last``."""
    return last.with_name(_NEXT)


def set_aside(damaged: Sequence[Path], last: Path) -> None:
    """Rename the ``damaged`` files beside ``last``, so that a new checkpoint takes none of their names."""
    for path in damaged:
        if path.parent == last.parent and path.exists():
            path.replace(path.with_name(f"{path.name}.damaged"))


def rotate(last: Path, keep: int) -> None:
    """Make the file at ``next_path`` the last one, and keep ``keep`` files.

    At each moment the newest complete checkpoint is one of ``existing_checkpoints``.
    """
    for number in range(keep - 1, 0, -1):
        if (newer := path_before(last, number - 1)).exists():
            newer.replace(path_before(last, number))
    next_path(last).replace(last)
    for path in existing_checkpoints(last)[keep:]:
        path.unlink()


def check_space(config: TrainerConfig, checkpoint_bytes: int, weights_bytes: int, *, is_new: bool) -> None:
    """Check, before training, that the disk of ``out_dir`` has space for the files of the run.

    Args:
        config: the trainer's options.
        checkpoint_bytes: size of a checkpoint.
        weights_bytes: size of the model's weights.
        is_new: whether the run is new, so that checkpoints of an earlier run in the folder stay beside its own.

    Raises:
        StorageError: it has not; the message has the numbers.

    """
    assert config.out_dir is not None
    keep, folder = config.keep_checkpoints, Path(config.out_dir)
    held = 0 if is_new else len(existing_checkpoints(checkpoint_path(folder)))
    missing = max(1, keep + 1 - held)
    needed, usage = missing * checkpoint_bytes + weights_bytes, shutil.disk_usage(folder)
    if not usage.total or usage.free >= needed:  # some file systems know no sizes
        return
    fewer = "" if keep == 1 else "keep_checkpoints=1 needs less. "
    raise StorageError(
        f"out_dir={str(folder)!r} has {format_bytes(usage.free)} free, and the run needs about {format_bytes(needed)}: "
        f"{missing} checkpoints of {format_bytes(checkpoint_bytes)} (keep_checkpoints={keep}, and the one that is being "
        f"written) and the weights. {fewer}Free some space, or give another out_dir"
    )


def warn_of_damage(error: CheckpointError, older: Path) -> None:
    """Warn that ``older`` is used in place of a damaged checkpoint."""
    logger.warning("%s\nTraining continues from the checkpoint before it, %s", error, older)
