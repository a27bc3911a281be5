"""Runner of Python with a stand-in accelerator, which is ordinary memory: ``run.py -m pytest tests/gpu``.

It builds the device below ``build/`` with the machine's C++ compiler, once for each version of torch
and of the source. With a real accelerator, or without a compiler, it prints so and runs nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
BUILDS = HERE.parents[1] / "build" / "standin"


def main(arguments: list[str]) -> int:
    if torch.accelerator.is_available():
        print("This machine has an accelerator: the stand-in is not needed.")
        return 0
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        print("The stand-in accelerator needs a C++ compiler (c++, or the one that CXX names); there is none.")
        return 0
    path = os.pathsep.join(filter(None, [str(build(compiler)), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def build(compiler: str) -> Path:
    """Return a directory for the module search path, where torch finds the device as it finds any plug-in."""
    sources = [HERE / name for name in ("device.cpp", "standin.py", "group.py")]
    text = "".join([torch.__version__, *(source.read_text() for source in sources)])
    folder = BUILDS / hashlib.sha256(text.encode()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    BUILDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILDS) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        _compile(compiler, sources[0], new / "device.so")
        shutil.copy(sources[1], new / "duoka_standin.py")
        shutil.copy(sources[2], new / "duoka_standin_group.py")
        about = new / "duoka_standin-0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: duoka-standin\nVersion: 0\n")
        (about / "entry_points.txt").write_text("[torch.backends]\nduoka_standin = duoka_standin:autoload\n")
        if not folder.is_dir():
            new.rename(folder)
    return folder


def _compile(compiler: str, source: Path, target: Path) -> None:
    libraries = cpp_extension.library_paths()
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", str(source), "-o", str(target)),
            *(f"-I{folder}" for folder in cpp_extension.include_paths()),
            *(f"-L{folder}" for folder in libraries),
            *(f"-Wl,-rpath,{folder}" for folder in libraries),
            *("-ltorch_cpu", "-lc10"),
        ],
        check=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
