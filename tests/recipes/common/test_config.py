"""Options from a file and the command line: which one wins, and the messages of refusals."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import yaml

from duoka.errors import ConfigError
from duoka.recipes.common.config import RunOptions, read_config
from duoka.recipes.common.recipe_run import RecipeRun, config_text
from duoka.recipes.common.registry import RECIPES, find_recipe
from duoka.recipes.image_classification.config import Cifar100Config
from duoka.utils.argument_parser import field_docs
from duoka.utils.yaml_file import read_yaml

GUIDE = (
    "root: ./data\nworkers: 8        # 数据加载线程数\nbsize: 256        # 单GPU batch size\nepochs: 50\nlr: 0.001\n"
)
GUIDE_MULTI_GPU = GUIDE.replace("workers: 8 ", "workers: 16")


@dataclass(frozen=True)
class Small(RunOptions):
    """A small set of options."""

    lr: float = 0.1
    count: int | None = None
    """How many ``things``,
    in pieces. Default: all."""
    kind: Literal["plain", "fancy"] = "plain"
    """Which."""
    flag: bool = True
    """Yes or no."""
    scheduler = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_numbers("count", least=1)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("config.yml").write_text(text, encoding="utf-8")
        return "config.yml"

    return write


def small(*arguments: str) -> Small:
    return read_config(Small, arguments, recipe="small")


@pytest.mark.parametrize(("text", "workers"), [(GUIDE, 8), (GUIDE_MULTI_GPU, 16)])
def test_configuration_files_of_the_guides_work_unchanged(file, text, workers):
    config = read_config(Cifar100Config, ["-c", file(text), "--device", "0,1"], recipe="cifar100").resolved()
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
def test_both_names_of_an_option_are_accepted(file, alias, name, value):
    for arguments in (["-c", file(f"{alias}: {value}")], [f"--{alias}", str(value)]):
        assert getattr(read_config(Cifar100Config, arguments, recipe="cifar100"), name) == value
    with pytest.raises(ConfigError, match=f"`{name}` is set in line 1 and in line 2"):
        read_config(Cifar100Config, ["-c", file(f"{name}: {value}\n{alias}: {value}")], recipe="cifar100")


def test_command_line_overrides_file_and_file_overrides_defaults(file):
    path = file("lr: 0.5\ncount: 3\n")
    assert small() == Small(lr=0.1)
    assert small("-c", path) == Small(lr=0.5, count=3)
    assert small("--lr", "2", "--config", path) == Small(lr=2.0, count=3)
    assert small("-c", path, "--count=4", "--lr=1e-3") == Small(lr=0.001, count=4)


@pytest.mark.parametrize("written", ["1e-3", "0.001", "1.0e-3", "'1e-3'"])
def test_numbers_are_accepted_in_every_usual_notation(file, written):
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
        ("zzz: 3", "config.yml: unknown key zzz; there is count, kind, flag, root"),
        ("cuont: 3", "config.yml: unknown key cuont; did you mean 'count'?"),
        ("learning_rate: 3", "config.yml: unknown key learning_rate; did you mean 'lr'?"),
        ("lr: fast", "config.yml: lr='fast' is not valid: it must be a number"),
        ("lr: true", "config.yml: lr='true' is not valid: it must be a number"),
        ("count: 2.5", "config.yml: count='2.5' is not valid: it must be an integer"),
        ("count: [1]", "config.yml: count=['1'] is not valid: it must be an integer"),
        ("device: [1]", "config.yml: device=['1'] is not valid: it must be text"),
        ("zzz: [1]", "config.yml: unknown key zzz"),
        ("kind: Fancy", "config.yml: kind='Fancy' is not valid: it must be one of plain, fancy; did you mean 'fancy'?"),
        ("flag: perhaps", "config.yml: flag='perhaps' is not valid: it must be true or false"),
        ("lr: 1\nx: [1\n", "config.yml, line 3: not valid YAML"),
        ("lr: 1\n\tcount: 2", "config.yml, line 2: not valid YAML"),
        ("- lr", "config.yml holds a list: write one `key: value` a line"),
        ("count: 0", "count=0 is not valid: it must be a finite number, 1 or more"),
        ("recipe: other", "duoka train other -c config.yml"),
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
        (["--cuont", "3"], "unknown option --cuont; did you mean '--count'?"),
        (["--count", "many"], "--count='many' is not valid: it must be an integer"),
        (["--count"], "--count needs a value"),
        (["--count", "--lr", "1"], "--count needs a value"),
        (["config.yml"], "'config.yml' belongs to no option"),
        (["-c", "none.yml"], "cannot read the configuration file none.yml: No such file or directory; give a file"),
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
def test_invalid_options_are_refused_from_every_source(option, value):
    with pytest.raises(ConfigError, match=f"{option}=.* is not valid"):
        Cifar100Config(**{option: value})


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_explains_every_option_with_its_default_in_plain_words(recipe, capsys):
    kind = find_recipe(recipe).Config
    docs = field_docs(kind)
    assert set(docs) >= {field.name for field in fields(kind)}
    with pytest.raises(SystemExit) as ended:
        read_config(kind, ["--help"], recipe=recipe)
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(kind):
        assert f"--{field.name} " in shown
        if field.default is None and field.name != "resume":
            assert "Default: " in docs[field.name]
    for word in ("null", "None", "Optional", "Literal", "<class", "``"):
        assert word not in shown


def test_a_docstring_completes_that_of_the_base_class():
    docs = field_docs(Small)
    assert docs["count"] == "How many ``things``, in pieces. Default: all."
    assert docs["lr"] == field_docs(RunOptions)["lr"]
    assert field_docs(Cifar100Config)["epochs"] == "Passes over the training data. Default: 50; 12 for digits."


def test_print_config_prints_a_file_that_gives_the_same_options(file, capsys):
    words = ["--dataset", "digits", "--lr", "0.5", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        read_config(Cifar100Config, words, recipe="cifar100")
    assert ended.value.code == 0
    again = read_config(Cifar100Config, ["-c", file(capsys.readouterr().out)], recipe="cifar100")
    assert again == Cifar100Config(dataset="digits", lr=0.5).resolved()


def test_dashes_in_an_option_are_taken_for_underscores():
    assert (
        read_config(Cifar100Config, ["--weight-decay=0.5", "--batch-size", "3"], recipe="cifar100").weight_decay == 0.5
    )


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
    run.write_text("config.yml", config_text("cifar100", config))
    assert read_config(Cifar100Config, ["-c", str(run.config)], recipe="cifar100") == config
    assert run.recipe() == yaml.safe_load(run.config.read_text(encoding="utf-8"))["recipe"] == "cifar100"


def test_resume_takes_the_runs_own_options_unless_others_are_given(tmp_path):
    run = RecipeRun.new(tmp_path, "cifar100", "x")
    run.write_text("config.yml", config_text("cifar100", Cifar100Config(dataset="digits", epochs=7).resolved()))
    config = read_config(Cifar100Config, ["--resume", str(run.folder), "--device", "cpu:2"], recipe="cifar100")
    assert (config.epochs, config.device, config.resume) == (7, "cpu:2", str(run.folder))


def test_a_repeated_key_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("lr: 0.1\nepochs: 3\nlr: 0.2\n")
    with pytest.raises(ConfigError, match="`lr` is set in line 1 and in line 3; remove one"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("learning-rate", "lr"), ("bs", "batch_size"), ("n_workers", "num_workers"), ("wd", "weight_decay")],
)
def test_names_of_other_programs_lead_to_the_option(name, meant):
    with pytest.raises(ConfigError, match=f"did you mean '--{meant}'"):
        read_config(Cifar100Config, [f"--{name}", "1"], recipe="cifar100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet18"], "model=resnet18 .*model=resnet10.*leave --model out.*-c .*config.yml"),
        (["--optimizer", "sgd"], "optimizer=sgd .*optimizer=adamw"),
        (["--epochs", "20"], "epochs=20 .*'onecycle'.*epochs=12.*--epochs 20"),
        (["--batch_size", "32"], "batch_size=32 .*batch_size=64"),
    ],
)
def test_an_option_that_does_not_fit_the_checkpoint_is_refused(tmp_path, options, message):
    run = RecipeRun(tmp_path)
    run.write_text("config.yml", config_text("cifar100", Cifar100Config(dataset="digits").resolved()))
    with pytest.raises(ConfigError, match=message):
        read_config(Cifar100Config, ["--resume", str(tmp_path), *options], recipe="cifar100")


@pytest.mark.parametrize(
    "options",
    [[], ["--model", "resnet10"], ["--device", "cpu"], ["--epochs", "10"], ["--epochs", "24", "--batch_size", "128"]],
)
def test_options_that_fit_the_checkpoint_can_change(tmp_path, options):
    RecipeRun(tmp_path).write_text("config.yml", config_text("cifar100", Cifar100Config(dataset="digits").resolved()))
    assert read_config(Cifar100Config, ["--resume", str(tmp_path), *options], recipe="cifar100").resume == str(tmp_path)
