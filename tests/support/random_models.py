"""Models put together at random: layers, state that changes between calls, inputs and outputs of many forms."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

FEATURES = 4
scale_of_module = 1.0
"""A global variable that ``Scale`` reads."""


class _Slots:
    __slots__ = ("value",)


class _Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


def _closure(value: float) -> tuple[Callable[[], float], Callable[[float], None]]:
    def read() -> float:
        return value

    def write(new: float) -> None:
        nonlocal value
        value = new

    return read, write


class Scale(nn.Module):
    """Multiplies by a number that it keeps in one of many places; ``change`` writes it in place."""

    class_value = 1.0

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        make = getattr(self, f"_make_{place}", None)
        if make is not None:
            make()

    def _make_attribute(self) -> None:
        self.value = 1.0

    def _make_nested(self) -> None:
        self.config = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(d=1.0))))

    def _make_large_dict(self) -> None:
        self.config = {f"key{index}": 1.0 for index in range(100)}

    def _make_deque(self) -> None:
        self.queue = collections.deque([1.0])

    def _make_slots(self) -> None:
        self.config = _Slots()
        self.config.value = 1.0

    def _make_array(self) -> None:
        self.array = np.ones(3)

    def _make_set(self) -> None:
        self.numbers = {1.0}

    def _make_closure(self) -> None:
        self.read, self.write = _closure(1.0)

    def _make_buffer(self) -> None:
        self.register_buffer("weight", torch.ones(FEATURES))

    def _make_parameter(self) -> None:
        self.weight = nn.Parameter(torch.ones(FEATURES))

    def _make_tensor(self) -> None:
        self.weight = torch.ones(FEATURES)

    def _make_trained_tensor(self) -> None:
        self.weight = torch.ones(FEATURES, requires_grad=True)

    def _make_trained_buffer(self) -> None:
        self.register_buffer("weight", torch.ones(FEATURES, requires_grad=True))

    def _make_tensor_in_list(self) -> None:
        self.weights = [torch.ones(FEATURES, requires_grad=True)]

    def _make_tensor_in_object(self) -> None:
        self.holder = _Plain(torch.ones(FEATURES, requires_grad=True))

    def _make_hidden_layer(self) -> None:
        self.layers = [nn.Linear(FEATURES, FEATURES)]

    def _make_hidden_module(self) -> None:
        object.__setattr__(self, "teacher", nn.Linear(FEATURES, FEATURES))

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that ``parameters()`` does not have and that may get gradients."""
        return {
            "trained_tensor": lambda: [self.weight],
            "trained_buffer": lambda: [self.weight],
            "tensor_in_list": lambda: self.weights,
            "tensor_in_object": lambda: [self.holder.value],
            "hidden_layer": lambda: list(self.layers[0].parameters()),
            "hidden_module": lambda: list(self.teacher.parameters()),
        }.get(self.place, list)()

    def change(self, value: float) -> None:  # noqa: C901 - one branch a place
        global scale_of_module
        with torch.no_grad():
            if self.place == "attribute":
                self.value = value
            elif self.place == "nested":
                self.config.a.b.c.d = value
            elif self.place == "large_dict":
                self.config["key77"] = value
            elif self.place == "deque":
                self.queue.append(value)
            elif self.place == "slots":
                self.config.value = value
            elif self.place == "array":
                self.array[1] = value
            elif self.place == "set":
                self.numbers.add(value)
            elif self.place == "closure":
                self.write(value)
            elif self.place == "class":
                type(self).class_value = value
            elif self.place == "global":
                scale_of_module = value
            elif self.place in ("buffer", "parameter", "tensor"):
                self.weight.fill_(value)
            else:
                for tensor in self.tensors():
                    tensor.fill_(value / FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.place == "hidden_layer":
            return self.layers[0](x)
        if self.place == "hidden_module":
            return self.teacher(x)
        if self.place == "tensor_in_list":
            return x * self.weights[0]
        if self.place == "tensor_in_object":
            return x * self.holder.value
        if hasattr(self, "weight"):
            return x * self.weight
        factor: float = {
            "attribute": lambda: self.value,
            "nested": lambda: self.config.a.b.c.d,
            "large_dict": lambda: self.config["key77"],
            "deque": lambda: sum(self.queue),
            "slots": lambda: self.config.value,
            "array": lambda: float(self.array.sum()),
            "set": lambda: sum(self.numbers),
            "closure": lambda: self.read(),
            "class": lambda: self.class_value,
            "global": lambda: scale_of_module,
        }[self.place]()
        return x * factor


PLACES = (*(name.removeprefix("_make_") for name in vars(Scale) if name.startswith("_make_")), "class", "global")


class Center(nn.Module):
    """Subtracts the mean over the batch: no part of a batch can compute it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Choose(nn.Module):
    """Keeps the features with the largest mean over the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros(FEATURES, dtype=x.dtype).index_fill_(0, x.abs().mean(0).topk(2).indices, 1.0)
        return x * kept


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(FEATURES, FEATURES, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x[:, None].expand(-1, 3, -1))[0][:, -1]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, FEATURES),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "layer norm": lambda: nn.LayerNorm(FEATURES),
    "batch norm": lambda: nn.BatchNorm1d(FEATURES),
    "dropout": lambda: nn.Dropout(0.5),
    "recurrent": Recurrent,
    "center": Center,
    "choose": Choose,
    **{f"scale by {place}": (lambda place=place: Scale(place)) for place in PLACES},
}


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


@dataclasses.dataclass
class Record:
    hidden: torch.Tensor
    count: int


OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y.sum(1)),
    "dict": lambda y: {"logits": y, "aux": [y * 2, {"deep": y.tanh()}]},
    "named tuple": lambda y: Pair(y, None),
    "data class": lambda y: Record(y, 3),
    "own class": lambda y: _Plain(y),
    "list of a tensor and none": lambda y: [y, None],
    "list of a tensor and a dict": lambda y: [y, {"aux": y * 2}],
    "list of rows": list,
    "list of rows of different lengths": lambda y: [row.expand(i % 2 + 1, FEATURES) for i, row in enumerate(y)],
    "list of dicts": lambda y: [{"row": row, "index": torch.tensor(1)} for row in y],
    "time first": lambda y: (y, y.expand(2, -1, -1)),
    "transposed": lambda y: y.T,
    "mean": lambda y: y.square().mean(),
    "sum": lambda y: y.square().sum(),
    "mean over the batch": lambda y: y.mean(0, keepdim=True),
    "gram matrix": lambda y: y @ y.T,
    "array": lambda y: (y, y.detach().numpy()),
    "array of no samples": lambda y: (y, np.arange(3.0)),
    "number of samples": lambda y: (y, len(y)),
    "number": lambda y: (y, float(y.detach().mean())),
    "text": lambda y: (y, f"{len(y)} rows"),
    "constant text": lambda y: (y, "rows"),
    "set": lambda y: {y},
    "sparse": lambda y: (y, y.detach().to_sparse()),
    "distribution": lambda y: torch.distributions.Normal(y, torch.ones_like(y)),
    "generator": lambda y: (row for row in y),
    "keys of the data": lambda y: {"y": y, **({"positive": y} if y[0, 0] > 0 else {})},
    "none for some": lambda y: {"y": y, "other": y if y[0, 0] > 0 else None},
    "with a weight": lambda y: (y, torch.arange(3.0)),
    "squeezed": lambda y: y.sum(1, keepdim=True).squeeze(),
}


def make_input(form: str, x: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call: ``x``, ``(batch, FEATURES)``, in one of many forms."""
    batch = len(x)
    if form == "packed":
        return (
            pack_sequence([row.expand(length, FEATURES) for length, row in zip(range(batch, 0, -1), x, strict=True)]),
        ), {}
    others: dict[str, Any] = {
        "names": [f"name{index}" for index in range(batch)],
        "factors": [float(index + 1) for index in range(batch)],
        "array": np.arange(1.0, batch + 1),
        "mask": torch.arange(batch) % 2 == 0,
        "weight": torch.arange(1.0, FEATURES + 1),
        "square": torch.eye(batch),
        "edges": torch.stack([torch.arange(batch), torch.arange(batch).flip(0)]),
        "number": batch,
        "config": {"factor": 2.0, "names": ["a"] * batch},
        "object": _Plain(torch.arange(1.0, batch + 1)),
        "list of tensors": [torch.full((index + 1,), index + 1.0) for index in range(batch)],
    }
    if form == "list":
        return ([x, x * 2],), {}
    if form == "dict":
        return ({"x": x, "y": x * 2},), {}
    return (x,), {"other": others[form]} if form in others else {}


INPUTS = (
    "tensor", "list", "dict", "packed", "names", "factors", "array", "mask", "weight", "square", "edges", "number",
    "config", "object", "list of tensors",
)  # fmt: skip


def _read_input(x: Any, other: Any) -> torch.Tensor:
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        return padded.sum(1) / lengths[:, None]
    if isinstance(x, list):
        return x[0] + x[1]
    if isinstance(x, dict):
        return x["x"] + x["y"]
    if other is None:
        return x
    if isinstance(other, list) and isinstance(other[0], str):
        return torch.stack([row * int(name.removeprefix("name")) for row, name in zip(x, other, strict=False)])
    if isinstance(other, list) and isinstance(other[0], float):
        return torch.stack([row * factor for row, factor in zip(x, other, strict=False)])
    if isinstance(other, list):
        return torch.stack([row * tensor.sum() for row, tensor in zip(x, other, strict=False)])
    if isinstance(other, np.ndarray):
        return x * torch.from_numpy(other[: len(x)]).to(x)[:, None]
    if isinstance(other, dict):
        return x * other["factor"]
    if isinstance(other, _Plain):
        return x * other.value[: len(x), None]
    if isinstance(other, int):
        return x / other
    return _read_tensor(x, other)


def _read_tensor(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if other.dtype == torch.bool:
        return x * other[:, None]
    if other.dtype == torch.int64:  # edges of a graph
        return torch.zeros_like(x).index_add(0, other[1], x[other[0]])
    if other.dim() == 2:
        return other.to(x) @ x
    return x * other.to(x)


class RandomModel(nn.Module):
    """Layers, and an output of one of many forms."""

    def __init__(self, layers: list[str], output: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(LAYERS[name]() for name in layers))
        self.output = output

    def forward(self, x: Any, other: Any = None) -> Any:
        return OUTPUTS[self.output](self.layers(_read_input(x, other)))

    def change(self, value: float) -> None:
        """Change the state that lies outside parameters."""
        for layer in self.layers:
            if isinstance(layer, Scale):
                layer.change(value)

    def leaves(self) -> list[torch.Tensor]:
        """Return all tensors that may get gradients."""
        hidden = [tensor for layer in self.layers if isinstance(layer, Scale) for tensor in layer.tensors()]
        return [*self.parameters(), *hidden]


def reset_shared_state() -> None:
    global scale_of_module
    scale_of_module = Scale.class_value = 1.0
