"""Saved state: it loads exactly, plain PyTorch and safetensors read it, and misfits are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import duoka.checkpoint as checkpoint
from duoka.errors import CheckpointError, ConfigError

SUFFIXES = [".pt", ".pth", ".safetensors"]


def all_kinds_of_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.uint8]
    dtypes += [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float32]
    return {
        **{f"of.{dtype}": base.to(dtype) for dtype in dtypes},
        "complex": torch.complex(base, -base),
        "conjugate": torch.complex(base, -base).conj(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(3)),
    }


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and torch.equal(
        first.detach().resolve_conj().contiguous(), second.detach().resolve_conj().contiguous()
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_of_every_kind_come_back_exactly(suffix, tmp_path):
    state = all_kinds_of_tensors()
    checkpoint.save(state, tmp_path / f"all{suffix}")
    loaded = checkpoint.load(tmp_path / f"all{suffix}")
    assert loaded.keys() == state.keys()
    assert [name for name in state if not same(state[name], loaded[name])] == []


def test_files_are_readable_without_duoka(tmp_path):
    state = all_kinds_of_tensors()
    checkpoint.save(state, tmp_path / "all.pt")
    checkpoint.save(state, tmp_path / "all.safetensors")
    archives = [torch.load(tmp_path / "all.pt", weights_only=True, mmap=mmap) for mmap in (False, True)]
    for loaded in (*archives, safetensors.torch.load_file(tmp_path / "all.safetensors")):
        assert [name for name in state if not same(state[name], loaded[name])] == []


def test_files_of_the_libraries_are_read(tmp_path):
    model = nn.Linear(3, 4)
    torch.save(model.state_dict(), tmp_path / "zip.pt")
    torch.save(model.state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "library.safetensors")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "wrong_suffix.pt")
    for path in tmp_path.iterdir():
        assert torch.equal(checkpoint.load(path, into=nn.Linear(3, 4)).weight, model.weight), path.name


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tied_weights_are_stored_once_and_come_back_tied(suffix, tmp_path):
    model, path = Tied(), tmp_path / f"tied{suffix}"
    checkpoint.save(model, path)
    state = checkpoint.load(path)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    other = checkpoint.load(path, into=Tied())
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_tied_weights_pass_between_duoka_and_the_safetensors_library(tmp_path):
    model = Tied()
    checkpoint.save(model, tmp_path / "ours.safetensors")
    other = Tied()
    safetensors.torch.load_model(other, tmp_path / "ours.safetensors")
    assert torch.equal(other.head.weight, model.head.weight)
    safetensors.torch.save_model(model, str(tmp_path / "theirs.safetensors"))
    assert torch.equal(checkpoint.load(tmp_path / "theirs.safetensors", into=Tied()).head.weight, model.head.weight)


def test_a_tied_weight_that_a_file_holds_once_fills_both_places(tmp_path):
    torch.save({"embedding.weight": torch.ones(5, 3)}, tmp_path / "once.pt")
    assert checkpoint.load(tmp_path / "once.pt", into=Tied()).head.weight.sum() == 15


def test_a_view_is_not_saved_with_all_that_it_is_a_view_of(tmp_path):
    checkpoint.save({"row": torch.zeros(1000, 1000)[0]}, tmp_path / "row.pt")
    assert (tmp_path / "row.pt").stat().st_size < 10_000


def test_a_nested_state_keeps_its_shape_and_types(tmp_path):
    model = nn.Linear(2, 2)
    state = {"model": nn.DataParallel(model), "epoch": 3, "best": 0.5, "notes": ["a", None, (1, 2.0)], "done": True}
    checkpoint.save(state, tmp_path / "nested.pt")
    loaded = torch.load(tmp_path / "nested.pt", weights_only=True)
    assert list(loaded["model"]) == ["weight", "bias"]
    assert {key: value for key, value in loaded.items() if key != "model"} == {
        key: value for key, value in state.items() if key != "model"
    }
    assert torch.equal(checkpoint.load(tmp_path / "nested.pt", into=nn.Linear(2, 2)).weight, model.weight)


def test_a_mismatch_names_every_key_with_both_shapes_and_loads_nothing(tmp_path):
    theirs = nn.ModuleDict({"encoder": nn.Linear(3, 4), "classifier": nn.Linear(4, 10), "old": nn.Linear(1, 1)})
    checkpoint.save(theirs, tmp_path / "theirs.pt")
    mine = nn.ModuleDict({"encoder": nn.Linear(3, 4), "clasifier": nn.Linear(4, 10), "head": nn.Linear(7, 1)})
    mine["encoder"] = nn.Linear(3, 5)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(tmp_path / "theirs.pt", into=mine, strict=strict)
        said = str(caught.value)
        assert "shape: encoder.weight is (4, 3) in the file, (5, 3) in the model" in said
        assert "missing: clasifier.weight (10, 4); did you mean 'classifier.weight'?" in said
        assert "missing: head.weight (1, 7)" in said
        assert "unexpected: old.bias" in said
        assert "nothing was loaded" in said
    assert all(torch.equal(before[name], value) for name, value in mine.state_dict().items())


def test_a_long_mismatch_shows_twenty_lines_and_counts_the_rest(tmp_path):
    checkpoint.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(30))), tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "m.pt", into=nn.Sequential(*(nn.Linear(3, 3) for _ in range(30))))
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert "40 more" in lines[-1]


def test_not_strict_loads_what_fits_and_says_what_did_not(tmp_path, caplog):
    torch.save({"0.weight": torch.ones(2, 2), "extra": torch.ones(1)}, tmp_path / "part.pt")
    model = nn.Sequential(nn.Linear(2, 2))
    with caplog.at_level("WARNING", "duoka"):
        checkpoint.load(tmp_path / "part.pt", into=model, strict=False)
    assert model[0].weight.sum() == 4
    assert "missing: 0.bias (2,)" in caplog.text
    assert "unexpected: extra" in caplog.text
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        checkpoint.load(tmp_path / "part.pt", into=nn.ModuleDict({"other": nn.Linear(2, 2)}), strict=False)


def test_the_counter_that_old_batch_norms_did_not_keep_is_not_missed(tmp_path):
    state = {name: value for name, value in nn.BatchNorm1d(3).state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt", into=nn.BatchNorm1d(3)).num_batches_tracked == 0


def test_complex_weights_do_not_lose_their_imaginary_part_silently(tmp_path):
    torch.save({"weight": torch.ones(2, 2, dtype=torch.complex64)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"weight is torch\.complex64 in the file"):
        checkpoint.load(tmp_path / "c.pt", into=nn.Linear(2, 2, bias=False))


def test_lazy_modules_take_the_shape_of_the_file(tmp_path):
    checkpoint.save(nn.Linear(3, 4), tmp_path / "m.pt")
    lazy = nn.LazyLinear(4)
    assert checkpoint.load(tmp_path / "m.pt", into=lazy).weight.shape == (4, 3)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    checkpoint.save(nn.Linear(1, 1), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"did you mean .model\.pth"):
        checkpoint.load(tmp_path / "modle.pth")


def test_a_file_without_a_model_says_what_it_has(tmp_path):
    checkpoint.save({"epoch": 3}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="it has 'epoch'"):
        checkpoint.load(tmp_path / "m.pt", into=nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["m.ckpt", "m", "m.safetensor"])
def test_an_unknown_suffix_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(ConfigError, match=r"\.pt, \.pth or \.safetensors"):
        checkpoint.save(nn.Linear(1, 1), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


class Odd:
    pass


@pytest.mark.parametrize("value", [Odd(), Odd, print, Path("x"), {"deep": [1, Odd()]}, torch.zeros(2, device="meta")])
def test_what_needs_code_to_be_loaded_is_refused_when_it_is_saved(value, tmp_path):
    with pytest.raises(CheckpointError, match=r"state\['odd'\]"):
        checkpoint.save({"odd": value}, tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [3, {"a": torch.zeros(1)}, torch.zeros(2, dtype=torch.complex128)])
def test_what_safetensors_cannot_hold_is_named(value, tmp_path):
    with pytest.raises(CheckpointError, match=r"'odd' .*use \.pt"):
        checkpoint.save({"odd": value}, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_with_a_model_in_them_are_found_by_a_process_without_duoka(tmp_path):
    checkpoint.save(nn.DataParallel(nn.Linear(2, 3)), tmp_path / "m.pth")
    program = (
        "import sys, torch; torch.nn.Linear(2, 3).load_state_dict(torch.load('m.pth')); print('duoka' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_no_model_cannot_be_loaded_into(tmp_path):
    checkpoint.save(nn.Linear(1, 1), tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="into='x'"):
        checkpoint.load(tmp_path / "m.pt", into="x")
