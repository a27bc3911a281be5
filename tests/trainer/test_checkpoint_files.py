"""Checkpoints on disk: how many are kept, which one is used when the last is damaged, and a disk that is full."""

from __future__ import annotations

import contextlib
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from duoka.checkpoint import load_training, save_training
from duoka.errors import CheckpointError, CheckpointFormatError, StorageError
from duoka.trainer import Callback
from duoka.trainer.checkpoint_files import existing_checkpoints, next_path, rotate
from support.tiny_training import loader, trainer_of

Usage = namedtuple("Usage", "total used free")


def fit(folder: Path, **options):
    trainer = trainer_of(loader(shuffle=True), out_dir=folder, tensorboard=False, lr=0.01, **options)
    trainer.fit()
    return trainer


def steps(folder: Path) -> list[int]:
    paths = existing_checkpoints(folder / "checkpoint" / "last.pt")
    return [load_training(path)["state"]["step"] for path in paths]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_are_kept(tmp_path, keep):
    fit(tmp_path, epochs=4, keep_checkpoints=keep)
    assert steps(tmp_path) == [12, 9, 6][:keep]
    assert len(list((tmp_path / "checkpoint").iterdir())) == keep


def test_fewer_checkpoints_stay_when_a_resumed_run_keeps_fewer(tmp_path):
    fit(tmp_path, epochs=3, keep_checkpoints=3)
    fit(tmp_path, epochs=4, keep_checkpoints=1, resume=True)
    assert steps(tmp_path) == [12]


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, device, caplog):
    whole = fit(tmp_path / "whole", device=device, epochs=4)
    fit(tmp_path / "run", device=device, epochs=2)
    last = tmp_path / "run" / "checkpoint" / "last.pt"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    resumed = fit(tmp_path / "run", device=device, epochs=4, resume=True)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{last} is ")
    assert warning.endswith(f"Training continues from the checkpoint before it, {last.with_name('last-1.pt')}")
    assert last.with_name("last.pt.damaged").read_bytes() == content[: len(content) // 2]
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")


def test_a_damaged_next_checkpoint_does_not_stop_a_resumed_run(tmp_path):
    fit(tmp_path, epochs=2)
    next_one = next_path(tmp_path / "checkpoint" / "last.pt")
    next_one.write_bytes(b"damaged")
    fit(tmp_path, epochs=3, resume=True)
    assert steps(tmp_path) == [9, 6]
    assert next_one.with_name("next.pt.damaged").read_bytes() == b"damaged"


def test_a_checkpoint_of_a_newer_version_is_not_taken_for_damaged(tmp_path, monkeypatch):
    fit(tmp_path, epochs=2)
    last = tmp_path / "checkpoint" / "last.pt"
    state = load_training(last)
    with monkeypatch.context() as newer:
        newer.setattr("duoka.checkpoint.train_state.TRAINING_VERSION", 2)
        save_training(last, state)
    with pytest.raises(CheckpointFormatError, match="install a newer duoka"):
        fit(tmp_path, epochs=3, resume="auto")
    save_training(last, {"model": {}})
    with pytest.raises(CheckpointFormatError, match="not a Trainer's checkpoint"):
        fit(tmp_path, epochs=3, resume="auto")
    assert sorted(path.name for path in last.parent.iterdir()) == ["last-1.pt", "last.pt"]


def test_if_all_checkpoints_are_damaged_the_last_one_is_named(tmp_path):
    fit(tmp_path, epochs=2)
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged"):
        fit(tmp_path, resume="auto")


def test_a_checkpoint_that_is_named_has_no_substitute(tmp_path):
    fit(tmp_path, epochs=2)
    last = tmp_path / "checkpoint" / "last.pt"
    last.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged"):
        fit(tmp_path / "other", resume=last)


def test_a_rotation_cut_off_anywhere_leaves_the_newest_first(tmp_path, monkeypatch):
    last = tmp_path / "last.pt"

    class Cut(Exception):
        pass

    for cut_after in range(3):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for path, content in ((last, "2"), (last.with_name("last-1.pt"), "1"), (next_path(last), "3")):
            path.write_text(content)
        done = []

        def replace(self, target, done=done, cut_after=cut_after, real=Path.replace):
            if len(done) == cut_after:
                raise Cut
            done.append(target)
            return real(self, target)

        with monkeypatch.context() as patch, pytest.raises(Cut) if cut_after < 2 else contextlib.nullcontext():
            patch.setattr(Path, "replace", replace)
            rotate(last, keep=2)
        assert [path.read_text() for path in existing_checkpoints(last)][:2] == ["3", "2"]


def test_too_little_disk_space_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 0, 300))
    with pytest.raises(
        StorageError, match=r"has 300 bytes free, and the run needs about \d+ bytes: 3 checkpoints of 144 b"
    ):
        fit(tmp_path / "run", optimizer="adam")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cpu", "cpu:2"])
def test_a_disk_that_fills_up_keeps_the_former_checkpoint(tmp_path, monkeypatch, device):
    class FillDisk(Callback):
        def on_epoch_end(self, state) -> None:
            if state.epoch == 2:
                monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 0, 100))

    with pytest.raises(StorageError, match=r"next\.pt: No space left on device \(\d+ bytes needed, 100 bytes free\)"):
        fit(tmp_path, device=device, epochs=3, callbacks=[FillDisk()])
    monkeypatch.undo()
    assert steps(tmp_path) == [3 if device == "cpu" else 2]
    assert len(fit(tmp_path, device=device, epochs=3, resume=True).history) == 3


def test_checkpoints_of_an_earlier_run_give_a_new_run_no_space(tmp_path, monkeypatch):
    fit(tmp_path, epochs=2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 0, 150))
    with pytest.raises(StorageError, match=r"3 checkpoints of \d+ bytes"):
        fit(tmp_path)


def test_an_unknown_optimizer_is_not_refused_by_a_guess(tmp_path, monkeypatch):
    found: list[int] = []
    monkeypatch.setattr("duoka.trainer.fit_loop.check_space", lambda _, size, __, **options: found.append(size))
    for optimizer in ("sgd", "adam", torch.optim.RMSprop):
        fit(tmp_path, epochs=1, optimizer=optimizer)
    assert found == [48, 144, 48]
