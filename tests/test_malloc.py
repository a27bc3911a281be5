"""glibc's memory in duoka's own processes: kept between steps, and in large pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import duoka

GLIBC = tuple(map(int, platform.libc_ver()[1].split("."))) if platform.libc_ver()[0] == "glibc" else ()
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import ctypes
import os
import resource
import torch

torch.set_num_threads(1)  # others are not there after a fork

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: small pages only, so that they can be counted


def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for mebibytes in range(1, 32):  # each larger than the last, so that glibc's own threshold never fits
        torch.ones(mebibytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def pages_of_a_child():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    reading, writing = os.pipe()
    if os.fork() == 0:
        for _ in range(2):  # 240 MiB in 30 pieces with nothing between them, freed at once
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            held = [library.malloc(8 << 20) for _ in range(30)]
            for address in held:
                ctypes.memset(address, 1, 8 << 20)
            for address in held:
                library.free(address)
        os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reading, 100))


print(pages(), pages_of_a_child())
"""
ALL = sum(range(1, 32)) * (1 << 20) // os.sysconf("SC_PAGE_SIZE")
OF_A_CHILD = (240 << 20) // os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not GLIBC, reason="only the GNU C library has these settings")
def test_duoka_run_keeps_freed_memory_and_its_children_do_not(tmp_path) -> None:
    (tmp_path / "script.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def pages(**more: str) -> tuple[int, int]:
        command = [sys.executable, "-m", "duoka", "run", "--device", "cpu", str(tmp_path / "script.py")]
        ran = subprocess.run(
            command, env={**environment, **more}, capture_output=True, text=True, check=True, timeout=120
        )
        own, of_a_child = ran.stdout.split()[:2]
        return int(own), int(of_a_child)

    own, of_a_child = pages()
    assert own < ALL / 4
    assert of_a_child > OF_A_CHILD / 2
    assert pages(MALLOC_TOP_PAD_="0")[0] > ALL / 2, "the user's own setting holds"


@pytest.mark.skipif(GLIBC < (2, 35), reason="glibc 2.35 and later can use large pages")
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(),
    reason="this system gives large pages to all processes or to none",
)
def test_a_worker_uses_large_pages_and_hides_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)

    def report() -> tuple[bool, str | None]:
        held, is_asked, is_inside = torch.ones(16 << 20), False, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            word = line.split()[0]
            if "-" in word:
                begin, _, end = word.partition("-")
                is_inside = int(begin, 16) <= held.data_ptr() < int(end, 16)
            elif is_inside and word == "VmFlags:":
                is_asked = "hg" in line.split()
        return is_asked, os.environ.get("GLIBC_TUNABLES")

    own, of_worker = duoka.launch(report, devices="cpu:2", returns="all")
    assert own == (False, None)
    assert of_worker == (True, None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what a process was started with")
def test_the_users_memory_settings_hold_in_workers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> bytes:
        return Path("/proc/self/environ").read_bytes()

    for value in (
        "glibc.malloc.hugetlb=0",
        "glibc.malloc.check=0",
    ):  # a worker that started with the first value is not reused for the second
        monkeypatch.setenv("GLIBC_TUNABLES", value)
        _, environment = duoka.launch(report, devices="cpu:2", returns="all")
        assert f"GLIBC_TUNABLES={value}".encode() in environment.split(b"\0")
