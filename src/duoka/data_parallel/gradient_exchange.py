"""One backward that runs on the workers: the requests, and the gradients that come back."""

from collections.abc import Sequence

import torch

from duoka.data_parallel.messages import BackwardRequest, BackwardResult
from duoka.data_parallel.tensor_layout import TensorSpec, copy_to_layout, pack_present, repack_layout, tensor_at
from duoka.data_parallel.transport.base import GradientLayout
from duoka.data_parallel.transport.gradient_reduction import GradientReduction
from duoka.data_parallel.worker_group import WorkerGroup
from duoka.utils.torch_private import add_in_place
from duoka.workers.serialization import load_and_close


class GradientExchange:
    """Sends workers the gradients of their outputs, and receives those of parameters and inputs."""

    def __init__(
        self,
        group: WorkerGroup,
        call_id: int,
        gradients: Sequence[Sequence[torch.Tensor | None]],
        inputs: Sequence[Sequence[TensorSpec | None]],
        layout: GradientLayout,
        *,
        keep_graph: bool,
    ) -> None:
        """Send the requests.

        For each worker with a chunk, ``gradients`` has those of its outputs, and ``inputs`` the spec of each input,
        ``None`` where no gradient is needed. ``call_id`` and ``layout`` are those of the forward. Where gradients are
        reduced, workers without a chunk join.
        """
        self._group, self._layout = group, layout
        self._requests: list[tuple[int, int]] = []
        self._blocks: dict[int, tuple[torch.Tensor, list[TensorSpec | None]]] = {}
        """Block of each worker, and the specs of its input gradients there."""
        buckets = tuple((bucket.nbytes, bucket.dtype) for bucket in layout.buckets)
        returned: dict[int, torch.Tensor] = {}
        for index in range(len(group.devices) - 1):
            given = gradients[index] if index < len(gradients) else ()
            is_used = any(gradient is not None for gradient in given)
            if not is_used and not buckets:
                continue
            outputs, end = pack_present(given, layout.nbytes)
            specs, size = repack_layout(inputs[index] if is_used else (), end)
            allocation = group.transport.allocate(size)
            copy_to_layout(allocation.base, outputs, given)
            request = BackwardRequest(
                group.new_call_id(),
                call_id,
                allocation.location,
                end,
                tuple(outputs),
                tuple(specs),
                keep_graph,
                buckets,
                size - end,
            )
            group.request(index, request, allocation)
            self._requests.append((index, request.call_id))
            self._blocks[index] = allocation.base, specs
            if size > end:
                returned[index] = allocation.base[end:]
        self._reduction: GradientReduction | None = None
        if group.transport.is_collective:
            self._reduction = group.transport.start_reduction(layout.buckets, returned)

    def wait(self) -> tuple[dict[int, torch.Tensor], dict[int, dict[int, torch.Tensor]]]:
        """Return sums of gradients by parameter, and input gradients by worker and input."""
        results = self._group.results(self._requests)
        sums = self._sum_parameters(results)
        inputs: dict[int, dict[int, torch.Tensor]] = {}
        for (index, _), result in zip(self._requests, results, strict=True):
            if result.payload.data:
                _add_gradients(sums, load_and_close(result.payload, self._group.devices[0]))
            block, specs = self._blocks[index]
            inputs[index] = {n: tensor_at(block, spec) for n in result.inputs if (spec := specs[n]) is not None}
        return sums, inputs

    def discard(self) -> None:
        """Drop the gradients when they arrive; keep the memory of transfers under way until they are complete."""
        replies = iter(range(len(self._requests) - 1, -1, -1))

        def wait_after_last() -> None:
            if self._reduction is not None and next(replies) == 0:
                self._reduction.wait()

        for index, call_id in self._requests:
            self._group.discard_result(index, call_id, wait_after_last)

    def _sum_parameters(self, results: Sequence[BackwardResult]) -> dict[int, torch.Tensor]:
        """Return the sums of the parameter gradients that are not inside the results."""
        if self._reduction is not None:
            with self._group.stop_on_error():
                self._reduction.wait()
            return self._reduction.sums({n for result in results for n in result.parameters})
        sums: dict[int, torch.Tensor] = {}
        for (index, _), result in zip(self._requests, results, strict=True):
            block, specs = self._blocks[index][0], self._layout.specs
            new = {n: tensor_at(block, spec) for n in result.parameters if (spec := specs[n]) is not None}
            _add_gradients(sums, new)
        return sums


def _add_gradients(sums: dict[int, torch.Tensor], new: dict[int, torch.Tensor]) -> None:
    """Add gradients to the sums; a sum may be the first worker's memory, changed in place."""
    both = [n for n in new if n in sums and sums[n].layout is torch.strided and new[n].layout is torch.strided]
    if both:
        add_in_place([sums[n] for n in both], [new[n] for n in both])
    for n in new.keys() - set(both):
        sums[n] = sums[n] + new[n] if n in sums else new[n]
