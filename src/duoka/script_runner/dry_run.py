"""What ``duoka run`` would do with a script, read from its text: nothing of it is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from duoka.errors import ConfigError
from duoka.script_runner.report import device_words

__all__ = ["Finding", "explain"]

_OPTIMIZERS = frozenset(name for name in vars(torch.optim) if isinstance(getattr(torch.optim, name), type))
_CALLS = {
    "DataParallel": "the model is wrapped by the script; duoka.DataParallel takes the place of nn.DataParallel",
    "device_count": "answered with the number of devices, {devices}",
    "is_available": "answered with True",
    "DistributedDataParallel": "left alone: DDP shares work between processes that torchrun or duoka.launch start",
    "init_process_group": "left alone: this script starts process groups itself; run it with torchrun or duoka.launch",
    "compile": "a compiled model stays on one device; duoka.DataParallel(model) before compiling shares it",
    "functional_call": "a call with other parameters stays on one device",
    "jit.script": "a scripted model stays on one device",
    "GradScaler": "kept; on CPU workers it is switched off",
    "autocast": "kept; on CPU workers CUDA's mixed precision is switched off",
}


class Finding(NamedTuple):
    """One line of the script, and what it means for the run."""

    line: int
    code: str
    meaning: str


def explain(source: bytes, name: str, devices: Sequence[torch.device], *, scale_batch: bool = False) -> list[str]:
    """Return, line by line, what would be done with a script.

    Args:
        source: the script's text.
        name: what to call it.
        devices: the devices that it would run on.
        scale_batch: whether batch sizes would be multiplied.

    Raises:
        ConfigError: the text is not Python.

    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ConfigError(f"{name}, line {error.lineno}: {error.msg}. It cannot be run as it is.") from error
    said = [f"{name} would run once, in one process, on {device_words(devices)}."]
    if len(devices) == 1:
        return [*said, "One device shares nothing: it would run as it does without duoka."]
    found = sorted(set(findings(tree, len(devices), scale_batch=scale_batch)))
    said += [f"  line {finding.line}: {finding.code}\n      {finding.meaning}" for finding in found]
    if not any("computed on all devices" in finding.meaning or "wrapped" in finding.meaning for finding in found):
        said.append(
            "No place was found where a model is moved to a device, wrapped, or given to an optimiser: unless code that this "
            "script imports does so, it would run as it does without duoka."
        )
    return [
        *said,
        "Each model is tried on its first batch before it is shared out: parts must give what the whole gives.",
    ]


def findings(tree: ast.AST, devices: int, *, scale_batch: bool) -> Iterator[Finding]:
    """Yield what is found in a script's syntax tree."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        code = ast.unparse(node)
        short = code if len(code) <= 100 else f"{code[:97]}..."
        if last == "DataLoader":
            if meaning := _loader(node, devices, scale_batch=scale_batch):
                yield Finding(node.lineno, short, meaning)
        elif any(keyword.arg == "create_graph" and ast.unparse(keyword.value) == "True" for keyword in node.keywords):
            yield Finding(node.lineno, short, "gradients of gradients: every model of this script stays on one device")
        elif last in _OPTIMIZERS and node.args:
            yield Finding(node.lineno, short, "the model that owns these parameters is computed on all devices")
        elif (last in ("to", "cuda")) and isinstance(node.func, ast.Attribute) and _looks_like_model(node):
            meaning = (
                "if this is a model: computed on all devices, each its part of the batch; otherwise moved as usual"
            )
            yield Finding(node.lineno, short, meaning)
        else:
            meaning = next((m for name, m in _CALLS.items() if called == name or called.endswith(f".{name}")), "")
            if meaning:
                yield Finding(node.lineno, short, meaning.format(devices=devices))


def _looks_like_model(node: ast.Call) -> bool:
    """Whether the thing moved may be a model: made on the spot by a capitalised name, or named like one."""
    assert isinstance(node.func, ast.Attribute)
    owner = node.func.value
    if isinstance(owner, ast.Call):
        return ast.unparse(owner.func).rpartition(".")[2][:1].isupper()
    name = ast.unparse(owner).rpartition(".")[2].lower()
    return any(
        word in name for word in ("model", "net", "encoder", "decoder", "generator", "critic", "student", "teacher")
    )


def _loader(node: ast.Call, devices: int, *, scale_batch: bool) -> str:
    words = {keyword.arg: keyword.value for keyword in node.keywords}
    size = words.get("batch_size") or (node.args[1] if len(node.args) > 1 else None)
    shuffles = "shuffle" in words and ast.unparse(words["shuffle"]) != "False"
    if size is None:
        return ""
    shown = ast.unparse(size)
    if scale_batch and shuffles:
        return f"batch size {shown} becomes {devices} x {shown} (--scale-batch), {shown} a device"
    if isinstance(size, ast.Constant) and isinstance(size.value, int):
        return f"each batch of {shown} becomes {devices} parts of about {max(1, size.value // devices)}"
    return f"each batch of {shown} becomes {devices} parts"
