"""Inputs that once ended in a traceback, a hang, much memory, or code that ran: each is an error of one line, or read."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest

from duoka.errors import DuokaError
from fuzz import targets
from fuzz.test_fuzz import find_fault
from support.paths import SHARED_DATA, needs_file

CASES = SHARED_DATA.parent / "cases" / "trust"


class _Given:
    """Feeds one input to a target in place of changed ones."""

    def __init__(self, read) -> None:
        self.feed = lambda _: read()


def check(read) -> None:
    assert find_fault(_Given(read), 0) == ""


def cases(pattern: str) -> list:
    return [pytest.param(path, id=path.name) for path in sorted(CASES.glob(pattern))] or [
        pytest.param(CASES / "none", marks=pytest.mark.skip(reason="the inputs are not on this machine"))
    ]


@pytest.mark.parametrize("path", [*cases("yaml-*"), *cases("compare-*")])
def test_yaml_files(path: Path, tmp_path) -> None:
    check(lambda: targets.ConfigTarget(tmp_path).read(path))
    check(lambda: targets.CompareTarget(tmp_path).read(path))


@pytest.mark.parametrize("path", [*cases("cli_opts-*"), *cases("device-*")])
def test_words_of_a_command_line(path: Path) -> None:
    text = path.read_text()
    value = text.strip("'") if text.startswith("'") else eval(text, {"range": range})  # one string has no end
    if path.name.startswith("device"):
        with pytest.raises(DuokaError):
            targets.DeviceTarget.read(value)
    else:
        with pytest.raises(DuokaError):
            targets.read_config(targets.Cifar100Config, value, recipe="cifar100").resolved()


@pytest.mark.parametrize("path", [*cases("ckpt-*"), *cases("trainck-*")])
def test_checkpoints(path: Path, tmp_path) -> None:
    copied = Path(shutil.copy(path, tmp_path / f"copied{path.suffix}"))
    check(lambda: targets.CheckpointTarget(tmp_path).read(copied))
    check(lambda: targets.TrainingTarget(tmp_path).read(copied))


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> targets.TrainingTarget:
    return targets.TrainingTarget(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("path", cases("trainstate-*"))
def test_training_states(path: Path, training) -> None:
    check(lambda: training.read(path))


@pytest.mark.parametrize("path", [*cases("cifar-*"), *cases("cifar_runs*")])
def test_pickles_of_cifar(path: Path, tmp_path) -> None:
    target = targets.CifarTarget(tmp_path)
    folder = tmp_path / target.source.folder
    folder.mkdir()
    for name, tree in target.trees.items():
        (folder / name).write_bytes(pickle.dumps(tree))
    shutil.copy(path, folder / "train")
    with pytest.raises(DuokaError):
        targets.cifar.load(target.source, tmp_path, verify=False)


@pytest.mark.parametrize("path", [*cases("series-*"), *cases("notebook-*"), *cases("postscript.png")])
def test_other_files(path: Path, tmp_path) -> None:
    kinds = {".csv": targets.CsvTarget, ".ipynb": targets.NotebookTarget, ".png": targets.ImageTarget}
    check(lambda: kinds[path.suffix](tmp_path).read(path))


@pytest.mark.parametrize("path", cases("runfolder-*"))
def test_run_folders(path: Path, tmp_path) -> None:
    heading, _, content = path.read_bytes().partition(b"\n")
    name = heading.decode().removeprefix("### ")
    for number, make in enumerate((targets.ImageRunTarget, targets.FilmRunTarget)):
        (tmp_path / str(number)).mkdir()
        target = make(tmp_path / str(number))
        if (target.run.folder / name).exists():
            (target.run.folder / name).write_bytes(content)
            check(partial(target.read, target.run.folder))


@needs_file(CASES)
@pytest.mark.parametrize("path", cases("script-*"))
def test_scripts_are_searched_without_an_error(path: Path) -> None:
    from duoka.script_runner import Script, explain

    script = Script(str(path), (), is_module=False)
    list(script.sources())
    check(lambda: explain(script.source, script.target, [targets.torch.device("cpu")] * 2))
