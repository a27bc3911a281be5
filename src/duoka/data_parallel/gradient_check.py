"""Comparison of the gradients of joined outputs with those of a whole batch."""

from collections.abc import Sequence

import torch

from duoka.data_parallel.gather import Path


def compare_gradients(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, Path]],
    leaves: dict[str, torch.Tensor],
    inputs: Sequence[tuple[torch.Tensor, list[torch.Tensor], int | None]],
) -> str:
    """Return which gradient of the joined outputs differs from that of the whole batch's outputs.

    ``inputs`` are those of the whole batch and of the parts, and the dimension along which they were split.
    """
    if not pairs:
        return ""
    generator = torch.Generator("cpu").manual_seed(0)
    directions = [torch.randn(one.shape, generator=generator, device="cpu").to(one) for one, *_ in pairs]
    tensors, others = list(leaves.values()), [part for _, parts, _ in inputs for part in parts]
    own = [*tensors, *(one for one, *_ in inputs)]
    if not own:
        return ""
    whole = torch.autograd.grad([one for one, *_ in pairs], own, directions, allow_unused=True)
    joined = torch.autograd.grad([other for _, other, _ in pairs], [*tensors, *others], directions, allow_unused=True)
    gradients = list(zip(leaves, whole, joined, strict=False))
    rest = iter(joined[len(tensors) :])
    for one, (_, parts, dim) in zip(whole[len(tensors) :], inputs, strict=True):
        pieces = [next(rest) for _ in parts]
        if all(piece is not None for piece in pieces):
            gradients.append(("an input", one, torch.stack(pieces).sum(0) if dim is None else torch.cat(pieces, dim)))
    tolerance = _gradient_tolerance([one for one, *_ in pairs])
    largest = max((float(g.detach().abs().max()) for g in whole if g is not None and g.numel()), default=0.0)
    for name, one, other in gradients:
        if not _is_close_gradient(one, other, tolerance, largest):
            return f"the gradient of {name} depends on how the batch is split"
    return ""


def _gradient_tolerance(outputs: Sequence[torch.Tensor]) -> float:
    dtypes = {output.dtype for output in outputs}
    if torch.is_autocast_enabled(outputs[0].device.type) or dtypes & {torch.bfloat16, torch.float16}:
        return 1e-1
    if outputs[0].device.type != "cpu":
        return 2e-2  # TF32 and other algorithms for other batch sizes
    return 1e-6 if dtypes == {torch.float64} else 2e-3


def _is_close_gradient(one: torch.Tensor | None, other: torch.Tensor | None, tolerance: float, largest: float) -> bool:
    if one is None or other is None:
        rest = one if other is None else other
        return rest is None or not rest.numel() or float(rest.detach().abs().max()) <= tolerance * largest
    one, other = (g.to_dense() if g.layout is not torch.strided else g for g in (one, other))
    scale = max(float(one.detach().abs().max()), 1e-2 * largest) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * max(scale, 1e-12), equal_nan=True)
