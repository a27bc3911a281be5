"""``Trainer``, recipes and ``duoka run`` on accelerators: results equal those of one CPU."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import duoka

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
    pytest.mark.leaks_allowed,  # CUDA keeps threads and descriptors until the process ends
    pytest.mark.filterwarnings("ignore"),
]
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
COUNT = torch.accelerator.device_count()
ALONE = pytest.param("0", marks=[pytest.mark.extended] if COUNT > 1 else [])
TWO = pytest.param("0,1", marks=pytest.mark.skipif(COUNT < 2, reason="fewer than two devices"))
TWICE = pytest.param(
    "0,0", marks=pytest.mark.skipif(DEVICE.type != "cuda", reason="gloo supports no accelerator but CUDA")
)


def trained(device: str, **options) -> tuple[nn.Module, duoka.Trainer]:
    torch.manual_seed(0)
    x, y = torch.randn(70, 1, 8, 8), torch.randint(4, (70,))
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loaders = [DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle) for shuffle in (True, False)]
    trainer = duoka.Trainer(
        net,
        *loaders,
        loss=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        epochs=2,
        device=device,
        batch_size_means="global",
        seed=3,
        **options,
    )
    trainer.fit()
    return net, trainer


@pytest.mark.parametrize("device", [ALONE, TWICE, TWO])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-4), ({"precision": "bf16"}, 2e-2), ({"precision": "fp16"}, 2e-2), ({"max_grad_norm": 0.5}, 1e-4)],
)
def test_training_equals_one_cpu(options, tolerance: float, device: str) -> None:
    reference, _ = trained("cpu", **{k: v for k, v in options.items() if k != "precision"})
    net, trainer = trained(device, **options)
    assert {p.device for p in net.parameters()} == {torch.device(DEVICE.type, 0)}
    for own, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.cpu(), other, rtol=tolerance, atol=tolerance)
    assert trainer.history[-1]["train_loss"] < trainer.history[0]["train_loss"]


def mixed_on_the_device(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    share = torch.rand((), device=inputs.device)
    return share * inputs + (1 - share) * inputs.roll(1, 0), targets


@pytest.mark.skipif(COUNT < 2, reason="fewer than two devices")
def test_random_numbers_of_a_mix_are_drawn_once_for_all_devices() -> None:
    def weights(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        data = duoka.data.resident(
            (torch.randn(24, 4), torch.randn(24, 2)), batch_size=12, shuffle=True, mix=mixed_on_the_device
        )
        net = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        options = {"epochs": 3, "batch_size_means": "global", "seed": 1, "verbose": False}
        duoka.Trainer(net, data, loss=nn.MSELoss(), optimizer=optimizer, device=device, **options).fit()
        return net.weight.detach().cpu()

    torch.testing.assert_close(weights("0,1"), weights("0"))


@pytest.mark.parametrize("device", [ALONE, TWICE, TWO])
def test_a_recipe_trains_and_its_run_works_on_another_device(device: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "duoka", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    command = "train cifar100 --dataset digits --epochs 1 --device"
    trained_there = run(*command.split(), device)
    (folder,) = map(str, (tmp_path / "runs" / "cifar100").iterdir())
    found = [
        re.findall(r"test accuracy: (\S+)", text) for text in (trained_there, run("eval", folder, "--device", "cpu"))
    ]
    assert len(found[0]) == 1
    assert found[0] == found[1]


@pytest.mark.parametrize("device", [ALONE, TWICE, TWO])
def test_duoka_run_prints_what_the_script_prints(device: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset

        torch.manual_seed(0)
        device = torch.accelerator.current_accelerator()
        x = torch.randn(128, 10)
        y = (x.sum(1) > 0).long()
        net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2)).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for epoch in range(3):
            for inputs, targets in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(inputs.to(device)), targets.to(device))
                loss.backward()
                optimizer.step()
            print(f"{epoch} {loss.item():.5f}")
            net.cpu()  # as people do to try or save it
            print(f"{epoch} {net(x).mean().item():.5f}")
            net.to(device)
        """)
    )
    commands = [["script.py"], ["-m", "duoka", "run", "script.py", "--device", device]]
    plain, shared = (
        subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=150)
        for words in commands
    )
    assert (plain.returncode, shared.returncode) == (0, 0), shared.stderr
    losses = [
        [float(line.split()[1]) for line in done.stdout.splitlines() if line[:1].isdigit()] for done in (plain, shared)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert ("on all devices" in shared.stdout + shared.stderr) == ("," in device)
    assert "one device, because" not in shared.stdout + shared.stderr
