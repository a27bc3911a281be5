"""Options of the image-classification recipes ``cifar100`` and ``tiny-imagenet``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from duoka.recipes.common.config import RunOptions
from duoka.utils.validation import invalid_option

DEFAULTS_BY_DATASET: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "resnet10", "width": 0.25, "batch_size": 64, "batch_size_means": "global", "epochs": 12, "lr": 0.01,
        "num_workers": 0,
    },
    "others": {"model": "resnet18", "width": 1.0, "batch_size": 256, "batch_size_means": "per_device", "epochs": 50},
}  # fmt: skip
DEFAULTS_BY_OPTIMIZER: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4},
    "adam": {"lr": 0.001, "weight_decay": 0.0},
    "adamw": {"lr": 0.001, "weight_decay": 0.05},
    "adagrad": {"lr": 0.01, "weight_decay": 0.0},
    "rmsprop": {"lr": 0.001, "weight_decay": 0.0},
}


@dataclass(frozen=True)
class ImageOptions(RunOptions):
    """Options of both image recipes."""

    num_workers: int | None = None
    """Processes that load data, for all devices of a machine together, at most as many as its cores allow. Default: 0, which
    keeps the images on the device and changes whole batches there."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How ``lr`` grows with the number of devices when the batch grows with it."""
    lr: float | None = None
    """Learning rate for the batch of one device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_numbers("num_workers", least=0)
        self.check_numbers("image_size", least=8)


@dataclass(frozen=True)
class Cifar100Config(ImageOptions):
    """Train a ResNet for small images.

    The test part is evaluated after every epoch and never chooses anything: the result is the last epoch's.
    """

    dataset: Literal["cifar100", "cifar10", "folder", "digits"] = "cifar100"
    """Data set; digits needs no download, folder is a folder of images with one folder a class in ``root``."""
    root: str = "./data"
    """Folder of the CIFAR archive or its files, or of the class folders."""
    download: bool = True
    """Download CIFAR (about 170 MB) if ``root`` has none."""
    verify: bool = True
    """Check that CIFAR's files have the official checksums; false for other data in the same format."""
    image_size: int = 32
    """Side, in pixels, that the images of a folder are scaled and cropped to."""
    test_share: float = 0.2
    """Share of each class that is kept for testing if the data have no test part: 0 to 1."""
    split_seed: int = 0
    """Seed that chooses these images, apart from ``seed``: runs with other seeds have the same test images."""

    model: Literal["resnet10", "resnet18", "resnet50"] | None = None
    """Network. Default: resnet18; resnet10 for digits."""
    width: float | None = None
    """Factor on the numbers of channels, 64 to 512. Default: 1; 0.25 for digits."""

    batch_size: int | None = None
    """Default: 256; 64 for digits."""
    batch_size_means: Literal["per_device", "global"] | None = None
    """Default: per_device; global for digits."""
    epochs: int | None = None
    """Default: 50; 12 for digits."""
    optimizer: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop"] = "adamw"
    """Optimizer."""
    lr: float | None = None
    """Default: 0.001; 0.1 for sgd, 0.01 for adagrad, and 0.01 for digits with adam or adamw."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises before the schedule begins."""
    scheduler: Literal["multistep", "cosine", "onecycle", "none"] = "onecycle"
    """Learning-rate schedule: a tenth after half and three quarters, a cosine to 0, up and down, or constant."""
    weight_decay: float | None = None
    """Default: 0.05 for adamw, 0.0005 for sgd, else 0."""
    momentum: float = 0.9
    """Momentum of sgd; the other optimizers ignore it."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes: 0 to 1."""
    name: str | None = None
    """Default: DATASET-MODEL."""

    FIXED = ("dataset", "model", "width", "optimizer", "scheduler")
    PLANNED = ("multistep", "cosine", "onecycle")
    DATA = ("dataset", "root", "download", "verify", "image_size", "test_share", "split_seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_numbers("split_seed", "warmup_epochs", least=0)
        self.check_numbers("width", least=0, exclusive=True, below=1000)
        self.check_numbers("momentum", "label_smoothing", least=0, below=1)
        self.check_numbers("test_share", least=0, exclusive=True, below=1)

    def resolved(self) -> Cifar100Config:
        """Return a copy with a value for every option."""
        by_dataset = DEFAULTS_BY_DATASET.get(self.dataset, DEFAULTS_BY_DATASET["others"])
        if self.optimizer not in ("adam", "adamw"):
            by_dataset = {option: value for option, value in by_dataset.items() if option != "lr"}
        chosen = {**DEFAULTS_BY_OPTIMIZER[self.optimizer], **by_dataset}
        return self.fill_in({**chosen, "name": f"{self.dataset}-{self.model or chosen['model']}"})


@dataclass(frozen=True)
class TinyImageNetConfig(ImageOptions):
    """Train one of five networks for small images, as one experiment of a suite.

    The validation part is evaluated after every epoch, without any random change, and never chooses anything.
    """

    dataset: Literal["tiny-imagenet", "cifar10", "cifar100"] = "tiny-imagenet"
    """Data set."""
    root: str = "./data"
    """Folder of the official folder or archive, or that folder itself."""
    download: bool = True
    """Download the data (250 MB; CIFAR 170 MB) if ``root`` has none."""
    image_size: int | None = None
    """Side, in pixels, that images are scaled to: a multiple of 8. Default: 64; 32 for CIFAR, which has no other."""
    limit: int | None = None
    """Largest number of images of each class in training and test, for a quick look. Default: all."""

    model: Literal["baseline", "residual", "deeper_wider", "se_attention", "best"] = "baseline"
    """Network; with 200 classes they have 13.6, 9.9, 19.4, 13.7 and 20.1 million parameters."""
    augmentation: Literal["none", "basic", "mixup", "cutmix"] = "basic"
    """Random changes in training: none; resized crop, flip and colors; or these and torchvision's MixUp or CutMix. With
    ``num_workers``, each device's part of a batch is mixed by itself."""

    batch_size: int = 64
    batch_size_means: Literal["per_device", "global"] = "per_device"
    epochs: int = 50
    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"
    """Optimizer."""
    lr: float = 3e-4
    scheduler: Literal["cosine", "none"] | None = None
    """Learning-rate schedule: a cosine to 0, or constant. Default: none for adam, cosine for the others."""
    weight_decay: float | None = None
    """Default: 0.000001 for the model best; else 0.01 for adamw, and 0 for the other optimizers."""
    name: str | None = None
    """Default: MODEL-AUGMENTATION-OPTIMIZER."""

    FIXED = ("dataset", "image_size", "model", "optimizer", "scheduler")
    PLANNED = ("cosine",)
    DATA = ("dataset", "root", "download", "image_size", "limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_numbers("limit", least=1)
        if self.image_size is None:
            return
        if self.dataset != "tiny-imagenet" and self.image_size != 32:
            raise invalid_option("image_size", self.image_size, f"32, the size of {self.dataset}'s images")
        if self.image_size % 8:
            raise invalid_option("image_size", self.image_size, "a multiple of 8")

    def resolved(self) -> TinyImageNetConfig:
        """Return a copy with a value for every option."""
        return self.fill_in(
            {
                "scheduler": "none" if self.optimizer == "adam" else "cosine",
                "weight_decay": 1e-6 if self.model == "best" else 0.01 if self.optimizer == "adamw" else 0.0,
                "image_size": 64 if self.dataset == "tiny-imagenet" else 32,
                "name": f"{self.model}-{self.augmentation}-{self.optimizer}",
            }
        )
