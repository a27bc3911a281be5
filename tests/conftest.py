"""Fixtures for every test: the check that a test leaves nothing behind, and set-ups that many files use.

A test must end or remove every process, thread, socket, environment variable, process group, folder and file it makes.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

from support.leaks import find_leaks, take_snapshot


def pytest_configure(config: pytest.Config) -> None:
    os.environ["COLUMNS"] = "160"  # the width of tables, which is a terminal's otherwise
    config.addinivalue_line("markers", "leaks_allowed: what this test starts may outlive it; say why beside the marker")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude the half million objects that imports made from garbage collection, which saves 5 % of the run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put temporary files into a folder of this run, so that those of other runs do not count as leaks."""
    before, folder = os.environ.get("TMPDIR"), tmp_path_factory.mktemp("t")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    yield
    tempfile.tempdir = None
    del os.environ["TMPDIR"]
    if before is not None:
        os.environ["TMPDIR"] = before


@pytest.fixture(scope="module", autouse=True)
def no_worker_outlives_its_module(request: pytest.FixtureRequest, own_temporary_folder: None) -> Iterator[None]:
    """Close the warm workers after each module, and fail when anything of them is left."""
    before = take_snapshot()
    yield
    if workers := sys.modules.get("duoka.workers"):
        workers.close_workers()
        if request.node.get_closest_marker("leaks_allowed"):
            return
        if leaks := find_leaks(before, allow_warm_workers=False):
            pytest.fail("close_workers() left behind:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, no_worker_outlives_its_module: None) -> Iterator[None]:
    """Fail the test that leaves something behind."""
    before = take_snapshot()
    yield
    if request.node.get_closest_marker("leaks_allowed"):
        return
    if leaks := find_leaks(before, allow_warm_workers=True):
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread: fastest for tiny models, and independent of other processes on the machine.

    For a whole file: ``pytestmark = pytest.mark.usefixtures("one_thread")``.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pickle_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pickle functions and classes of this test module by value, because a worker process cannot import the module.

    For a whole file: ``pytestmark = pytest.mark.usefixtures("pickle_by_value")``.
    """
    import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)
