"""All that only a GPU can show, in at most nine minutes: facts, tests, faults, overhead, two ranks on one card, recipes.

Each part is a process with a time limit of its own, and its results are written as soon as it has them: a run that is cut
off keeps what it had. The script needs no network and works with the Python that starts it::

    make gpu
    NCCL_MULTI_RANK_GPU_ENABLE=1 python benchmarks/gpu.py [--only facts,tests] [--scale 1.0] [--out DIR]
    python benchmarks/gpu.py --rehearse  # on CPU workers and the stand-in accelerator, small

It prints a table and writes ``benchmarks/results/gpu-CARD-DATE.json``. ``python benchmarks/gpu_page.py`` writes the table
into ``docs/performance.md``. Ratios are medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import gpu_faults  # noqa: E402 - from this folder

SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
MINUTES = 9.0
Results = dict[str, Any]


class Scene(NamedTuple):
    """Where the parts run: on a GPU, or in a rehearsal on CPU workers with small sizes."""

    is_rehearsal: bool
    scale: float
    """Factor on the time of each measurement."""
    write: Callable[[Results], None]
    """Keeps results so far."""

    @property
    def kind(self) -> str:
        return "cpu" if self.is_rehearsal else "cuda"

    def devices(self, count: int) -> str:
        if self.is_rehearsal:
            return "cpu" if count == 1 else f"cpu:{count}"
        import torch

        return ",".join(str(rank % torch.cuda.device_count()) for rank in range(count))

    def seconds(self, seconds: float) -> float:
        return 0.2 if self.is_rehearsal else seconds * self.scale

    def size(self, on_gpu: int, in_rehearsal: int) -> int:
        return in_rehearsal if self.is_rehearsal else on_gpu

    def synchronize(self) -> None:
        if not self.is_rehearsal:
            import torch

            torch.cuda.synchronize()


# The parts


def facts(scene: Scene) -> Results:
    """Card, versions, clocks, and the rates of a copy and of matrix products."""
    import platform

    import torch

    from duoka.devices import nccl

    version = nccl.loaded_version()
    found: Results = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nccl": None if version is None else ".".join(map(str, version)),
        "nccl of torch's build": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "ranks may share a GPU": nccl.ranks_may_share_a_gpu(),
        "cores": os.cpu_count(),
        "two devices": scene.devices(2),
    }
    if not scene.is_rehearsal:
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory, GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, **smi()}
    scene.write(found)
    found["start of Python with torch and the device, s"] = start_seconds(scene)
    device = torch.device(scene.kind)
    block = torch.randn(scene.size(1 << 29, 1 << 20), device=device)
    target = torch.empty_like(block)
    seconds = timed(scene, functools.partial(target.copy_, block))
    found["copy, TB/s, read and written"] = 2 * block.numel() * 4 / seconds / 1e12
    del block, target
    n = scene.size(8192, 256)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        found[f"matrix product {name}, TFLOP/s"] = 2 * n**3 / timed(scene, lambda a=a, b=b: a @ b) / 1e12
    if not scene.is_rehearsal:
        found["clocks after the matrix products"] = smi()
    scene.write(found)
    found["all-reduce of two ranks, torch alone"] = plain_all_reduce(scene)
    return found


def start_seconds(scene: Scene) -> float:
    """Return how long a new process takes until it can use the device: the least of two."""
    code = f"import torch; torch.ones(1, device={scene.kind!r}).sum().item()"
    times = []
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - began)
    return min(times)


def gpu_uuid() -> str:
    """Return NVML's name of torch's first device, which need not be NVML's first."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def smi() -> Results:
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", gpu_uuid()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(query.split(","), done.stdout.strip().split(", "), strict=False))


ALL_REDUCE = """
import sys, torch, torch.distributed as dist
kind, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
device = torch.device(kind) if kind == "cpu" else torch.device("cuda", rank % torch.cuda.device_count())
dist.init_process_group("gloo" if kind == "cpu" else "nccl", init_method="file://" + store, rank=rank, world_size=2)
x = torch.full((1 << 20,), rank + 1.0, device=device)
for _ in range(5):
    x.fill_(rank + 1.0)
    dist.all_reduce(x)
assert x.eq(3).all().item()
if kind == "cuda":
    import time
    for count in (1 << 10, 1 << 20, 1 << 24):
        x = torch.ones(count, device=device)
        dist.all_reduce(x); torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            dist.all_reduce(x)
        torch.cuda.synchronize()
        if not rank:
            print(f"{4 * count / 2**20:.3f} MiB: {(time.perf_counter() - began) * 100:.2f} ms")
dist.destroy_process_group()
"""


def plain_all_reduce(scene: Scene) -> Any:
    """Sum over two ranks without duoka: if this fails, nothing of duoka is to blame."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, "-c", ALL_REDUCE, scene.kind, str(rank), f"{folder}/store"] for rank in (0, 1)]
        environment = {**os.environ, "NCCL_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN"}
        ranks = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in commands
        ]
        texts = []
        for rank in ranks:
            try:
                texts.append(rank.communicate(timeout=20)[0])
            except subprocess.TimeoutExpired:
                rank.kill()
                texts.append(rank.communicate()[0] + "\nno result after 20 s")
    if any(rank.returncode for rank in ranks):
        return {"failed": [text[-1500:] for text in texts]}
    return texts[0].splitlines() or "passed"


def tests(scene: Scene) -> Results:
    """``tests/gpu`` over gloo and, where ranks may share the GPU, over NCCL; all run at the same time."""
    found: Results = {}
    if scene.is_rehearsal:
        runs = {"stand-in": ([sys.executable, "tests/standin/run.py"], {})}
    else:
        runs = {"gloo": ([sys.executable], {SHARING: "0"}), "NCCL": ([sys.executable], {SHARING: "1"})}
    plugins = ["-p", "pytest_timeout"]
    several = []
    if not scene.is_rehearsal and importlib.util.find_spec("xdist"):
        plugins, several = [*plugins, "-p", "xdist.plugin"], ["-n", "4", "--dist", "worksteal"]
    selected = [] if scene.is_rehearsal else ["-m", "extended or not extended"]
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for name, (python, environment) in runs.items():
            report = ["--junitxml", f"{folder}/{name}.xml", "--timeout", "100"]
            command = [
                *python,
                "-m",
                "pytest",
                "-v",
                "tests/gpu",
                *plugins,
                "-p",
                "no:cacheprovider",
                *selected,
                *several,
            ]
            with open(f"{folder}/{name}.log", "w") as log:
                processes[name] = subprocess.Popen(
                    [*command, *report],
                    cwd=ROOT,
                    env={**os.environ, **environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        began = time.monotonic()
        waiting = dict(processes)
        while waiting:
            for name, process in list(waiting.items()):
                lines = Path(folder, f"{name}.log").read_text(errors="replace").splitlines()
                if process.poll() is not None:
                    del waiting[name]
                    found[name] = {**test_report(Path(folder, f"{name}.xml"), lines), "status": process.returncode}
                    found[name]["seconds"] = round(time.monotonic() - began, 1)
                else:
                    found[name] = {"unfinished": summary_of(lines)}
            scene.write(found)
            time.sleep(1)
    return found


def summary_of(lines: Sequence[str]) -> Results:
    """Return what the output of an unfinished run tells: the number of results of each kind, and those that failed."""
    kinds = [match[1] for line in lines if (match := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line))]
    failed = [line for line in lines if re.search(r"\b(FAILED|ERROR)\b", line)]
    return {**{kind: kinds.count(kind) for kind in sorted(set(kinds))}, "failed": failed[:20]}


def test_report(path: Path, lines: Sequence[str]) -> Results:
    """Return the numbers of tests and the tracebacks of those that failed."""
    if not path.is_file():
        return {"no report": lines[-30:]}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, slow = {}, {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        trouble = [child for child in case if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in case)
        counts["failed" if trouble else "skipped" if skipped else "passed"] += 1
        if trouble:
            failures[case.attrib["name"]] = (trouble[0].text or "")[-3500:]
        slow[case.attrib["name"]] = float(case.attrib["time"])
    slowest = sorted(slow.items(), key=lambda item: -item[1])[:5]
    return {**counts, "failures": failures, "slowest, s": dict(slowest)}


def overhead(scene: Scene) -> Results:
    """``duoka.DataParallel`` on one device against the bare model: the same steps in turn, in one process."""
    import torch
    import torchvision
    from torch import nn

    import duoka

    device = torch.device(scene.kind)
    found: Results = {}

    def resnet(size: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        batch = scene.size(256, 2)
        images = torch.randn(batch, 3, size, size, device=device)
        model = torchvision.models.resnet18(num_classes=100).to(device)
        return model, (images, torch.randint(100, (batch,), device=device))

    def gpt2() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        from transformers import GPT2Config, GPT2LMHeadModel

        small = {"n_layer": 2, "n_embd": 64, "n_head": 2} if scene.is_rehearsal else {}
        model = GPT2LMHeadModel(GPT2Config(use_cache=False, **small)).to(device)
        tokens = torch.randint(50_000, (scene.size(8, 2), scene.size(1024, 32)), device=device)
        return LanguageModel(model), (tokens,)

    class LanguageModel(nn.Module):
        """Returns the logits."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens).logits

    cases: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
        "ResNet-18, 64x64, batch 256": lambda: resnet(scene.size(64, 16)),
        "ResNet-18, 224x224, batch 256": lambda: resnet(scene.size(224, 32)),
        "GPT-2 small, 8 texts of 1,024 tokens": gpt2,
    }
    for name, build in cases.items():
        model, given = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        wrapped = duoka.DataParallel(model, devices=scene.devices(1))
        for precision in ("fp32", "bf16"):

            def step(
                net: nn.Module, given: Any = given, optimizer: Any = optimizer, precision: str = precision
            ) -> None:
                optimizer.zero_grad()
                with torch.autocast(scene.kind, torch.bfloat16, enabled=precision == "bf16" and not scene.is_rehearsal):
                    output = net(given[0])
                    target = given[1] if len(given) > 1 else given[0].flatten()
                    loss = nn.functional.cross_entropy(output.flatten(0, -2), target)
                loss.backward()
                optimizer.step()

            times = in_turn(scene, [lambda net=net: step(net) for net in (model, wrapped)], 5.0)
            found[f"{name}, {precision}"] = {
                "ratio": median_ratio(times[1], times[0]),
                "bare model, ms": 1e3 * statistics.median(times[0]),
                "rounds": len(times[0]),
            }
            scene.write(found)
        wrapped.close()
        del model, wrapped, given, optimizer
    return found


def mirror_parts(scene: Scene) -> Results:
    """Two ranks on one card: duoka and DDP in turn; peak memory."""
    import mirror

    if not scene.is_rehearsal and mirror.count(scene.kind) < 2:
        return {"not run": f"two ranks need two GPUs, or NCCL 2.30 and {SHARING}=1"}
    found: Results = {}
    for per_device in [2] if scene.is_rehearsal else [256, 32]:
        minutes = scene.seconds(35 if per_device == 256 else 20) / 60
        times, peaks = mirror.compare(minutes, scene.kind, per_device, starts=1)
        found[f"ResNet-18, 64x64, {per_device} per device"] = {
            "rounds": len(times["one"]),
            "ms per step": {role: 1e3 * statistics.median(values) for role, values in times.items()},
            "ratio to DDP": {role: median_ratio(values, times["ddp"]) for role, values in times.items()},
            "peak memory of the first process, MiB": {role: peak / 2**20 for role, peak in peaks.items()},
        }
        scene.write(found)
    return found


def images(scene: Scene) -> Results:
    """Images/s of the image recipes, and of a loop as the guides write it, on one device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from duoka.recipes.image_classification.presets import CIFAR100, TINY_IMAGENET
    from duoka.recipes.image_classification.results import DatasetMetadata

    device = torch.device(scene.kind)
    found: Results = {}
    product = timed_product(scene)
    small = {"batch_size": 16} if scene.is_rehearsal else {}
    cases = [
        ("cifar100 ResNet-18, batch 256", CIFAR100, {"dataset": "cifar100", **small}, 32, scene.size(25_000, 32)),
        ("tiny-imagenet baseline, batch 64", TINY_IMAGENET, {"model": "baseline", **small}, 64, scene.size(10_000, 32)),
        ("tiny-imagenet best, batch 64", TINY_IMAGENET, {"model": "best", **small}, 64, scene.size(10_000, 32)),
    ]
    variants: list[tuple[str, Results]] = [
        ("fp32", {}),
        ("bf16, channels last", {"precision": "bf16", "channels_last": True}),
    ]
    compiled = ("bf16, channels last, compiled", {**variants[-1][1], "compile": True})
    for name, recipe, options, side, count in cases:
        image_set = invented_images(side, count)
        config = recipe.Config(device=scene.devices(1), **options).resolved()
        metadata = DatasetMetadata.of(image_set)
        model = recipe.build_model(config, metadata).to(device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=device))
        operations = 3 * counter.get_total_flops()  # a backward does twice the forward's
        rates = found.setdefault(name, {"GFLOP per image": operations / 1e9})
        with tempfile.TemporaryDirectory() as folder, idle_share(scene) as idle:
            rate = guide_rate(recipe, config, metadata, image_set, model.train(), Path(folder), scene)
            rates["the guides' loop, fp32"] = {"images/s": rate, "GPU idle": idle()}
        scene.write(found)
        last = [compiled] if name == cases[-1][0] and not scene.is_rehearsal else []
        for variant, choices in [*variants, *last]:
            with idle_share(scene) as idle:
                rate = recipe_rate(recipe, options, choices, image_set, metadata, scene)
            ratio = rate / rates["the guides' loop, fp32"]["images/s"]
            record = {
                "images/s": rate,
                "times the guides' loop": ratio,
                "share of the bf16 rate": rate * operations / product,
            }
            rates[f"duoka, {variant}"] = {**record, "GPU idle": idle()}
            scene.write(found)
        rates["bare loop on one batch, fp32"] = {"images/s": bare_rate(model, side, config.batch_size, scene)}
        scene.write(found)
    return found


def bare_rate(model: Any, side: int, batch: int, scene: Scene) -> float:
    """Return the images/s of a loop in which one batch on the device serves for all steps: what the model alone allows."""
    import torch

    images = torch.randn(batch, 3, side, side, device=scene.kind)
    labels = torch.randint(100, (batch,), device=scene.kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def steps() -> None:
        for _ in range(scene.size(20, 1)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return scene.size(20, 1) * batch / timed(scene, steps, 1.0)


def timed_product(scene: Scene) -> float:
    """Return the measured rate of a bf16 matrix product, in operations per second."""
    import torch

    n = scene.size(8192, 256)
    a, b = (torch.randn(n, n, device=scene.kind, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed(scene, lambda: a @ b)


def invented_images(side: int, count: int) -> Any:
    """Return smooth random images with labels: as large as photographs when compressed."""
    import torch
    from torch.nn.functional import interpolate

    from duoka.recipes.datasets.images import Images, ImageSet

    draw = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 8, 8, generator=draw)
    pixels = torch.cat([interpolate(part, size=side, mode="bilinear") for part in small.split(2000)])
    noise = 0.05 * torch.randn(1, 3, side, side, generator=draw)
    train = Images(((pixels + noise).clamp(0, 1) * 255).to(torch.uint8), torch.arange(count) % 100)
    return ImageSet("invented", tuple(map(str, range(100))), train, train.select(torch.arange(min(100, count))))


def recipe_rate(recipe: Any, options: Results, choices: Results, image_set: Any, metadata: Any, scene: Scene) -> float:
    """Return the images/s of the second epoch; the first warms up."""
    import torch

    trainer_options = dict(choices)
    channels_last = trainer_options.pop("channels_last", False)
    precision = trainer_options.pop("precision", "fp32")
    if scene.is_rehearsal:
        precision = "fp32"  # bf16 is slow on most CPUs
    config = recipe.Config(device=scene.devices(1), precision=precision, epochs=2, **options).resolved()
    model = recipe.build_model(config, metadata)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    trainer = recipe._trainer(model, config, image_set, metadata, verbose=False, **trainer_options)
    trainer.fit(save_model=False)
    return float(trainer.history[1]["samples_per_s"])


def guide_rate(
    recipe: Any, config: Any, metadata: Any, image_set: Any, model: Any, folder: Path, scene: Scene
) -> float:
    """Return the images/s of a ``DataLoader`` over files or PIL images with four workers, in fp32, as the guides write it.

    CIFAR-100's images are in memory, Tiny-ImageNet's are JPEG files. The loop reads the loss of each step.
    """
    import torch
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    steps = recipe.augmentation(config, image_set, v2)
    statistics_of = metadata.statistics
    normalize = v2.Normalize(statistics_of.mean, statistics_of.std)
    transform = v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize])
    limit = scene.size(12_000, 32)
    if "tiny" in recipe.name:
        write_jpegs(image_set, folder, limit)
        from torchvision.datasets import ImageFolder

        dataset: Any = ImageFolder(str(folder), transform)
    else:
        dataset = InMemory(image_set.train.pixels[:limit], image_set.train.labels[:limit], transform)
    workers = scene.size(4, 2)
    loader = DataLoader(dataset, config.batch_size, shuffle=True, num_workers=workers, persistent_workers=True)
    device = torch.device(scene.kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    total, end, passed, began = 0.0, time.monotonic() + scene.seconds(10), 0, 0.0
    while True:
        for number, (inputs, targets) in enumerate(loader):
            if number == scene.size(8, 1) and not began:  # the first batches wait for the workers' start
                began = time.monotonic()
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item()
            passed += len(targets) if began else 0
            if time.monotonic() > end and passed:
                del loader
                return passed / (time.monotonic() - began)
        if not began:
            began = time.monotonic()


class InMemory:
    """CIFAR-100 as torchvision's data set gives it: a PIL image from memory, transformed."""

    def __init__(self, pixels: Any, labels: Any, transform: Any) -> None:
        self.pixels, self.labels, self.transform = pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def write_jpegs(image_set: Any, folder: Path, count: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    count = min(count, len(image_set.train))
    arrays = image_set.train.pixels[:count].permute(0, 2, 3, 1).contiguous().numpy()
    for label in image_set.train.labels[:count].unique().tolist():
        Path(folder, f"{label:03}").mkdir()

    def write(index: int) -> None:
        label = int(image_set.train.labels[index])
        Image.fromarray(arrays[index]).save(folder / f"{label:03}" / f"{index}.jpg", quality=90)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(count)))


def models(scene: Scene) -> Results:
    """Training steps of the recommender's dynamic mode and of the Informer: this device against the CPU."""
    import torch

    found: Results = {}
    for name, build in (("recommender, dynamic", recommender), ("Informer, ETTh1, M, batch 32", informer)):
        rates = {}
        for kind in dict.fromkeys([scene.kind, "cpu"]):
            torch.manual_seed(0)
            step, samples = build(scene, torch.device(kind))
            step()
            rates[kind] = samples / timed(scene, step, 5.0)
            found[name] = {f"samples/s on {where}": rate for where, rate in rates.items()}
            if len(rates) == 2:
                found[name]["ratio"] = rates[scene.kind] / rates["cpu"]
            scene.write(found)
    return found


def recommender(scene: Scene, device: Any) -> tuple[Callable[[], Any], int]:
    import recommend_dynamic

    users, films = recommend_dynamic.descriptions()
    texts = recommend_dynamic.tokenize_texts(users, films, pretrained="none")
    model = recommend_dynamic.GPT2RecommenderEnhanced(texts, use_cache=False).to(device)
    step, draw = recommend_dynamic.trained(model, model.loss), recommend_dynamic.batches(seed=0)
    count = scene.size(recommend_dynamic.BATCH, 8)
    return lambda: step({key: value[:count].to(device) for key, value in next(draw).items()}), count


def informer(scene: Scene, device: Any) -> tuple[Callable[[], Any], int]:
    import informer as benchmark
    import torch

    columns, past, start = benchmark.CASES["M"]
    batch, horizon, marks = scene.size(benchmark.BATCH, 2), benchmark.HORIZON, benchmark.MARKS
    size = benchmark.InformerSize()
    model = benchmark.Informer(columns, columns, marks, label_length=start, horizon=horizon, size=size).to(device)
    history, times = torch.randn(batch, past, columns), torch.randn(batch, past + horizon, marks)
    truth = torch.randn(batch, horizon, columns)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        output = model(history.to(device), times.to(device))
        torch.nn.functional.mse_loss(output, truth.to(device)).backward()
        optimizer.step()

    return step, batch


def faults(scene: Scene) -> Results:
    """Faults of a worker and Ctrl-C: seconds until the caller knows, and whether the next step works.

    On a GPU all run at the same time.
    """
    found: Results = {}
    names = list(gpu_faults.FAULTS)
    at_once = 1 if scene.is_rehearsal else len(names)
    for first in range(0, len(names), at_once):
        with tempfile.TemporaryDirectory() as folder:
            running = {name: start_fault(name, scene, Path(folder, name)) for name in names[first : first + at_once]}
            for name, (process, log) in running.items():
                found[name] = fault_record(process, log)
                scene.write(found)
    return found


def start_fault(name: str, scene: Scene, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    folder.mkdir()
    log = folder / "log.txt"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_faults.py"), name, scene.devices(2)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
    return process, log


def fault_record(process: subprocess.Popen[bytes], log: Path) -> Results:
    try:
        process.wait(gpu_faults.LIMIT_S + 15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    lines = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.startswith("{")), "")
    if last:
        return dict(json.loads(last))
    worker = log.with_name("worker.log")
    if worker.is_file():
        lines += ["the worker:", *worker.read_text().splitlines()]
    return {"failed": lines[-60:], "status": process.returncode}


# Measuring


def timed(scene: Scene, step: Callable[[], Any], seconds: float = 1.0) -> float:
    """Return the median seconds of a step, each waited for."""
    times = in_turn(scene, [step], seconds)[0]
    return statistics.median(times)


def in_turn(scene: Scene, steps: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Run steps in turn, each waited for, and return the seconds of each; the order changes every round."""
    for step in steps:
        for _ in range(1 if scene.is_rehearsal else 3):
            step()
    scene.synchronize()
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + scene.seconds(seconds)
    while time.perf_counter() < end or len(times[0]) < scene.size(5, 2):
        order = range(len(steps)) if len(times[0]) % 2 else reversed(range(len(steps)))
        for number in order:
            began = time.perf_counter()
            steps[number]()
            scene.synchronize()
            times[number].append(time.perf_counter() - began)
    return times


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


@contextmanager
def idle_share(scene: Scene) -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns the share of the block's time in which the GPU ran nothing, as NVML samples it."""
    import threading

    samples: list[int] = []
    stopped = threading.Event()

    def sample() -> None:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid())
        while not stopped.wait(0.1):
            samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    thread = threading.Thread(target=sample, daemon=True)
    if not scene.is_rehearsal:
        thread.start()

    def share() -> float | None:
        """Leave out the first third, in which the model and its data arrive."""
        kept = samples[len(samples) // 3 :]
        return 1 - statistics.mean(kept) / 100 if kept else None

    try:
        yield share
    finally:
        stopped.set()
        if thread.ident is not None:
            thread.join()


# Running the parts


PARTS: Mapping[str, tuple[Callable[[Scene], Results], float]] = {
    "facts": (facts, 60),
    "tests": (tests, 170),
    "faults": (faults, 100),
    "overhead": (overhead, 70),
    "mirror": (mirror_parts, 110),
    "images": (images, 120),
    "models": (models, 50),
}
"""Each part's function, and the seconds that it may take on a GPU."""
REHEARSAL_LIMIT_S = 420
STOPPED = "stopped by a signal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on CPU workers and the stand-in, with small sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the time of each measurement")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all parts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        run_part(given.part, given.rehearse, given.scale, given.write)
        return 0
    unknown = [name for name in given.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if not given.rehearse:
        import torch

        if not torch.cuda.is_available():
            parser.error("this machine has no GPU that torch can use; --rehearse runs all parts on CPU workers")
    return run_all(given)


def run_all(given: argparse.Namespace) -> int:
    """Run the parts one after the other; return 0 if all were finished and no test or fault failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault(SHARING, "1")  # several ranks on one GPU
    end = time.monotonic() + 60 * given.minutes
    record: Results = {"date": datetime.date.today().isoformat(), "rehearsal": given.rehearse, "parts": {}}
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{'rehearsal' if given.rehearse else 'gpu'}-{record['date']}.json"
    for name in given.only.split(","):
        limit = REHEARSAL_LIMIT_S if given.rehearse else min(PARTS[name][1], end - time.monotonic())
        if limit < 5:
            record["parts"][name] = {"status": "not begun: no time was left", "seconds": 0, "results": {}}
            continue
        print(f"== {name} (at most {limit:.0f} s)", flush=True)
        part = record["parts"][name] = run_one(name, given, limit)
        card = record["parts"].get("facts", {}).get("results", {}).get("card")
        if card and not given.rehearse:
            path = given.out / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}-{record['date']}.json"
        earlier = json.loads(path.read_text())["parts"] if path.is_file() else {}
        parts = {**earlier, **record["parts"]}
        path.write_text(json.dumps({**record, "parts": parts}, indent=1, ensure_ascii=False) + "\n")
        print(f"{part['status']} after {part['seconds']} s", flush=True)
        for line in [*lines_of(part["results"], "  "), *(f"  | {line}" for line in part.get("output", [])[-25:])]:
            print(line, flush=True)
        if part["status"] == STOPPED:
            break
    troubles = troubles_of(record)
    print(f"results: {path}")
    print("\n".join(troubles) or "nothing failed")
    return bool(troubles)


def run_one(name: str, given: argparse.Namespace, limit: float) -> Results:
    """Run one part in a process of its own; its results so far lie in the results' folder until they are in the record."""
    written, began = given.out / f"part-{name}.json", time.monotonic()
    written.unlink(missing_ok=True)
    words = ["--part", name, "--scale", str(given.scale), "--write", str(written)]
    words += ["--rehearse"] if given.rehearse else []
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *words], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        except (SystemExit, KeyboardInterrupt):
            status = STOPPED
        finally:
            end_group(process)
        results = json.loads(written.read_text()) if written.is_file() else {}
        written.unlink(missing_ok=True)
        part: Results = {"status": status, "seconds": round(time.monotonic() - began, 1), "results": results}
        if status != "done":
            log.seek(0)
            part["output"] = log.read().splitlines()[-60:]
        return dict(json.loads(json.dumps(part).replace(f"{ROOT}/", "")))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_part(name: str, is_rehearsal: bool, scale: float, path: Path) -> None:
    def write(results: Results) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(results, ensure_ascii=False))
        new.replace(path)

    write(PARTS[name][0](Scene(is_rehearsal, scale, write)))


def lines_of(value: Any, indent: str) -> Iterator[str]:
    """Return a table of nested results."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield f"{indent}{key}"
            yield from lines_of(item, indent + "  ")
        elif isinstance(item, list):
            yield f"{indent}{key}"
            yield from (f"{indent}  {line}" for entry in item for line in str(entry).splitlines()[-12:])
        else:
            text = f"{item:.4g}" if isinstance(item, float) else str(item)
            yield f"{indent}{key:60} " + "\n".join(text.splitlines()[-25:])


def troubles_of(record: Results) -> list[str]:
    """Return what did not work."""
    found = [f"{name}: {part['status']}" for name, part in record["parts"].items() if part["status"] != "done"]
    for name, run in record["parts"].get("tests", {}).get("results", {}).items():
        if run.get("failed") or run.get("status") != 0:
            found.append(f"tests over {name}: {run.get('failed', 'unfinished')} failed")
    for name, fault in record["parts"].get("faults", {}).get("results", {}).items():
        if not fault.get("works again") or fault.get("known after, s", 99) > 5:
            found.append(f"fault: {name}")
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        traceback.print_exc()
        sys.exit(1)
