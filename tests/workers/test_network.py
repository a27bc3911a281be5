"""What listens on the network, as SECURITY.md says."""

from __future__ import annotations

import psutil
import torch
from torch import nn

import duoka
from support.processes import worker_pids


def listening_addresses() -> set[str]:
    """Return the addresses where this process and its children listen."""
    me = psutil.Process()
    found = [c for process in (me, *me.children(recursive=True)) for c in process.net_connections("inet")]
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}


def test_workers_of_a_wrapped_model_listen_nowhere() -> None:
    before = listening_addresses()
    model = duoka.DataParallel(nn.Linear(4, 2), devices="cpu:2")
    model(torch.ones(4, 4)).sum().backward()
    assert worker_pids()
    assert listening_addresses() == before


def test_a_launch_listens_on_loopback_only() -> None:
    def addresses() -> list[str]:
        return sorted({c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN})

    found = {address for rank in duoka.launch(addresses, devices="cpu:3", returns="all") for address in rank}
    assert found == {"127.0.0.1"}
