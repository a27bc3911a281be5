"""Scripts as people write them print the same losses plain and under ``duoka run --device cpu:2``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.timeout(600)  # two processes a script: a busy machine takes minutes
SCRIPTS = Path(__file__).parent / "scripts"
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:[eE][-+]?\d+)?|\bnan\b|\binf\b")
NAMES_DEVICE = re.compile(r"gpu|cuda|device|cpu|设备", re.IGNORECASE)
EXTENDED = pytest.mark.extended


def script(name: str, one_device: str | None = None, marks: tuple | pytest.MarkDecorator = ()):
    """A script of the table; ``one_device`` is the report's reason for a model that must not be split."""
    return pytest.param(SCRIPTS / f"{name}.py", one_device, id=name.rpartition("/")[2], marks=marks)


SAME_LOSSES = [
    script("agent_class", marks=EXTENDED),
    script("always_data_parallel", marks=EXTENDED),
    script("amp_gradscaler"),
    script("amp_new_api", marks=EXTENDED),
    script("autoencoder", marks=EXTENDED),
    script("aux_tuple", marks=EXTENDED),
    script("best_weights_deepcopy", marks=EXTENDED),
    script("char_rnn", marks=EXTENDED),
    script("compile_always", one_device="torch.compile", marks=EXTENDED),
    script("compile_guarded", marks=EXTENDED),
    script("contrastive", marks=EXTENDED),
    script("cosine_warmup", marks=EXTENDED),
    script("dataclass_output"),
    script("device_in_forward", marks=EXTENDED),
    script("device_option", marks=EXTENDED),
    script("dict_output", marks=EXTENDED),
    script("distillation", marks=EXTENDED),
    script("early_stopping"),
    script("ema_by_hand", marks=EXTENDED),
    script("ensemble_list", marks=EXTENDED),
    script("exit_status", marks=EXTENDED),
    script("finetune_freeze", marks=EXTENDED),
    script("five_steps"),
    script("gan"),
    script("gradient_accumulation"),
    script("hf_bert_classifier"),
    script("hf_gpt2", marks=EXTENDED),
    script("inference_only", marks=EXTENDED),
    script("inline_sequential", marks=EXTENDED),
    script("jit_trace_export", marks=EXTENDED),
    script("keyword_inputs", marks=EXTENDED),
    script("kfold", marks=EXTENDED),
    script("lbfgs"),
    script("loss_in_forward", marks=EXTENDED),
    script("loss_in_forward_mean", marks=EXTENDED),
    script("lr_finder", marks=EXTENDED),
    script("lstm_sine"),
    script("manual_momentum", marks=EXTENDED),
    script("manual_sgd", marks=EXTENDED),
    script("mixup"),
    script("mnist_example", marks=EXTENDED),
    script("module_guard", marks=EXTENDED),
    script("multitask", marks=EXTENDED),
    script("notebook_export", marks=EXTENDED),
    script("onecycle", marks=EXTENDED),
    script("own_methods", marks=EXTENDED),
    script("parallel_by_hand", marks=EXTENDED),
    script("plateau", marks=EXTENDED),
    script("plots"),
    script("raises"),
    script("raises_in_forward", one_device=""),
    script("resume_checkpoint"),
    script("sam_two_passes", marks=EXTENDED),
    script("save_whole_model", marks=EXTENDED),
    script("seed_everything", marks=EXTENDED),
    script("siamese_triplet", marks=EXTENDED),
    script("strip_prefix_replace", marks=EXTENDED),
    script("strip_prefix_slice", marks=EXTENDED),
    script("swa_averaged_model", marks=EXTENDED),
    script("tiny_batches", one_device="one sample cannot be split"),
    script("top_level"),
    script("transformer_padding"),
    script("two_losses"),
    script("two_models_alternate", marks=EXTENDED),
    script("unet", marks=EXTENDED),
    script("weight_tying", marks=EXTENDED),
    script("workers_guarded", marks=EXTENDED),
    script("workers_top_level", marks=EXTENDED),
    script("awkward/attribute_set_in_forward", one_device="keeps tensors in", marks=EXTENDED),
    script("awkward/edge_index", one_device="cannot compute a part", marks=EXTENDED),
    script("awkward/embedding_bag_offsets", one_device="cannot compute a part", marks=EXTENDED),
    script("awkward/forward_hook", one_device="hook of the script"),
    script("awkward/functional_per_sample", one_device="create_graph", marks=EXTENDED),
    script("awkward/gradient_penalty", one_device="create_graph"),
    script("awkward/graph_network", one_device="cannot compute a part", marks=EXTENDED),
    script("awkward/hf_padded_labels", one_device="ignores negative labels", marks=EXTENDED),
    script("awkward/list_of_tensors", one_device="", marks=EXTENDED),
    script("awkward/maml", one_device="create_graph", marks=EXTENDED),
    script("awkward/packed_sequence", one_device="ran on one device"),
    script("awkward/pinn", one_device="create_graph", marks=EXTENDED),
    script("awkward/raw_tensors", one_device="no model was found", marks=EXTENDED),
    script("awkward/seq2seq", one_device="first dimension", marks=EXTENDED),
    script("awkward/sequence_first_lstm", one_device="depends on other samples", marks=EXTENDED),
    script("awkward/sequence_first_rnn_plain", one_device="first dimension", marks=EXTENDED),
    script("sibling/imports_sibling"),
    script("recommender/main"),
]
LEARNS = [
    script("stochastic/batch_coupled_forward", one_device="depends on other samples", marks=EXTENDED),
    script("stochastic/batch_times_gpus", marks=EXTENDED),
    script("stochastic/bf16_autocast", marks=EXTENDED),
    script("stochastic/dropout_batchnorm", marks=EXTENDED),
    script("stochastic/vae"),
]


class Result(NamedTuple):
    status: int
    out: str
    err: str
    files: set[str]

    @property
    def numbers(self) -> list[float]:
        return [float(word) for word in NUMBER.findall(self.out)]

    @property
    def words(self) -> list[str]:
        """The printed lines without these numbers, and without lines that name devices."""
        return [NUMBER.sub("#", line) for line in self.out.splitlines() if not NAMES_DEVICE.search(line)]


class Runner:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("runner.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[Result, Result]:
        """Run a script plain and under ``duoka run``, both at once."""
        jobs = [
            {"cwd": str(self._prepare(words, device)), "words": words, "device": device} for device in ("", "cpu:2")
        ]
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        statuses = json.loads(self._process.stdout.readline())
        results = [_result(Path(job["cwd"]), status) for job, status in zip(jobs, statuses, strict=True)]
        return results[0], results[1]

    def _prepare(self, words: tuple[str, ...], device: str) -> Path:
        cwd = self._folder / f"{Path(words[-1]).stem}-{device or 'plain'}"
        cwd.mkdir()
        if words[0] == "-m":
            package = words[1].partition(".")[0]
            (cwd / package).symlink_to(SCRIPTS / package)
        return cwd

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _result(cwd: Path, status: int) -> Result:
    made = {str(path.relative_to(cwd)) for path in cwd.rglob("*") if path.is_file()}
    return Result(status, (cwd / "stdout").read_text(), (cwd / "stderr").read_text(), made)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("scripts"))
    yield runner
    runner.close()


def test_the_tables_hold_every_script() -> None:
    listed = {entry.values[0] for entry in (*SAME_LOSSES, *LEARNS)}
    folders = [SCRIPTS / name for name in ("", "awkward", "sibling", "stochastic")]
    files = {path for folder in folders for path in folder.glob("*.py") if path.stem != "my_nets"}
    assert files <= listed


@pytest.mark.leaks_allowed  # the module's runner lives on
@pytest.mark.parametrize(("path", "one_device"), SAME_LOSSES)
def test_prints_the_same_losses(path: Path, one_device: str | None, runner: Runner) -> None:
    plain, parallel = runner.run(str(path))
    assert parallel.status == plain.status, parallel.err
    assert parallel.numbers == pytest.approx(plain.numbers, rel=1e-4, abs=1e-7, nan_ok=True), parallel.err
    assert parallel.words == plain.words
    assert parallel.files == plain.files
    if "SKIP" in plain.out:
        pytest.skip(plain.out.strip())
    check_devices(parallel, one_device)


@pytest.mark.leaks_allowed  # the module's runner lives on
@pytest.mark.parametrize(("path", "one_device"), LEARNS)
def test_runs_and_learns(path: Path, one_device: str | None, runner: Runner) -> None:
    _, parallel = runner.run(str(path))
    assert parallel.status == 0, parallel.err
    losses = [float(word) for word in re.findall(r"loss:? (\d+\.\d+)", parallel.out)]
    assert losses[-1] < 0.9 * losses[0]
    check_devices(parallel, one_device)


@pytest.mark.leaks_allowed  # the module's runner lives on
def test_a_module_of_a_package_runs_with_its_relative_imports(runner: Runner) -> None:
    plain, parallel = runner.run("-m", "pkg.train")
    assert parallel.numbers == pytest.approx(plain.numbers, rel=1e-4)
    assert len(parallel.numbers) > 2
    assert split_calls(parallel.err) > 0


def check_devices(result: Result, one_device: str | None) -> None:
    """Check that models ran on all devices, or that the report gives the reason why not."""
    if one_device is None:
        assert split_calls(result.err) > 0, result.err
    else:
        assert one_device in " ".join(result.err.split())


def split_calls(report: str) -> int:
    return sum(int(count) for count in re.findall(r"(\d+) / \d+\s*│", report))
