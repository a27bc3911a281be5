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

SCRIPTS = Path(__file__).parent / "scripts"
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:[eE][-+]?\d+)?|\bnan\b|\binf\b")
OF_DEVICES = re.compile(r"gpu|cuda|device|cpu|设备", re.IGNORECASE)
SELDOM = {  # like others in the list: run by `make test-all`, which takes ten minutes longer
    "exit_status",
    "finetune_freeze",
    "jit_trace_export",
    "keyword_inputs",
    "manual_sgd",
    "module_guard",
    "strip_prefix_slice",
    "swa_averaged_model",
    "inference_only",
    "hf_gpt2",
    "save_whole_model",
    "functional_per_sample",
    "parallel_by_hand",
    "weight_tying",
    "agent_class",
    "always_data_parallel",
    "amp_new_api",
    "autoencoder",
    "best_weights_deepcopy",
    "char_rnn",
    "compile_always",
    "contrastive",
    "cosine_warmup",
    "dict_output",
    "distillation",
    "edge_index",
    "ensemble_list",
    "graph_network",
    "list_of_tensors",
    "loss_in_forward_mean",
    "lr_finder",
    "maml",
    "manual_momentum",
    "mnist_example",
    "multitask",
    "notebook_export",
    "onecycle",
    "pinn",
    "plateau",
    "raw_tensors",
    "sam_two_passes",
    "seed_everything",
    "seq2seq",
    "sequence_first_rnn_plain",
    "siamese_triplet",
    "strip_prefix_replace",
    "two_models_alternate",
    "unet",
    "workers_guarded",
    "batch_coupled_forward",
    "batch_times_gpus",
    "bf16_autocast",
    "device_in_forward",
    "own_methods",
    "ema_by_hand",
    "inline_sequential",
    "attribute_set_in_forward",
    "embedding_bag_offsets",
    "aux_tuple",
    "compile_guarded",
    "loss_in_forward",
    "sequence_first_lstm",
    "workers_top_level",
    "device_option",
    "hf_padded_labels",
    "kfold",
    "dropout_batchnorm",
}
ON_ONE_DEVICE = {  # and the words that say why
    "attribute_set_in_forward": "keeps tensors in",
    "edge_index": "cannot compute a part",
    "embedding_bag_offsets": "cannot compute a part",
    "forward_hook": "hook of the script",
    "functional_per_sample": "create_graph",
    "gradient_penalty": "create_graph",
    "graph_network": "cannot compute a part",
    "maml": "create_graph",
    "packed_sequence": "on one device, because",
    "pinn": "create_graph",
    "raw_tensors": "no model was found",
    "seq2seq": "first dimension",
    "sequence_first_lstm": "looks across samples",
    "sequence_first_rnn_plain": "first dimension",
    "compile_always": "torch.compile",
    "batch_coupled_forward": "looks across samples",
    "list_of_tensors": "",
    "tiny_batches": "one sample cannot be shared",
    "raises_in_forward": "",
    "hf_padded_labels": "labels of which some do not count",
}


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
        """What is printed beside these numbers, whole numbers among it, but for lines that speak of devices."""
        return [NUMBER.sub("#", line) for line in self.out.splitlines() if not OF_DEVICES.search(line)]


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
        """Return what became of a script, plain and shared out; both run at once."""
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
        self._process.wait(10)
        self._process.stdout.close()


def _result(cwd: Path, status: int) -> Result:
    made = {str(path.relative_to(cwd)) for path in cwd.rglob("*") if path.is_file()}
    return Result(status, (cwd / "stdout").read_text(), (cwd / "stderr").read_text(), made)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("scripts"))
    yield runner
    runner.close()


def found(*folders: str) -> list:
    paths = [path for folder in folders for path in sorted((SCRIPTS / folder).glob("*.py"))]
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.extended] if path.stem in SELDOM else [])
        for path in paths
        if path.stem not in ("my_nets", "__init__")
    ]


@pytest.mark.leaks_allowed
@pytest.mark.parametrize("path", [*found("", "awkward", "sibling"), SCRIPTS / "recommender" / "main.py"])
def test_prints_the_same_losses(path: Path, runner: Runner) -> None:
    plain, shared = runner.run(str(path))
    assert shared.status == plain.status, shared.err
    assert shared.numbers == pytest.approx(plain.numbers, rel=1e-4, abs=1e-7, nan_ok=True), shared.err
    assert shared.words == plain.words
    assert shared.files == plain.files
    if "SKIP" in plain.out:
        pytest.skip(plain.out.strip())
    if path.stem in ON_ONE_DEVICE:
        assert ON_ONE_DEVICE[path.stem] in " ".join(shared.err.split())
    else:
        assert calls_shared(shared.err) > 0, shared.err


def calls_shared(report: str) -> int:
    return sum(int(count) for count in re.findall(r"(\d+) / \d+\s*│", report))


@pytest.mark.leaks_allowed
@pytest.mark.parametrize("path", found("stochastic"))
def test_runs_and_learns(path: Path, runner: Runner) -> None:
    _, shared = runner.run(str(path))
    assert shared.status == 0, shared.err
    losses = [float(word) for word in re.findall(r"loss:? (\d+\.\d+)", shared.out)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.leaks_allowed
def test_a_module_of_a_package_runs_with_its_relative_imports(runner: Runner) -> None:
    plain, shared = runner.run("-m", "pkg.train")
    assert shared.numbers == pytest.approx(plain.numbers, rel=1e-4)
    assert len(shared.numbers) > 2
    assert calls_shared(shared.err) > 0
