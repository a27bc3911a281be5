"""Atomic writes: a file is the old one or the new one after any failure of writer, disk or folder."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import duoka.checkpoint as checkpoint
from duoka.errors import StorageError

SUFFIXES = [".pt", ".safetensors"]


def run(program: str, *arguments: object, cwd: Path | None = None) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(suffix, small_disk):
    path = small_disk / f"m{suffix}"
    checkpoint.save(nn.Linear(10, 10), path)
    old = path.read_bytes()
    with pytest.raises(StorageError) as caught:
        checkpoint.save(nn.Linear(1000, 1000), path)
    assert str(path) in str(caught.value)
    assert "4.00 MB needed, 1.0" in str(caught.value)
    assert "Free some space" in str(caught.value)
    assert path.read_bytes() == old
    assert list(small_disk.iterdir()) == [path]
    checkpoint.save(nn.Linear(20, 20), path)


def saved(model: nn.Module, path: Path) -> bool:
    try:
        checkpoint.save(model, path)
    except StorageError:
        return False
    return True


def test_every_size_of_a_disk_that_is_too_small_is_noticed(small_disk):
    """The space runs out at each stage of writing: in the archive, at its end, in the checksum after it."""
    filler, path = small_disk / "filler", small_disk / "m.pt"
    for kept_free in range(0, 40_000, 4096):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        filler.write_bytes(b"x" * (free - kept_free))
        if saved(nn.Linear(64, 64), path):
            checkpoint.load(path, into=nn.Linear(64, 64))
            path.unlink()
        assert not path.exists()
        filler.unlink()


LIMITED = """
import resource, sys, torch, duoka.checkpoint as checkpoint
from duoka.errors import StorageError
path = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoint.save({"w": torch.ones(10)}, path)
try:
    checkpoint.save({"w": torch.ones(1_000_000)}, path)
except StorageError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_size_limit_is_named_and_leaves_the_old_file(suffix, tmp_path):
    said = run(LIMITED, tmp_path / f"m{suffix}")
    assert "4.00 MB needed" in said
    assert "ulimit -f" in said
    assert checkpoint.load(tmp_path / f"m{suffix}")["w"].sum() == 10
    assert [entry.name for entry in tmp_path.iterdir()] == [f"m{suffix}"]


UNPRIVILEGED = """
import os, sys, torch, duoka.checkpoint as checkpoint
from duoka.errors import StorageError
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
try:
    checkpoint.save({"w": torch.ones(3)}, sys.argv[1])
except StorageError as error:
    print(error)
"""


def test_an_unwritable_folder_is_named(tmp_path):
    with tempfile.TemporaryDirectory(
        prefix="checkpoint-", dir="/tmp"
    ) as name:  # pytest's own folder is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0o555)
        said = run(UNPRIVILEGED, folder / "closed" / "m.pt")
        assert "Permission denied. Make" in said
        assert f"{folder}/closed writable" in said
        assert list((folder / "closed").iterdir()) == []
        assert "Permission denied" in run(UNPRIVILEGED, folder / "closed" / "deeper" / "m.pt")


def test_devices_folders_and_files_as_folders_are_refused_and_stay(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("folder.pt", "pipe.pt", "file/m.pt"):
        with pytest.raises(StorageError, match="cannot write"):
            checkpoint.save(nn.Linear(1, 1), tmp_path / name)
    assert (tmp_path / "folder.pt").is_dir()
    assert (tmp_path / "pipe.pt").is_fifo()
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(StorageError), checkpoint.atomic_write("/dev/null"):
        pass
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permission_bits_follow_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        for suffix in SUFFIXES:
            checkpoint.save(nn.Linear(1, 1), tmp_path / f"m{suffix}")
            assert (tmp_path / f"m{suffix}").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_a_symbolic_link_stays_one_and_missing_folders_are_made(tmp_path):
    (tmp_path / "latest.pt").symlink_to(tmp_path / "runs" / "1" / "m.pt")
    checkpoint.save(nn.Linear(1, 1), tmp_path / "latest.pt")
    assert (tmp_path / "latest.pt").is_symlink()
    assert (tmp_path / "runs" / "1" / "m.pt").is_file()


def write_half(path: Path, error: BaseException) -> None:
    with checkpoint.atomic_write(path) as file:
        file.write(b"half")
        raise error


def test_a_block_that_raises_leaves_the_old_file_and_its_own_error(tmp_path):
    path = tmp_path / "notes"
    path.write_text("old")
    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_half(path, error)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_block_ends(tmp_path):
    path = tmp_path / "notes"
    path.write_text("old")
    with checkpoint.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_two_writers_of_one_file_do_not_take_each_others_temporary_file(tmp_path):
    with checkpoint.atomic_write(tmp_path / "a") as first:
        first.write(b"first")
        with checkpoint.atomic_write(tmp_path / "a") as second:
            second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


WRITING = """
import itertools, os, sys, torch, duoka.checkpoint as checkpoint
torch.set_num_threads(1)
for line in sys.stdin:  # each line starts a writer, which the parent kills
    child = os.fork()
    if child == 0:
        for number in itertools.count():
            checkpoint.save({"values": torch.full((200_000,), float(number))}, line.strip())
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(suffix, tmp_path):
    path = tmp_path / f"[m*]{suffix}"
    checkpoint.save({"values": torch.full((200_000,), -1.0)}, path)
    generator = random.Random(0)
    with subprocess.Popen([sys.executable, "-c", WRITING], stdin=-1, stdout=-1, text=True) as writers:
        for _ in range(25):
            print(path, file=writers.stdin, flush=True)
            child = int(writers.stdout.readline())
            time.sleep(generator.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            assert writers.stdout.readline() == "dead\n"
            values = checkpoint.load(path)["values"]
            assert len(values.unique()) == 1
            hidden = [entry.name for entry in tmp_path.iterdir() if entry != path]
            assert len(hidden) <= 1
            assert all(name.startswith(".") and name.endswith(".duoka-tmp") for name in hidden)
        writers.stdin.close()
    checkpoint.save({"values": torch.zeros(3)}, path)
    assert list(tmp_path.iterdir()) == [path]


def test_only_temporary_files_of_the_same_name_are_cleaned_up(tmp_path):
    for name in (".m.pt.0123abcd.duoka-tmp", ".other.pt.0123abcd.duoka-tmp", ".m.pt.mine", "m.pt.duoka-tmp"):
        (tmp_path / name).touch()
    checkpoint.save(nn.Linear(1, 1), tmp_path / "m.pt")
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == [".m.pt.mine", ".other.pt.0123abcd.duoka-tmp", "m.pt", "m.pt.duoka-tmp"]
