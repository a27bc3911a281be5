"""Options of a recipe: a frozen dataclass, filled from a YAML file and the command line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeVar, cast

from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun, config_text
from duoka.utils.argument_parser import ArgumentParser, format_value
from duoka.utils.text import duoka_command
from duoka.utils.validation import check_field_types, check_number, invalid_option
from duoka.utils.yaml_file import read_yaml

C = TypeVar("C", bound="RunOptions")
ALIASES = {"bsize": "batch_size", "workers": "num_workers", "devices": "device"}
"""Second names of options, in files and on the command line."""
OTHER_NAMES = {
    "lr": ("learning_rate", "learningrate", "rate", "base_lr", "init_lr"),
    "batch_size": ("batchsize", "bs", "train_batch_size", "per_device_train_batch_size"),
    "batch_size_means": ("batch",),
    "num_workers": ("n_workers", "dataloader_num_workers"),
    "epochs": ("num_epochs", "n_epochs", "max_epochs", "num_train_epochs"),
    "eval_every_epochs": ("eval_step", "eval_every"),
    "optimizer": ("optim", "opt", "optimiser"),
    "scheduler": ("lr_scheduler", "schedule", "sched"),
    "weight_decay": ("wd", "l2", "decay"),
    "model": ("arch", "net", "network", "backbone"),
    "device": ("gpu", "gpus", "gpu_ids", "device_ids"),
    "root": ("data", "data_dir", "data_root", "data_path", "dir"),
    "out": ("output", "output_dir", "out_dir", "save_dir", "log_dir"),
    "precision": ("amp", "dtype", "fp16", "bf16", "mixed_precision"),
    "warmup_epochs": ("warmup",),
    "label_smoothing": ("smoothing",),
    "seed": ("random_seed", "manual_seed"),
    "resume": ("checkpoint", "ckpt", "resume_from"),
    "csv": ("file", "data", "data_path", "from"),
}
"""Names of options in other programs, by duoka's name; messages lead from them to it."""
HOW_IT_RUNS = (
    "device", "num_workers", "download", "out", "resume", "checkpoint_minutes", "checkpoint_every_steps",
    "keep_checkpoints", "hours", "on_nonfinite_loss", "find_nonfinite_layer",
    "micro_batch_size", "on_out_of_memory",
)  # fmt: skip
"""Options that do not change the result of a run."""


@dataclass(frozen=True)
class RunOptions:
    """Options of every recipe; each recipe adds its own, and may change a default.

    A docstring that begins with "Default:" completes the one of this class. ``None`` is an option whose default depends
    on others; ``resolved`` fills it in.
    """

    root: str = "./data"
    """Folder of the data."""
    download: bool = True
    """Download missing data into ``root``, if they can be downloaded."""

    device: str = "auto"
    """Devices to compute on: auto, all, 0, 0,1, 0-3, cuda:1, cpu, cpu:2, idle, idle:2."""
    batch_size: int | None = None
    """Samples in a batch; see ``batch_size_means``."""
    batch_size_means: Literal["per_device", "global"] | None = "global"
    """Whether ``batch_size`` is the batch of each device or of all devices together."""
    micro_batch_size: int | Literal["fit"] = 0
    """Samples that a device computes at once; a larger batch is computed in parts. fit finds the most that memory allows; 0
    computes whole batches."""
    on_out_of_memory: Literal["raise", "halve"] = "raise"
    """Whether training ends when memory does not suffice, or goes on with parts of half the size."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of forward and backward passes."""

    epochs: int | None = None
    """Passes over the training data."""
    lr: float | None = None
    """Learning rate."""
    weight_decay: float | None = None
    """Weight decay."""
    seed: int = 0
    """Seed of the first weights, of the order of the samples, and of random changes and dropout."""

    out: str = "runs"
    """Folder of all runs; the run's own folder is OUT/RECIPE/TIME-NAME."""
    name: str | None = None
    """Name of the run."""
    resume: str | None = None
    """Folder of a stopped run to continue, with its own options unless others are given; auto continues the last run in
    ``out`` with the same options, if there is one."""
    checkpoint_minutes: float = 10.0
    """Time between two checkpoints within an epoch; each epoch ends with one as well."""
    checkpoint_every_steps: int = 0
    """Steps between two checkpoints within an epoch; 0 counts minutes alone."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk: the last, and those before it in case it is damaged."""
    on_nonfinite_loss: Literal["stop", "warn"] = "stop"
    """Whether training stops when the loss becomes NaN or infinite."""
    find_nonfinite_layer: bool = False
    """Name the first layer with such an output; this slows every step."""
    hours: float = 0.0
    """Time limit from the start of the program: training stops in time, saves, and exits with status 124. 0 is none."""

    FIXED: ClassVar[tuple[str, ...]] = ()
    """Options that decide the model and the optimizer: a checkpoint fits no other value."""
    PLANNED: ClassVar[tuple[str, ...]] = ()
    """Values of ``scheduler`` that are planned for a number of steps."""
    DATA: ClassVar[tuple[str, ...]] = ()
    """Options that decide which data are read."""
    PATHS: ClassVar[tuple[str, ...]] = ("root",)
    """Options that name files; a run keeps them as absolute paths."""

    def __post_init__(self) -> None:
        check_field_types(self)
        self.check_numbers("batch_size", "epochs", "keep_checkpoints", least=1)
        self.check_numbers("lr", least=0, exclusive=True)
        self.check_numbers("weight_decay", least=0)
        self.check_numbers("seed", least=0, below=2**63)
        self.check_numbers("checkpoint_every_steps", "hours", least=0)
        if self.micro_batch_size != "fit":
            self.check_numbers("micro_batch_size", least=0)
        self.check_numbers("checkpoint_minutes", least=0, exclusive=True)
        if self.resume == "":
            raise invalid_option(
                "resume", "", "the folder of a stopped run, or auto", "is a variable of the shell empty?"
            )

    def check_numbers(self, *names: str, least: float, exclusive: bool = False, below: float = math.inf) -> None:
        """Raise ``ConfigError`` unless each of these options is ``None`` or a number in the range."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                check_number(name, value, least, exclusive=exclusive, below=below)

    def fill_in(self, chosen: Mapping[str, Any]) -> Self:
        """Return a copy that has the values ``chosen`` for options that are ``None``."""
        return dataclasses.replace(
            self, **{name: value for name, value in chosen.items() if getattr(self, name) is None}
        )

    def with_absolute_paths(self) -> Self:
        """Return a copy that means the same in any folder."""
        paths: dict[str, Any] = {name: value for name in self.PATHS if (value := getattr(self, name)) is not None}
        return dataclasses.replace(
            self, **{name: cast("Any", str(Path(value).absolute())) for name, value in paths.items()}
        )


def read_config(kind: type[C], arguments: Sequence[str], *, recipe: str) -> C:
    """Build the dataclass ``kind`` from ``[-c FILE.yml] [--resume RUN] [--key value] ...``.

    The command line wins over the file, and the file over the defaults. ``--resume RUN`` reads the run's own file.

    Raises ConfigError for an unknown key, a wrong type or value, or a file that cannot be read, and SystemExit after
    ``--help`` or ``--print_config``.
    """
    given = recipe_parser(cast("Any", kind), recipe).parse(arguments, defaults=False).as_dict()
    path, is_printed = given.pop("config", None), given.pop("print_config", False)
    is_auto = given.get("resume") == "auto"
    stopped = RecipeRun.at(given["resume"]) if given.get("resume") and not is_auto else None
    if path is None and stopped:
        path = str(stopped.config)
    options = {} if path is None else parse_options(kind, read_yaml(path, ALIASES), path, recipe=recipe)
    config = kind(**{**options, **given})
    if stopped:
        refuse_changes(stopped, recipe, config_of_run(kind, stopped), config)
    if is_auto:
        config = dataclasses.replace(config, resume=_last_run(recipe, config))
    if is_printed:
        sys.stdout.write(config_text(recipe, cast("Any", config).resolved()))
        raise SystemExit(0)
    return config


def _last_run(recipe: str, config: Any) -> str | None:
    """Return the folder of the last run with the options of ``config``, ``None`` if there is none."""
    runs = [RecipeRun(path.parent) for path in sorted((Path(config.out) / recipe).glob("*/config.yml"))]
    same = (run for run in reversed(runs) if has_options_of(run, config, without=HOW_IT_RUNS))
    return next((str(run.folder) for run in same), None)


def has_options_of(run: RecipeRun, config: Any, *, without: Sequence[str]) -> bool:
    """Return whether ``run`` was trained with the options ``config``, all but those of the names ``without``."""
    try:
        recorded = config_of_run(type(config), run).resolved().with_absolute_paths()
        wanted = config.resolved().with_absolute_paths()
    except ConfigError:
        return False
    names = (field.name for field in dataclasses.fields(wanted) if field.name not in without)
    return all(getattr(recorded, name) == getattr(wanted, name) for name in names)


def refuse_changes(run: RecipeRun, recipe: str, before: Any, now: Any) -> None:
    """Refuse to continue ``run`` with options that its checkpoint does not fit.

    Raises ConfigError with the option, both values, and the remedy.
    """
    before, now = before.resolved().with_absolute_paths(), now.resolved().with_absolute_paths()

    def refuse(key: str, reason: str) -> NoReturn:
        was, wanted = format_value(getattr(before, key)), format_value(getattr(now, key))
        new_run = duoka_command("train", recipe, "-c", run.config, f"--{key}", wanted)
        remedy = f"leave --{key} out to continue, or begin a new run with it: {new_run}"
        raise ConfigError(f"{key}={wanted} {reason} {key}={was}: {remedy}")

    for key in now.FIXED:
        if getattr(before, key) != getattr(now, key):
            refuse(key, "does not fit the checkpoint of this run, which has")
    if now.scheduler not in now.PLANNED or before.epochs * now.batch_size >= now.epochs * before.batch_size:
        return
    same_devices = (before.device, before.batch_size_means) == (now.device, now.batch_size_means)
    more_steps = f"needs more steps than this run's schedule {now.scheduler!r} was planned for with"
    if now.epochs > before.epochs:
        refuse("epochs", more_steps)
    if same_devices and now.batch_size < before.batch_size:
        refuse("batch_size", more_steps)


def parse_options(kind: Any, options: Mapping[str, Any], where: str | Path, *, recipe: str) -> dict[str, Any]:
    """Return ``options``, which are written in ``where``, under their own names and with the types of their fields."""
    named = options.get("recipe", recipe)
    if named != recipe:
        raise ConfigError(f"{where} is for the recipe {named!r}: use `{duoka_command('train', named, '-c', where)}`")
    own = {key: value for key, value in options.items() if key != "recipe"}
    return recipe_parser(kind, recipe).parse_file(own, where)


def config_of_run(kind: type[C], run: RecipeRun) -> C:
    """Return the options that ``run`` was trained with."""
    return kind(**parse_options(kind, read_yaml(run.config, ALIASES), run.config, recipe=run.recipe()))


@functools.cache
def recipe_parser(kind: Any, recipe: str) -> ArgumentParser:
    """Return the parser of ``duoka train RECIPE``."""
    command = f"duoka train {recipe}"
    parser = ArgumentParser(
        command,
        inspect.getdoc(kind) or "",
        other_names=OTHER_NAMES,
        usage=f"{command} [-c FILE.yml] [--KEY VALUE] ...\n       {command} --resume RUN",
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE.yml", help="YAML file of the options below, one `key: value` a line"
    )
    parser.add_argument("--print_config", action="store_true", help="print all options with their values, and exit")
    add_options(parser, kind, recipe)
    return parser


def add_options(parser: ArgumentParser, kind: type[Any], recipe: str, *, without: Sequence[str] = ()) -> None:
    """Add the options of a recipe's dataclass ``kind`` to a parser, in two groups."""
    shared = [field.name for field in dataclasses.fields(RunOptions)]
    own = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
    parser.add_fields(kind, f"options of {recipe}", [name for name in own if name not in without], ALIASES)
    parser.add_fields(kind, "options of every run", [name for name in shared if name not in without], ALIASES)
