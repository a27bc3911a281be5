"""Parsers to fuzz: each with valid inputs, a way to change them, and the call that reads them."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import nbformat
import numpy as np
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import duoka
from duoka import checkpoint
from duoka.devices.inventory import Inventory
from duoka.devices.selection import select
from duoka.devices.spec import parse
from duoka.recipes.common.config import config_of_run, read_config
from duoka.recipes.common.recipe_run import RecipeRun, config_text
from duoka.recipes.common.registry import find_recipe
from duoka.recipes.datasets import cifar, csv_table, synthetic_movielens, time_series
from duoka.recipes.datasets.images import read_image
from duoka.recipes.datasets.movielens import ML1MDataset
from duoka.recipes.experiments import read_experiment
from duoka.recipes.image_classification.config import Cifar100Config
from duoka.recipes.image_classification.presets import CIFAR100
from duoka.recipes.image_classification.results import DatasetMetadata
from duoka.recipes.recommendation import RecommendationConfig
from duoka.recipes.recommendation.training import build_model as build_recommender
from duoka.recipes.recommendation.training import load_texts
from duoka.recipes.time_series import TimeSeriesConfig, forecasting, plots, regression
from duoka.script_runner import notebook
from duoka.trainer import Trainer
from fuzz.mutations import NASTY_TEXTS, mutate_bytes, mutate_text, mutate_tree, nasty_value


class FuzzTarget(ABC):
    """A parser; ``feed`` changes a valid input and reads it, which may raise ``DuokaError`` and nothing else."""

    name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def feed(self, random_: random.Random) -> None:
        """Read a changed input."""


class DeviceTarget(FuzzTarget):
    name = "devices"
    VALID = ("auto", "all", "0", "0,1", "0-3", "cuda:1", "cpu", "cpu:4", "idle", "idle:2", "mps", "cuda:0,cuda:1")

    def feed(self, random_: random.Random) -> None:
        values: list[Any] = [
            mutate_bytes(random_.choice(self.VALID).encode(), random_).decode(errors="replace"),
            random_.choice(NASTY_TEXTS) + random_.choice(self.VALID),
            [nasty_value(random_), random_.choice(self.VALID)],
            nasty_value(random_),
            range(random_.choice([3, 10**9])),
            " " + "9" * 2000,
        ]
        self.read(random_.choice(values))

    @staticmethod
    def read(spec: Any) -> None:
        select(parse(spec), Inventory(), lambda: None)


class FileTarget(FuzzTarget):
    """A parser of one file, whose changed bytes are written before each call."""

    suffix = ""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.valid = self.make()

    @abstractmethod
    def make(self) -> list[bytes]:
        """Return valid contents."""

    @abstractmethod
    def read(self, path: Path) -> None:
        """Call the parser."""

    def change(self, content: bytes, random_: random.Random) -> bytes:
        return mutate_text(content, random_)

    def feed(self, random_: random.Random) -> None:
        path = self.folder / f"input{self.suffix}"
        path.write_bytes(self.change(random_.choice(self.valid), random_))
        self.read(path)


class ConfigTarget(FileTarget):
    name, suffix = "config", ".yml"

    def make(self) -> list[bytes]:
        configs = ("cifar100", Cifar100Config(dataset="digits")), ("informer", TimeSeriesConfig())
        return [config_text(name, config.resolved()).encode() for name, config in configs]

    def change(self, content: bytes, random_: random.Random) -> bytes:
        if random_.random() < 0.5:
            return mutate_text(content, random_)
        tree = mutate_tree(yaml.safe_load(content), random_)
        return yaml.dump(tree, sort_keys=False).encode(errors="surrogatepass")

    def read(self, path: Path) -> None:
        for name in ("cifar100", "informer"):
            kind = find_recipe(name).Config
            try:
                read_config(kind, ["-c", str(path)], recipe=name).resolved()
            except duoka.errors.ConfigError:
                if name == "informer":
                    raise


class OptionTarget(FuzzTarget):
    name = "options"

    def feed(self, random_: random.Random) -> None:
        keys = ("model", "seed", "lr", "epochs", "device", "name", "verify", "width", "csv")
        words = [f"--{random_.choice(keys)}", mutate_bytes(b"cpu:2", random_).decode(errors="replace")]
        if random_.random() < 0.7:
            words[1] = random_.choice(NASTY_TEXTS)
        read_config(Cifar100Config, words, recipe="cifar100").resolved()


class CompareTarget(ConfigTarget):
    name = "compare"

    def make(self) -> list[bytes]:
        document = {
            "recipe": "cifar100", "baseline": "a", "seeds": [0, 1], "base": {"epochs": 1, "dataset": "digits"},
            "variants": {"a": {}, "b": {"lr": 0.1}, "c": {"model": "resnet18"}}, "metric": "accuracy", "better": "higher",
        }  # fmt: skip
        return [yaml.safe_dump(document, sort_keys=False).encode()]

    def read(self, path: Path) -> None:
        read_experiment(str(path), out=str(self.folder / "runs"))


def make_csv() -> tuple[bytes, bytes]:
    """Return a series with dates, and a table."""
    rows = np.random.default_rng(0).normal(size=(40, 3)).round(3)
    dates = np.arange("2024-01-01", "2024-01-03", dtype="datetime64[h]")[:40]
    body = [",".join([str(date).replace("T", " "), *map(str, row)]) for date, row in zip(dates, rows, strict=True)]
    table = ["a;b;c", *(";".join(map(str, row)) for row in rows)]
    return "\n".join(["date,x,y,z", *body]).encode(), "\n".join(table).encode()


class CsvTarget(FileTarget):
    name, suffix = "csv", ".csv"

    def make(self) -> list[bytes]:
        return list(make_csv())

    def read(self, path: Path) -> None:
        fill = path.stat().st_size % 2 == 0
        table = csv_table.read(path)
        if "date" in table.columns:
            indices = [index for index, name in enumerate(table.columns) if name != "date"]
            series = time_series.series_from_table(table, "date", indices, fill=fill)
            time_series.SeriesSplit.from_series(series, "ratio", 4, 2, [0])
            series.season_length()
            series.future_dates(3)
        else:
            config = TimeSeriesConfig(task="regress", csv=str(path), fill=fill, targets="1").resolved()
            regression.load(config)


class RatingsTarget(FuzzTarget):
    name = "ratings"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        example = synthetic_movielens.make(users=12, films=10, ratings=60, seed=0)
        synthetic_movielens.write(folder / "valid", example, 0)

    def feed(self, random_: random.Random) -> None:
        changed = self.folder / "changed"
        shutil.copytree(self.folder / "valid", changed, dirs_exist_ok=True)
        path = changed / random_.choice(["users.dat", "movies.dat", "ratings.dat"])
        path.write_bytes(mutate_text(path.read_bytes(), random_))
        ML1MDataset(changed)


class ImageTarget(FileTarget):
    name, suffix = "images", ".png"

    def make(self) -> list[bytes]:
        pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
        contents = []
        kinds = (
            ("PNG", "RGBA"),
            ("PNG", "P"),
            ("PNG", "I;16"),
            ("JPEG", "RGB"),
            ("WEBP", "RGB"),
            ("BMP", "RGB"),
            ("GIF", "P"),
        )
        for kind, mode in kinds:
            image = Image.fromarray(pixels).convert("RGB" if mode != "RGBA" else mode)
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
            exif = Image.Exif()
            exif[0x0112] = 6
            buffer = io.BytesIO()
            image.save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
            contents.append(buffer.getvalue())
        return contents

    def change(self, content: bytes, random_: random.Random) -> bytes:
        return mutate_bytes(content, random_)

    def read(self, path: Path) -> None:
        for shape in ((3, 16, 16), (1, 8, 8)):
            read_image(path, shape)


class CifarTarget(FuzzTarget):
    name = "cifar"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        rows = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
        batch = {b"data": rows, b"fine_labels": [0, 1, 2, 1, 0], b"batch_label": b"a batch"}
        self.trees = {"train": batch, "test": batch, "meta": {b"fine_label_names": [b"a", b"b", b"c"]}}
        self.source = cifar.CifarArchive(
            "http://127.0.0.1:9/cifar-100-python.tar.gz", None, "", "cifar100", "cifar-100-python", (("train", ""),),
            (("test", ""),), ("meta", ""), "fine_label_names", "fine_labels",
        )  # fmt: skip

    def feed(self, random_: random.Random) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        unpacked = self.folder / self.source.folder
        unpacked.mkdir(parents=True)
        changed = random_.choice(list(self.trees))
        for name, tree in self.trees.items():
            value = mutate_tree(tree, random_) if name == changed and random_.random() < 0.5 else tree
            content = pickle.dumps(value, protocol=random_.choice([2, 4, 5]))
            (unpacked / name).write_bytes(
                mutate_bytes(content, random_) if name == changed and value is tree else content
            )
        if random_.random() < 0.3:
            archive = self.folder / self.source.file_name
            with tarfile.open(archive, "w:gz") as tar:
                tar.add(unpacked, arcname=unpacked.name)
            shutil.rmtree(unpacked)
            archive.write_bytes(mutate_bytes(archive.read_bytes(), random_))
        cifar.load(self.source, self.folder, verify=False)


class CheckpointTarget(FileTarget):
    name, suffix = "checkpoints", ".pt"

    def make(self) -> list[bytes]:
        self.state = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).state_dict()
        contents = []
        for suffix in (".pt", ".safetensors"):
            checkpoint.save(dict(self.state), self.folder / f"a{suffix}")
            contents.append((self.folder / f"a{suffix}").read_bytes())
        for zipped in (True, False):
            torch.save(
                {"state_dict": dict(self.state), "epoch": 3}, self.folder / "b", _use_new_zipfile_serialization=zipped
            )
            contents.append((self.folder / "b").read_bytes())
        return contents

    def change(self, content: bytes, random_: random.Random) -> bytes:
        if random_.random() < 0.4:
            buffer = io.BytesIO()
            torch.save(mutate_tree(dict(self.state), random_), buffer)
            return buffer.getvalue()
        return mutate_bytes(content, random_)

    def read(self, path: Path) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        as_safetensors = path.with_suffix(".safetensors")
        as_safetensors.write_bytes(path.read_bytes())
        for one in (path, as_safetensors):
            errors = []
            for read in (lambda one=one: checkpoint.load(one), lambda one=one: checkpoint.load(one, into=model)):
                try:
                    read()
                except duoka.errors.DuokaError as error:
                    errors.append(error)
        if errors:
            raise errors[0]


class TrainingTarget(FuzzTarget):
    name = "training"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        features = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        self.data = DataLoader(TensorDataset(features, features[:, :2]), batch_size=4, shuffle=True)
        self.trainer(1, False).fit(save_model=False)
        self.path = folder / "run" / "checkpoint" / "last.pt"
        self.state = checkpoint.load_training(self.path)

    def trainer(self, epochs: int, resume: Any, **options: Any) -> Trainer:
        torch.manual_seed(0)
        return Trainer(
            torch.nn.Linear(4, 2), self.data, self.data, loss=torch.nn.functional.mse_loss, device="cpu", epochs=epochs,
            lr=0.01, scheduler="multistep", scheduler_options={"milestones": [1, 2]}, monitor="loss", verbose=False,
            tensorboard=False,
            resume=resume, **({"out_dir": self.folder / "run"} | options),
        )  # fmt: skip

    def feed(self, random_: random.Random) -> None:
        path = self.folder / "changed.pt"
        if random_.random() < 0.8:
            changed = mutate_tree(self.state, random_)
            torch.save({"format": "duoka.training", "version": 1, "state": changed}, path)
        else:
            path.write_bytes(mutate_bytes(self.path.read_bytes(), random_))
        self.read(path)

    def read(self, path: Path) -> None:
        with mock.patch("duoka.trainer.run_dir.draw_curves"):  # most of the time
            self.trainer(2, str(path), out_dir=self.folder / "next").fit(save_model=False)


class RunFolderTarget(FuzzTarget):
    """A finished run with one changed file, read by ``predict`` and ``eval``."""

    files: ClassVar[tuple[str, ...]] = ("config.yml", "results.json", "model.safetensors")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.run = RecipeRun(folder / "valid")
        self.make()

    @abstractmethod
    def make(self) -> None:
        """Write the valid run."""

    @abstractmethod
    def use(self, recipe: Any, run: RecipeRun, config: Any) -> None:
        """Predict with the run."""

    def feed(self, random_: random.Random) -> None:
        changed = self.folder / "changed"
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(self.run.folder, changed)
        path = changed / random_.choice(self.files)
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            path.write_bytes(mutate_bytes(content, random_))
        elif random_.random() < 0.4:
            path.write_bytes(mutate_text(content, random_))
        else:
            load, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.dump)
            path.write_bytes(dump(mutate_tree(load(content), random_)).encode(errors="surrogatepass"))
        self.read(changed)

    def read(self, folder: Path) -> None:
        run = RecipeRun.at(folder)
        recipe = find_recipe(run.recipe())
        self.use(recipe, run, config_of_run(recipe.Config, run))


class ImageRunTarget(RunFolderTarget):
    name = "image runs"

    def make(self) -> None:
        config = Cifar100Config(dataset="digits", device="cpu", width=0.125).resolved()
        self.run.write_text("config.yml", config_text("cifar100", config))
        images = {"classes": list("0123456789"), "shape": [1, 8, 8], "mean": [0.3], "std": [0.4]}
        results = {
            "recipe": "cifar100",
            "test_loss": 0.1,
            "parameters": 3,
            "class_accuracy": {"0": 1.0},
            "images": images,
        }
        self.run.write_results(results)
        checkpoint.save(CIFAR100.build_model(config, DatasetMetadata.of_run(self.run)), self.run.model)
        Image.new("L", (8, 8)).save(self.folder / "image.png")

    def use(self, recipe: Any, run: RecipeRun, config: Any) -> None:
        if hasattr(recipe, "predict_table"):
            recipe.predict_table(run, config, str(self.folder / "image.png"))
        recipe.predict(run, config, [str(self.folder / "image.png")])


class TableRunTarget(RunFolderTarget):
    name = "table runs"
    task, options = "regress", {"targets": "c", "width": 8, "heads": 2, "hidden": 8, "encoder_layers": 1}
    content = 1

    def make(self) -> None:
        self.csv = self.folder / "table.csv"
        self.csv.write_bytes(make_csv()[self.content])
        config = TimeSeriesConfig(task=self.task, csv=str(self.csv), device="cpu", **self.options).resolved()
        module: Any = {"regress": regression, "forecast": forecasting}[self.task]
        data = module.load(config)
        self.run.write_text("config.yml", config_text("informer", config))
        extra = {"windows": data.num_windows} if self.task == "forecast" else {}
        self.run.write_results({"recipe": "informer", module.DESCRIPTION: data.description, **extra})
        checkpoint.save(module.build_model(config, data.description), self.run.model)

    def use(self, recipe: Any, run: RecipeRun, config: Any) -> None:
        if not hasattr(recipe, "predict_table"):
            recipe.predict(run, config, [str(self.csv)])
        else:
            with mock.patch.multiple(plots, plot_future=mock.DEFAULT, plot_lines=mock.DEFAULT):  # most of the time
                recipe.predict_table(run, config, str(self.csv))


class SeriesRunTarget(TableRunTarget):
    name = "series runs"
    task, options = "forecast", {
        "seq_len": 8, "label_len": 4, "pred_len": 2, "split": "ratio", "width": 8, "heads": 2, "hidden": 8,
    }  # fmt: skip
    content = 0


class FilmRunTarget(RunFolderTarget):
    name = "film runs"
    files = ("config.yml", "results.json", "model.safetensors", "data.json")

    def make(self) -> None:
        root = self.folder / "data"
        synthetic_movielens.write(root, synthetic_movielens.make(users=12, films=10, ratings=60, seed=0), 0)
        config = RecommendationConfig(
            root=str(root), model="ncf", embedding_size=8, heads=2, device="cpu", pretrained="none"
        )
        config = config.resolved()
        data = ML1MDataset(root)
        self.run.write_text("config.yml", config_text("movielens", config))
        self.run.write_results({"recipe": "movielens", "stage": 1})
        self.run.write_results(data.metadata(), "data.json")
        checkpoint.save(build_recommender(config, data, load_texts(config, data), 1), self.run.model)

    def use(self, recipe: Any, run: RecipeRun, config: Any) -> None:
        if hasattr(recipe, "recommend"):
            recipe.recommend(run, config, 1, 3)
        else:
            recipe.predict(run, config, [])


class NotebookTarget(FileTarget):
    name, suffix = "notebooks", ".ipynb"

    def make(self) -> list[bytes]:
        cells = [nbformat.v4.new_code_cell("1 + 1", id="a"), nbformat.v4.new_markdown_cell("# x", id="b")]
        kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
        return [nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel)).encode()]

    def change(self, content: bytes, random_: random.Random) -> bytes:
        if random_.random() < 0.4:
            return mutate_text(content, random_)
        return json.dumps(mutate_tree(json.loads(content), random_)).encode()

    def read(self, path: Path) -> None:
        notebook._read(path, nbformat)


TARGETS: tuple[Callable[[Path], FuzzTarget], ...] = (
    DeviceTarget, ConfigTarget, OptionTarget, CompareTarget, CsvTarget, RatingsTarget, ImageTarget, CifarTarget,
    CheckpointTarget, TrainingTarget, ImageRunTarget, TableRunTarget, SeriesRunTarget, FilmRunTarget, NotebookTarget,
)  # fmt: skip
