"""What processes that are duoka's own do with memory that a step frees and the next one asks for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import duoka
from duoka.team import close_helpers

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library is told anything")

PROGRAM = """
import resource
import torch


def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for mebibytes in range(1, 32):  # larger ones each time, which the library asks the system for, whatever it has learnt
        torch.ones(mebibytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
ALL = sum(range(1, 32)) * (1 << 20) // os.sysconf("SC_PAGE_SIZE")


def test_a_script_under_duoka_run_asks_the_system_for_its_memory_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"{PROGRAM}\nprint(pages())")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def pages(*words: str, **more: str) -> int:
        command = [sys.executable, *words, str(script)]
        ran = subprocess.run(
            command, env={**environment, **more}, capture_output=True, text=True, check=True, timeout=120
        )
        return int(ran.stdout.split()[0])

    assert pages("-m", "duoka", "run", "--device", "cpu") < ALL / 4
    assert pages("-m", "duoka", "run", "--device", "cpu", MALLOC_TOP_PAD_="0") > ALL / 2, "the user's own word counts"


def test_a_helper_is_given_large_pages_and_tells_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offered.exists() or "[never]" in offered.read_text():
        pytest.skip("this system has no large pages to give")
    (tmp_path / "program_of_a_helper.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    close_helpers()

    def report() -> tuple[int, str | None]:
        import program_of_a_helper

        return program_of_a_helper.pages(), os.environ.get("GLIBC_TUNABLES")

    _, (pages, inherited) = duoka.launch(report, devices="cpu:2", returns="all")
    assert pages < ALL / 4
    assert inherited is None


def test_what_the_user_says_of_the_allocator_counts_in_helpers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    close_helpers()
    said = duoka.launch(lambda: Path("/proc/self/environ").read_bytes().split(b"\0"), devices="cpu:2", returns="all")
    assert b"GLIBC_TUNABLES=glibc.malloc.hugetlb=0" in said[1]
    close_helpers()
