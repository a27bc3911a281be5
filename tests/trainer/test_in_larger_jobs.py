"""Trainer in processes of torchrun, and inside ``duoka.launch``."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from duoka.launcher import launch
from duoka.trainer import Trainer

PROGRAM = textwrap.dedent(
    """
    import os, sys, torch
    from torch.utils.data import DataLoader, TensorDataset
    from duoka.trainer import Trainer

    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)  # rank 0's weights count
    model = torch.nn.Linear(4, 2)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(11, 4, generator=generator), torch.randint(2, (11,), generator=generator))
    loader = DataLoader(data, batch_size=4)
    trainer = Trainer(model, loader, loader, loss=torch.nn.functional.cross_entropy, optimizer="sgd", lr=0.1, epochs=2,
                      batch_size_means="global", device="cpu", monitor="loss")
    trainer.fit()
    torch.save((model.weight.detach(), trainer.predict(loader)), sys.argv[1] + str(rank))
    """
)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(11, 4, generator=generator), torch.randint(2, (11,), generator=generator))
    return DataLoader(data, batch_size=4)


def fitted() -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    options = {
        "optimizer": "sgd",
        "lr": 0.1,
        "epochs": 2,
        "batch_size_means": "global",
        "device": "cpu",
        "verbose": False,
    }
    Trainer(model, loader(), loader(), loss=torch.nn.functional.cross_entropy, monitor="loss", **options).fit()
    return model.weight.detach()


@pytest.mark.slow
def test_under_torchrun_all_processes_end_with_the_same_weights(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "train.py"), str(tmp_path / "result")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("strategy: ddp") == 1
    first, second = (torch.load(tmp_path / f"result{rank}") for rank in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert len(first[1]) == 11
    assert torch.allclose(first[0], fitted(), rtol=1e-5, atol=1e-7)


def test_inside_a_launched_function_the_trainer_uses_its_ranks():
    def on_each_rank() -> torch.Tensor:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(11, 4, generator=generator), torch.randint(2, (11,), generator=generator))
        model = torch.nn.Linear(4, 2)
        options = {
            "optimizer": "sgd",
            "lr": 0.1,
            "epochs": 2,
            "batch_size_means": "global",
            "device": "cpu",
            "verbose": False,
        }
        Trainer(model, DataLoader(data, batch_size=4), loss=torch.nn.functional.cross_entropy, **options).fit()
        return model.weight.detach()

    weights = launch(on_each_rank, devices="cpu:2", returns="all")
    assert torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], fitted(), rtol=1e-5, atol=1e-7)
