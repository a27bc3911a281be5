"""Options from a file and the command line: what wins, and what is refused in which words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from duoka.errors import ConfigError
from duoka.recipes.common.config import at_least, check, field_docs, read, read_yaml
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.image_classification.config import Cifar100Config

GUIDE = (
    "root: ./data\nworkers: 8        # 数据加载线程数\nbsize: 256        # 单GPU batch size\nepochs: 50\nlr: 0.001\n"
)
GUIDE_MULTI_GPU = GUIDE.replace("workers: 8 ", "workers: 16")


@dataclass(frozen=True)
class Small:
    """A small set of options."""

    lr: float = 0.1
    """Learning rate."""
    count: int | None = None
    """How many ``things``,
    in pieces."""
    kind: Literal["plain", "fancy"] = "plain"
    """Which."""
    device: str = "auto"
    """What to compute on."""
    flag: bool = True
    """Yes or no."""

    def __post_init__(self) -> None:
        check(self)
        at_least(self, "count", 1)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("config.yml").write_text(text, encoding="utf-8")
        return "config.yml"

    return write


def small(*arguments: str) -> Small:
    return read(Small, arguments, recipe="small")


@pytest.mark.parametrize(("text", "workers"), [(GUIDE, 8), (GUIDE_MULTI_GPU, 16)])
def test_the_guides_files_work_as_they_are(file, text, workers):
    config = read(Cifar100Config, ["-c", file(text), "--device", "0,1"], recipe="cifar100").resolved()
    assert (config.dataset, config.model, config.device) == ("cifar100", "resnet18", "0,1")
    assert (config.root, config.num_workers, config.batch_size, config.epochs, config.lr) == (
        "./data",
        workers,
        256,
        50,
        0.001,
    )
    assert config.batch_size_means == "per_device"


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [("bsize", "batch_size", 8), ("workers", "num_workers", 2), ("devices", "device", "cpu")],
)
def test_an_option_with_a_second_name_takes_both(file, alias, name, value):
    for arguments in (["-c", file(f"{alias}: {value}")], [f"--{alias}", str(value)]):
        assert getattr(read(Cifar100Config, arguments, recipe="cifar100"), name) == value
    with pytest.raises(ConfigError, match=f"`{alias}` in config.yml is another name of `{name}`"):
        read(Cifar100Config, ["-c", file(f"{name}: {value}\n{alias}: {value}")], recipe="cifar100")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file):
    path = file("lr: 0.5\ncount: 3\n")
    assert small() == Small(0.1, None)
    assert small("-c", path) == Small(0.5, 3)
    assert small("--lr", "2", "--config", path) == Small(2.0, 3)
    assert small("-c", path, "--count=4", "--lr=1e-3") == Small(0.001, 4)


@pytest.mark.parametrize("written", ["1e-3", "0.001", "1.0e-3", "'1e-3'"])
def test_numbers_are_read_as_people_write_them(file, written):
    assert small("-c", file(f"lr: {written}\n")).lr == 0.001


@pytest.mark.parametrize(("text", "device"), [("0", "0"), ("0,1", "0,1"), ("cpu:2", "cpu:2"), ("'0-3'", "0-3")])
def test_devices_need_no_quotes(file, text, device):
    assert small("-c", file(f"device: {text}\n")).device == device
    assert small("--device", text.strip("'")).device == device


def test_null_leaves_an_option_open(file):
    assert small("-c", file("count: null\n")).count is None
    assert small("--count", "null").count is None


def test_an_empty_file_is_all_defaults(file):
    assert small("-c", file("# nothing yet\n")) == Small()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bsise: 3", "unknown key `bsise` in config.yml: there is lr, count, kind, device, flag"),
        ("cuont: 3", "unknown key `cuont` in config.yml: did you mean `count`?"),
        ("lr: fast", "`lr` is 'fast' in config.yml: it must be a number"),
        ("lr: true", "`lr` is True in config.yml: it must be a number"),
        ("count: 2.5", "`count` is 2.5 in config.yml: it must be a whole number or null"),
        ("count: [1]", "`count` is [1] in config.yml: it must be a whole number or null"),
        ("kind: Fancy", "`kind` is 'Fancy' in config.yml: it must be one of plain, fancy; did you mean `fancy`?"),
        ("flag: perhaps", "`flag` is 'perhaps' in config.yml: it must be true or false"),
        ("lr: 1\nx: [1\n", "config.yml, line 3: not valid YAML"),
        ("lr: 1\n\tcount: 2", "config.yml, line 2: not valid YAML"),
        ("- lr", "config.yml holds a list: write one `key: value` a line"),
        ("count: 0", "`count` is 0: it must be a finite number, 1 or more"),
        ("recipe: other", "config.yml is for the recipe `other`: use `duoka train other -c config.yml`"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_remedy(file, text, message):
    with pytest.raises(ConfigError) as caught:
        small("-c", file(text))
    assert message in str(caught.value)


def test_a_switch_needs_no_value():
    assert small("--flag").flag
    assert small("--flag", "--lr", "2") == small("--lr", "2", "--flag", "true")
    assert not small("--flag", "false").flag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuont", "3"], "unknown key `cuont` on the command line: did you mean `count`?"),
        (["--count", "many"], "`count` is 'many' on the command line: it must be a whole number or null"),
        (["--count"], "`--count` on the command line lacks its value"),
        (["--count", "--lr", "1"], "`--count` on the command line lacks its value"),
        (["config.yml"], "'config.yml' on the command line belongs to no option"),
        (["-c", "none.yml"], "cannot read the configuration file none.yml: No such file or directory"),
        (["-c", "."], "cannot read the configuration file .: Is a directory"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_remedy(file, arguments, message):
    with pytest.raises(ConfigError) as caught:
        small(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0), ("epochs", 0), ("lr", 0.0), ("lr", float("nan")), ("lr", float("inf")), ("width", -1.0),
        ("weight_decay", -0.1), ("momentum", 1.0), ("label_smoothing", 1.0), ("test_share", 0.0), ("test_share", 1.0),
        ("image_size", 4), ("num_workers", -1), ("seed", -1), ("model", "resnet19"), ("precision", "fp64"), ("epochs", 1.5),
        ("scheduler", None), ("root", 3),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_however_they_come(option, value):
    with pytest.raises(ConfigError, match=f"`{option}` is "):
        Cifar100Config(**{option: value})


def test_every_option_of_the_recipe_is_explained(capsys):
    docs = field_docs(Cifar100Config)
    assert set(docs) == set(Cifar100Config.__dataclass_fields__)
    assert all(len(text) > 20 or key == "optimizer" for key, text in docs.items())
    with pytest.raises(SystemExit) as ended:
        read(Cifar100Config, ["--help"], recipe="cifar100")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key, text in docs.items():
        assert f"--{key} " in shown
        assert text.split("``")[0].strip()[:40] in shown


def test_help_lists_each_field_with_its_docstring():
    assert field_docs(Small)["count"] == "How many ``things``, in pieces."


def test_options_that_depend_on_others_are_filled_in():
    digits = Cifar100Config(dataset="digits").resolved()
    assert (digits.model, digits.width, digits.batch_size_means, digits.name) == (
        "resnet10",
        0.25,
        "global",
        "digits-resnet10",
    )
    assert Cifar100Config(optimizer="sgd").resolved().lr == 0.1
    assert Cifar100Config(dataset="digits", optimizer="sgd").resolved().lr == 0.1
    assert Cifar100Config(dataset="digits", epochs=3, model="resnet18").resolved().name == "digits-resnet18"
    assert Cifar100Config(dataset="digits", epochs=3).resolved().epochs == 3
    assert None not in {key: value for key, value in vars(digits).items() if key != "resume"}.values()


def test_a_runs_config_file_gives_the_same_options_again(tmp_path):
    config = Cifar100Config(dataset="digits", lr=1e-5, device="0", name="a name: with 字").resolved()
    run = RecipeRun.new(tmp_path, "cifar100", "x")
    run.write_config("cifar100", config)
    assert read(Cifar100Config, ["-c", str(run.config)], recipe="cifar100") == config
    assert run.recipe() == yaml.safe_load(run.config.read_text(encoding="utf-8"))["recipe"] == "cifar100"


def test_resume_takes_the_runs_own_options_unless_others_are_given(tmp_path):
    run = RecipeRun.new(tmp_path, "cifar100", "x")
    run.write_config("cifar100", Cifar100Config(dataset="digits", epochs=7).resolved())
    config = read(Cifar100Config, ["--resume", str(run.folder), "--device", "cpu:2"], recipe="cifar100")
    assert (config.epochs, config.device, config.resume) == (7, "cpu:2", str(run.folder))


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("lr: 0.1\nepochs: 3\nlr: 0.2\n")
    with pytest.raises(ConfigError, match="`lr` stands in line 1 and in line 3; remove one"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("learning-rate", "lr"), ("bs", "batch_size"), ("n_workers", "num_workers"), ("wd", "weight_decay")],
)
def test_what_other_programs_call_an_option_leads_to_it(name, meant):
    with pytest.raises(ConfigError, match=f"did you mean `{meant}`"):
        read(Cifar100Config, [f"--{name}", "1"], recipe="cifar100")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--model", "resnet18"],
            "`model` was resnet10 in this run and is resnet18 now.*leave --model out.*-c .*config.yml",
        ),
        (["--optimizer", "sgd"], "`optimizer` was adamw in this run and is sgd now"),
        (["--epochs", "20"], "`epochs` was 12 in this run and is 20 now.*`onecycle`.*--epochs 20"),
        (["--batch_size", "32"], "`batch_size` was 64 in this run and is 32 now"),
    ],
)
def test_a_change_that_a_checkpoint_does_not_fit_is_refused_by_name(tmp_path, options, said):
    run = RecipeRun(tmp_path)
    run.write_config("cifar100", Cifar100Config(dataset="digits").resolved())
    with pytest.raises(ConfigError, match=said):
        read(Cifar100Config, ["--resume", str(tmp_path), *options], recipe="cifar100")


@pytest.mark.parametrize(
    "options",
    [[], ["--model", "resnet10"], ["--device", "cpu"], ["--epochs", "10"], ["--epochs", "24", "--batch_size", "128"]],
)
def test_a_run_is_resumed_with_what_its_checkpoint_fits(tmp_path, options):
    RecipeRun(tmp_path).write_config("cifar100", Cifar100Config(dataset="digits").resolved())
    assert read(Cifar100Config, ["--resume", str(tmp_path), *options], recipe="cifar100").resume == str(tmp_path)
