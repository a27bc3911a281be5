"""Lock of a run's folder: a second program is refused, and a killed one leaves nothing in the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from duoka.errors import StorageError
from duoka.trainer import Callback
from duoka.utils.run_lock import LOCK, run_lock
from support.tiny_training import trainer_of

HOLD = "import sys; from pathlib import Path; from duoka.utils.run_lock import run_lock\n" + (
    "with run_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def other_program(tmp_path: Path):
    """A process that holds the folder ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_folder_is_refused_and_the_holder_is_named(tmp_path, other_program):
    with pytest.raises(StorageError) as refused:
        trainer_of(out_dir=tmp_path / "run", tensorboard=False).fit()
    assert f"process {other_program.pid} on {socket.gethostname()}, since 2" in str(refused.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    other_program.stdin.close()
    other_program.wait()
    trainer_of(out_dir=tmp_path / "run", tensorboard=False).fit()
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_of_a_killed_program_is_taken_over_with_a_word(tmp_path, other_program, caplog):
    other_program.kill()
    other_program.wait()
    with run_lock(tmp_path / "run"):
        pass
    assert f"process {other_program.pid} on" in caplog.text
    assert "was killed; this run takes its folder" in caplog.text


def test_two_trainers_of_one_program_cannot_share_a_folder(tmp_path):
    class Nested(Callback):
        def on_epoch_end(self, _) -> None:
            with run_lock(tmp_path):
                pass

    with pytest.raises(StorageError, match="another Trainer of this program"):
        trainer_of(out_dir=tmp_path, tensorboard=False, callbacks=[Nested()]).fit()
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize(("host", "is_refused"), [("another-machine", True), (socket.gethostname(), False)])
def test_without_locks_of_the_file_system_the_text_counts(tmp_path, monkeypatch, host, is_refused):
    def no_locks(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("fcntl.flock", no_locks)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    holder = {"pid": int(ended.stdout), "began": 1.0, "host": host, "since": "2026-01-02 03:04:05"}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    if is_refused:
        with (
            pytest.raises(StorageError, match=r"on another-machine, since 2026.*delete .*\.lock"),
            run_lock(tmp_path),
        ):
            pass
    else:
        with run_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="cannot be used"), run_lock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
