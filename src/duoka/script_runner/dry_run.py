"""Dry run of ``duoka run --explain``: what a run would do with a script, from its source alone."""

import ast
from collections.abc import Sequence

import torch

from duoka.errors import ConfigError
from duoka.script_runner.report import describe_devices

_OPTIMIZERS = frozenset(name for name in vars(torch.optim) if isinstance(getattr(torch.optim, name), type))
_RUNS_ON_ALL = "runs on all devices"
_MODEL_WORDS = ("model", "net", "encoder", "decoder", "generator", "critic", "student", "teacher")
_CALLS = {
    "DataParallel": f"the wrapped model {_RUNS_ON_ALL}: duoka.DataParallel replaces nn.DataParallel",
    "device_count": "returns the number of devices, {devices}",
    "is_available": "returns True",
    "DistributedDataParallel": "unchanged: it needs one process per device, from torchrun or duoka.launch",
    "init_process_group": "unchanged: start this script, which creates process groups, with torchrun or duoka.launch",
    "compile": "a compiled model runs on one device; duoka.DataParallel(model, compile=True) compiles it for all",
    "functional_call": "a call with other parameters runs on one device",
    "jit.script": "a scripted model runs on one device",
    "GradScaler": "unchanged on GPUs, disabled on CPU workers",
    "autocast": "unchanged on GPUs; CUDA's mixed precision is disabled on CPU workers",
}


def explain(source: bytes, name: str, devices: Sequence[torch.device], *, scale_batch: bool = False) -> list[str]:
    """Return, as lines of text, what a run would do with a script.

    Args:
        source: the script's text.
        name: the script's name in the text.
        devices: the devices of the run.
        scale_batch: whether the run would multiply batch sizes.

    Raises:
        ConfigError: the text is not Python.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ConfigError(f"{name}, line {error.lineno}: {error.msg}. Correct the script first.") from error
    except (ValueError, RecursionError, MemoryError) as error:  # ast's errors for null bytes and deep nesting
        reason = (
            "its expressions are nested too deep" if isinstance(error, RecursionError | MemoryError) else str(error)
        )
        raise ConfigError(f"{name} cannot be read as Python: {reason}. Correct the script first.") from error
    lines = [f"{name} would run once, in one process, on {describe_devices(devices)}."]
    if len(devices) == 1:
        return [*lines, "On one device it would run as it does without duoka."]
    calls = sorted((node for node in ast.walk(tree) if isinstance(node, ast.Call)), key=lambda node: node.lineno)
    meanings = [(node, _meaning(node, len(devices), scale_batch=scale_batch)) for node in calls]
    found = [f"  line {node.lineno}: {_shorten(ast.unparse(node))}\n      {text}" for node, text in meanings if text]
    lines += dict.fromkeys(found)
    if not any(_RUNS_ON_ALL in text for _, text in meanings):
        lines.append(
            "It does not move a model to a device, wrap it, or create an optimizer. Unless a module that it imports does, "
            "it would run as it does without duoka."
        )
    return [
        *lines,
        "duoka checks each model on its first batch and splits it only if the parts give the result of the whole batch.",
    ]


def _shorten(code: str) -> str:
    return code if len(code) <= 100 else f"{code[:97]}..."


def _meaning(node: ast.Call, devices: int, *, scale_batch: bool) -> str:
    """Return what a call means for the run; empty for most calls."""
    function = ast.unparse(node.func)
    name = function.rpartition(".")[2]
    if name == "DataLoader":
        return _loader_meaning(node, devices, scale_batch=scale_batch)
    if any(keyword.arg == "create_graph" and ast.unparse(keyword.value) == "True" for keyword in node.keywords):
        return "differentiates gradients: every model of this script runs on one device"
    if name in _OPTIMIZERS and node.args:
        return f"the model that owns these parameters {_RUNS_ON_ALL}"
    if name in ("to", "cuda") and isinstance(node.func, ast.Attribute) and _looks_like_model(node.func.value):
        return f"a model {_RUNS_ON_ALL}, each with its part of the batch; anything else moves as usual"
    known = (text for key, text in _CALLS.items() if function == key or function.endswith(f".{key}"))
    return next(known, "").format(devices=devices)


def _looks_like_model(owner: ast.expr) -> bool:
    """Return whether an expression may be a model: a capitalized call, or a name such as ``model``."""
    if isinstance(owner, ast.Call):
        return ast.unparse(owner.func).rpartition(".")[2][:1].isupper()
    name = ast.unparse(owner).rpartition(".")[2].lower()
    return any(word in name for word in _MODEL_WORDS)


def _loader_meaning(node: ast.Call, devices: int, *, scale_batch: bool) -> str:
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    size = options.get("batch_size") or (node.args[1] if len(node.args) > 1 else None)
    if size is None:
        return ""
    text = ast.unparse(size)
    if scale_batch and "shuffle" in options and ast.unparse(options["shuffle"]) != "False":
        return f"--scale-batch: batch size {text} becomes {devices} x {text}, {text} per device"
    if isinstance(size, ast.Constant) and isinstance(size.value, int):
        return f"each batch of {text} is split into {devices} parts of about {max(1, size.value // devices)}"
    return f"each batch of {text} is split into {devices} parts"
