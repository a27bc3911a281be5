"""Names: no wrapper leaves a part in a file, and a file with such parts loads into any fitting model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed.nn.functional  # imported while a group is up, its defaults would hold that group for ever
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import duoka.checkpoint as checkpoint
from duoka.checkpoint.key_names import clean_state, match_names


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


class WithModuleChild(nn.Module):
    """A user's model in which ``module`` is a name of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)


class OnlyModuleChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)


@pytest.fixture
def group(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {"compile": torch.compile, "dp": nn.DataParallel, "ddp": DistributedDataParallel}


@pytest.mark.parametrize("order", [*itertools.permutations(WRAPPERS), ("dp",), ("dp", "dp")])
def test_every_nesting_of_wrappers_is_saved_as_the_bare_model_is(order, group, tmp_path):
    model = network()
    wrapped = model
    for name in order:
        wrapped = WRAPPERS[name](wrapped)
    assert checkpoint.unwrap(wrapped) is model
    for suffix in (".pt", ".pth", ".safetensors"):
        checkpoint.save(wrapped, tmp_path / f"m{suffix}")
        assert set(checkpoint.load(tmp_path / f"m{suffix}")) == set(network().state_dict())
        assert checkpoint.load(tmp_path / f"m{suffix}", into=wrapped) is wrapped


def test_a_compiled_or_parallel_part_of_a_model_leaves_no_mark(tmp_path):
    model = network()
    model[0] = torch.compile(model[0])
    model[2] = nn.DataParallel(model[2])
    assert "0._orig_mod.weight" in model.state_dict()
    checkpoint.save(model, tmp_path / "m.pt")
    assert list(torch.load(tmp_path / "m.pt", weights_only=True)) == list(network().state_dict())
    plain = checkpoint.load(tmp_path / "m.pt", into=network())
    for ours, theirs in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [WithModuleChild, OnlyModuleChild])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_child_that_the_user_named_module_keeps_its_name(kind, suffix, tmp_path):
    model = kind()
    assert checkpoint.unwrap(model) is model
    path = tmp_path / f"m{suffix}"
    checkpoint.save(nn.DataParallel(model), path)
    assert set(checkpoint.load(path)) == set(model.state_dict())
    other = checkpoint.load(path, into=kind())
    assert torch.equal(other.module.weight, model.module.weight)


@pytest.mark.parametrize("kind", [WithModuleChild, OnlyModuleChild])
def test_a_bare_state_dict_loads_into_a_model_with_a_child_named_module(kind, tmp_path):
    model = kind()
    for index, state in enumerate((model.state_dict(), nn.DataParallel(model).state_dict())):
        checkpoint.save(state, tmp_path / f"{index}.pt")
        other = checkpoint.load(tmp_path / f"{index}.pt", into=torch.compile(kind()))
        assert torch.equal(checkpoint.unwrap(other).module.weight, model.module.weight)


@pytest.mark.parametrize("nesting", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_files_of_other_programs_load_with_any_prefix_and_nesting(nesting, prefix, tmp_path):
    model = network()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(state if nesting is None else {nesting: state, "epoch": 3}, tmp_path / "theirs.pth")
    for target in (network(), nn.DataParallel(network()), torch.compile(network())):
        loaded = checkpoint.load(tmp_path / "theirs.pth", into=target)
        assert torch.equal(checkpoint.unwrap(loaded)[2][0].weight, model[2][0].weight)
    returned = checkpoint.load(tmp_path / "theirs.pth")
    assert list(returned if nesting is None else returned[nesting]) == list(model.state_dict())


def test_a_prefix_in_the_middle_of_a_name_is_removed(tmp_path):
    torch.save({"encoder._orig_mod.weight": torch.ones(2, 2)}, tmp_path / "theirs.pt")
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2, bias=False)})
    assert checkpoint.load(tmp_path / "theirs.pt", into=model)["encoder"].weight.sum() == 4
    assert list(checkpoint.load(tmp_path / "theirs.pt")) == ["encoder.weight"]


def test_names_that_differ_in_depth_only_keep_their_order():
    assert match_names(["module.w", "module.module.w"], ["w", "module.w"]) == {
        "module.w": "w",
        "module.module.w": "module.w",
    }
    assert match_names(["w"], ["w", "module.w"]) == {"w": "w"}
    assert match_names(["a.module.w", "b.w"], ["a.w", "b._orig_mod.w"]) == {"a.module.w": "a.w", "b.w": "b._orig_mod.w"}


def test_cleaning_leaves_alone_what_only_looks_like_a_prefix():
    for names in (["module.weight", "head.weight"], ["module"], ["submodule.weight"], []):
        state = dict.fromkeys(names, torch.zeros(1))
        assert list(clean_state(state)) == names


def test_the_versions_of_modules_travel_under_clean_names(tmp_path):
    checkpoint.save(nn.DataParallel(network()).state_dict(), tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert state._metadata.keys() == network().state_dict()._metadata.keys()
    assert state._metadata["1"] == {"version": 2}
