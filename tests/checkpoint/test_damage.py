"""Damaged and hostile files, which are refused with a reason and run no code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import duoka.checkpoint as checkpoint
from duoka.errors import CheckpointError


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(64.0).reshape(8, 8), "bias": torch.ones(8)}


def write(kind: str, folder: Path) -> Path:
    if kind == "plain torch":
        torch.save(state(), folder / "plain.pt")
        return folder / "plain.pt"
    checkpoint.save(state(), folder / kind)
    return folder / kind


def is_refused_or_whole(path: Path) -> bool:
    """Whether reading either raises the right error or gives what was saved."""
    try:
        loaded = checkpoint.load(path)
    except CheckpointError as error:
        return str(path) in str(error)
    return all(torch.equal(loaded[name], value) for name, value in state().items())


@pytest.mark.parametrize("kind", ["m.pt", "m.safetensors", "plain torch"])
def test_a_flipped_byte_anywhere_is_never_loaded_as_other_values(kind, tmp_path):
    path = write(kind, tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place * 5) % 8
        path.write_bytes(damaged)
        assert is_refused_or_whole(path), place


@pytest.mark.parametrize("kind", ["m.pt", "m.safetensors"])
def test_a_flipped_byte_among_the_values_is_found(kind, tmp_path):
    path = write(kind, tmp_path)
    whole = path.read_bytes()
    place = whole.index(state()["weight"].numpy().tobytes()[:64])
    path.write_bytes(whole[: place + 3] + bytes([whole[place + 3] ^ 1]) + whole[place + 4 :])
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", ["m.pt", "m.safetensors", "plain torch"])
def test_a_truncated_file_is_refused_at_any_length(kind, tmp_path):
    path = write(kind, tmp_path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 30, 37), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"damaged|truncated"):
            checkpoint.load(path)


def test_a_safetensors_file_of_the_library_that_is_truncated_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file", b"\x80\x02garbage", b"PK", b"\x00" * 100])
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_what_is_no_checkpoint_is_refused(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|no checkpoint"):
        checkpoint.load(tmp_path / name)


def test_a_folder_and_an_unreadable_name_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(tmp_path)


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def hostile_files(folder: Path, mark: Path) -> None:
    torch.save({"weight": Hostile(mark)}, folder / "zip.pt")
    torch.save({"weight": Hostile(mark)}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "raw.pt").write_bytes(pickle.dumps({"weight": Hostile(mark)}, protocol=2))


@pytest.mark.parametrize("forced", [False, True])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(forced, tmp_path, monkeypatch):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "it ran"
    (tmp_path / "files").mkdir()
    hostile_files(tmp_path / "files", mark)
    for path in (tmp_path / "files").iterdir():
        for into in (None, nn.Linear(1, 1)):
            with pytest.raises(CheckpointError, match=r"names code to be run.*(posix|os)\.system"):
                checkpoint.load(path, into=into)
        with pytest.raises(CheckpointError, match="names code to be run"):
            checkpoint.load_training(path)
    assert not mark.exists()


def test_the_refusal_of_a_whole_pickled_model_says_how_to_convert_it(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "whole.pth")
    assert "torch.nn.modules.linear.Linear" in str(caught.value)
    assert "weights_only=False" in str(caught.value)
    code = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    lines = "\n".join(code).replace('"converted.pt"', f'"{tmp_path}/converted.pt"')
    namespace = {"torch": torch, "duoka": checkpoint}
    exec(lines, namespace)
    assert checkpoint.load(tmp_path / "converted.pt", into=nn.Linear(1, 1)).weight.shape == (1, 1)


def test_a_script_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/constants.pkl", pickle.dumps(()))
        archive.writestr("m/data.pkl", pickle.dumps({}))
        archive.writestr("m/version", "3\n")
    with pytest.raises(CheckpointError, match="TorchScript"):
        checkpoint.load(tmp_path / "script.pt")


@pytest.mark.parametrize("text", ["these are notes\n", "hello world\n", "# Notes\n"])
def test_a_text_file_is_refused_with_our_own_message(tmp_path, text):
    path = tmp_path / "notes.pt"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="is no checkpoint of PyTorch; give a file that duoka") as caught:
        checkpoint.load(path)
    assert "weights_only" not in str(caught.value)
