"""Worker group: the workers of one device list, which all wrapped models of this process share."""

import contextlib
import functools
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from duoka.data_parallel.call_context import TIMERS, ThreadLimit
from duoka.data_parallel.messages import DeleteReplica, ForwardRequest, Notification, Request, decode, encode
from duoka.data_parallel.tensor_layout import Allocation
from duoka.data_parallel.transport import OwnerTransport
from duoka.data_parallel.transport.base import Completion
from duoka.data_parallel.transport.collective import CollectiveOwnerTransport, synchronize
from duoka.data_parallel.transport.shared import SharedOwnerTransport
from duoka.data_parallel.transport.shared_memory import SharedArena, isolated_arenas
from duoka.data_parallel.worker import worker_loop
from duoka.devices.cpu import threads_per_rank
from duoka.workers import WorkerSession, exceptions
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload

COLLECTIVE_ON_CPU = "DUOKA_COLLECTIVE_TRANSPORT"
"""Environment variable for tests: if set, CPU workers use the collective transport, over gloo."""


class _OpenRequest(NamedTuple):
    """A request without a reply: its memory, and the transfers to wait for when the reply arrives."""

    allocation: Allocation
    completions: list[Completion]
    task: str


class WorkerGroup:
    """Workers for all devices but the first. The first request starts them, also after a failure."""

    def __init__(self, devices: Sequence[torch.device], transport: OwnerTransport) -> None:
        self.devices = tuple(devices)
        self.transport = transport
        self._worker_threads = min(torch.get_num_threads(), threads_per_rank(len(devices)))
        self.thread_limit = ThreadLimit(self._worker_threads if devices[0].type == "cpu" else torch.get_num_threads())
        self.lock = threading.RLock()
        self.in_forward = False
        self.generation = 0
        """Changes whenever workers start or stop: new workers lack what earlier ones received."""
        self._pid = os.getpid()
        self._call_ids = itertools.count(1)
        self._session: WorkerSession | None = None
        self.num_models = 0
        self._arrived: dict[tuple[int, int], Message] = {}
        """Results to be fetched, by worker index and call ID."""
        self._requested: dict[tuple[int, int], _OpenRequest] = {}
        self._unwanted: set[tuple[int, int]] = set()
        self._to_discard: deque[tuple[int, int, Completion | None]] = deque()
        self._to_release: deque[int] = deque()
        self._to_delete: deque[int] = deque()
        self._released_calls: list[list[int]] = []

    @property
    def is_owned(self) -> bool:
        """Whether this process started the workers; a forked child did not."""
        return os.getpid() == self._pid

    def remove_model(self, model: int) -> None:
        """Delete a model's replicas; release the workers with the last model."""
        if not self.is_owned:
            return
        with self.lock:
            self._to_delete.append(model)
            self.num_models -= 1
            if self.num_models == 0:
                self.stop(in_good_order=True)

    def new_call_id(self) -> int:
        """Return a number that no other request has."""
        return next(self._call_ids)

    def start(self) -> None:
        """Start the workers if they are not running."""
        if self._session is not None and self._session.was_closed_by_user:
            self.stop()
        if self._session is not None:
            return
        self.generation += 1
        self._released_calls = [[] for _ in self.devices[1:]]
        configs = self.transport.worker_configs(self._worker_threads)
        try:
            self._session = WorkerSession(worker_loop, configs, (), self.devices[1:])
            if self.transport.is_collective:
                self.transport.connect(self._session)
        except BaseException:
            self.stop()
            raise

    def post(self, message: Notification) -> None:
        """Send a message without a result to every worker."""
        encoded = encode(message)
        for index in range(len(self.devices) - 1):
            self._send(index, "post", encoded)

    def request(self, index: int, request: Request, allocation: Allocation) -> None:
        """Send a request to worker ``index``; ``allocation`` is kept until the result arrives."""
        with self.lock:
            self._process_discards()
            released, self._released_calls[index] = self._released_calls[index], []
            task = f"computes a {'forward' if isinstance(request, ForwardRequest) else 'backward'} pass"
            opened = self._requested[index, request.call_id] = _OpenRequest(allocation, [], task)
            self._send(index, "request", encode(request._replace(released_calls=tuple(released))))
            if self.transport.is_collective and request.nbytes:
                with self.stop_on_error():
                    opened.completions.append(self.transport.send_inputs(index, allocation.base[: request.nbytes]))

    def results(
        self, requests: Sequence[tuple[int, int]], receive: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        """Wait for all results, and return them, or raise what a worker has raised.

        ``receive(index, result)`` receives the tensors that follow a result, after failures too.
        """
        with self.lock, TIMERS.wait():
            self._process_discards()
            messages = [(index, self._receive((index, call_id))) for index, call_id in requests]
        results: list[Any] = []
        error: BaseException | None = None
        for index, message in messages:
            if not message.kind.startswith("error"):
                results.append(decode(message.payload))
                if receive is not None:
                    with self.stop_on_error():
                        receive(index, results[-1])
            elif error is None:
                worker = self._running_session().workers[index]
                error = exceptions.deserialize_exception(message.payload, worker.rank, worker.label, self.devices[0])
            else:
                message.payload.close()
        if error is not None:
            for result in results:
                result.payload.close()
            raise error
        return results

    def release_graph(self, call_id: int) -> None:
        """Note that a forward's graph is not needed. Safe during garbage collection: only appends."""
        self._to_release.append(call_id)

    def discard_result(self, index: int, call_id: int, wait: Completion | None = None) -> None:
        """Drop a result when it arrives, then call ``wait``. Safe during garbage collection, too."""
        self._to_discard.append((index, call_id, wait))

    @contextlib.contextmanager
    def stop_on_error(self) -> Iterator[None]:
        """Stop the workers if the ``with`` block, which transfers tensors, fails half-way."""
        try:
            yield
        except BaseException as error:
            death = self._find_death() if exceptions.is_secondary_failure(error) else None
            self.stop()
            if death is not None:
                raise death from None
            raise

    def stop(self, *, in_good_order: bool = False) -> None:
        """Kill the workers, whose state is unknown; or release them ``in_good_order``, for later use."""
        session, self._session = self._session, None
        self.generation += 1
        self.thread_limit.release()
        for collection in (self._arrived, self._requested, self._unwanted, self._to_discard):
            collection.clear()
        if not self.is_owned:
            return
        if session is not None and in_good_order:
            synchronize(self.devices[0])
            session.close()
        elif session is not None:
            session.kill()
        self.transport.close()

    def _process_discards(self) -> None:
        """Drop discarded results. Until one arrives, the worker may use its request's memory."""
        while self._to_discard:
            index, call_id, wait = self._to_discard.popleft()
            key = index, call_id
            if key in self._requested:
                self._unwanted.add(key)
                self._requested[key].completions.extend([wait] if wait is not None else [])
                continue
            if (message := self._arrived.pop(key, None)) is not None:
                message.payload.close()
            if wait is not None:
                with self.stop_on_error():
                    wait()

    def _find_death(self) -> BaseException | None:
        """Return the death of a worker that is dead or about to die."""
        deadline = time.monotonic() + exceptions.SECONDARY_FAILURE_WAIT_S
        while self._session is not None and time.monotonic() < deadline:
            for worker in self._session.workers:
                if not worker.is_alive():
                    return worker.death()
            time.sleep(0.01)
        return None

    def _running_session(self) -> WorkerSession:
        assert self._session is not None, "start() comes first"
        return self._session

    def _send(self, index: int, kind: str, payload: Payload) -> None:
        """Send a message, after what must precede it: new memory and deleted models."""
        try:
            session = self._running_session()
            if not self.transport.is_collective:
                for name, segment in self.transport.pending_messages(index):
                    session.send(index, name, segment)
            while self._to_release:
                call_id = self._to_release.popleft()
                for released in self._released_calls:
                    released.append(call_id)
            while self._to_delete:
                message = encode(DeleteReplica(self._to_delete.popleft()))
                for other in range(len(self.devices) - 1):
                    session.send(other, "post", message)
            session.send(index, kind, payload)
        except BaseException:
            self.stop()
            raise

    def _receive(self, key: tuple[int, int]) -> Message:
        while key not in self._arrived:
            with self.stop_on_error():
                index, message = self._running_session().receive([key[0]], self._requested[key].task)
                self._dispatch(index, message)
        return self._arrived.pop(key)

    def _dispatch(self, index: int, message: Message) -> None:
        if not self.transport.is_collective and self.transport.try_handle(index, message):
            return
        key = index, int(message.kind.partition(":")[2])
        completions = self._requested.pop(key).completions
        if key in self._unwanted:
            self._unwanted.discard(key)
            message.payload.close()
        else:
            self._arrived[key] = message
        for wait in completions:  # complete, because the worker has replied
            wait()


class WorkerGroupRef:
    """A model's claim on a worker group, held by its controller and each of its calls."""

    def __init__(self, group: WorkerGroup, model: int) -> None:
        group.num_models += 1
        self._finalizer = weakref.finalize(self, _remove_model_later, group, model)
        self._finalizer.atexit = False
        self._group, self._model = group, model

    def end(self) -> None:
        """End the claim now, although others may hold it."""
        if self._finalizer.detach():
            self._group.remove_model(self._model)


def _remove_model_later(group: WorkerGroup, model: int) -> None:
    """Remove the model in a thread, because the garbage collector may run in the middle of anything.

    The interpreter waits for it at exit. During exit no thread starts; workers end with the process.
    """
    if group.is_owned and threading.main_thread().is_alive():
        with contextlib.suppress(RuntimeError):  # the interpreter is exiting
            threading.Thread(target=group.remove_model, args=(model,), name="duoka-close", daemon=False).start()


def get_worker_group(devices: Sequence[torch.device]) -> WorkerGroup:
    """Return this process's worker group of a device list; it lives as long as a model uses it."""
    groups, weights = _process_state(os.getpid())
    is_collective = devices[0].type != "cpu" or bool(os.environ.get(COLLECTIVE_ON_CPU))
    key = (str(is_collective), *map(str, devices))
    group = groups.get(key)
    if group is None:
        transport = CollectiveOwnerTransport(devices) if is_collective else SharedOwnerTransport(devices, weights)
        group = groups[key] = WorkerGroup(devices, transport)
    return group


@functools.lru_cache(maxsize=1)
def _process_state(pid: int) -> tuple[weakref.WeakValueDictionary[tuple[str, ...], WorkerGroup], SharedArena]:  # noqa: ARG001
    """Return the groups of process ``pid``, and the memory of its parameters; a fork has its own."""
    weights = SharedArena("weights")
    isolated_arenas().add(weights)
    return weakref.WeakValueDictionary(), weights
