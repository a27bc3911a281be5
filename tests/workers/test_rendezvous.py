"""The rendezvous of a machine's ranks needs no file system once Python runs."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch.distributed as dist

import duoka
from duoka.workers import rendezvous


def use_groups_after_removal(folder: str | None) -> list[int]:
    if folder is not None and duoka.current_world().rank == 0:
        shutil.rmtree(folder)
    dist.barrier()
    group = dist.new_group(backend="gloo")
    found = [0, 0]
    dist.all_gather_object(found, duoka.current_world().rank + 5, group=group)
    return found


def test_a_launch_survives_a_cleaner_of_the_temporary_folder(monkeypatch, tmp_path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert duoka.launch(use_groups_after_removal, str(folder), devices="cpu:2", returns="all") == [[5, 6], [5, 6]]
    assert duoka.launch(use_groups_after_removal, None, devices="cpu:2") == [5, 6]


def test_a_process_that_has_closed_its_descriptors_gets_a_new_file() -> None:
    first = rendezvous.RendezvousFile.of_this_process()
    os.close(first.fd)
    with tempfile.TemporaryFile() as users_own:
        assert users_own.fileno() == first.fd
        second = rendezvous.RendezvousFile.of_this_process()
        assert second.key != first.key
        assert duoka.launch(use_groups_after_removal, None, devices="cpu:2") == [5, 6]
        assert not users_own.read()


def test_a_system_without_proc_uses_a_folder_and_removes_it(monkeypatch, tmp_path) -> None:
    removals = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(rendezvous.atexit, "register", lambda *call: removals.append(call))
    file = rendezvous.RendezvousFile()
    monkeypatch.setattr(rendezvous, "_file_of", lambda _: file)
    assert duoka.launch(use_groups_after_removal, None, devices="cpu:2", returns="all") == [[5, 6], [5, 6]]
    duoka.close_workers()
    ((remove, *arguments),) = removals
    remove(*arguments)
    assert not list(tmp_path.iterdir())
    os.close(file.fd)


@pytest.mark.parametrize("count", [3])
def test_groups_that_exist_at_once_do_not_mix_their_addresses(count: int) -> None:
    parts = [rendezvous.Rendezvous.new() for _ in range(count)]
    for number, part in enumerate(parts):
        part.store().set("address", str(number))
    assert [part.store().get("address") for part in parts] == [b"0", b"1", b"2"]
