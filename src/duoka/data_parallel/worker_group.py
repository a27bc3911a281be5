"""The helpers of one list of devices, shared by all wrapped models of this process: asked, answered, ended, started anew."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from duoka.data_parallel.call_context import ThreadLimit
from duoka.data_parallel.messages import (
    BackwardRequest,
    CreateReplica,
    DeleteReplica,
    ForwardRequest,
    RebindParameters,
    ReceiveWeights,
    UpdateAttributes,
)
from duoka.data_parallel.timers import CLOCK
from duoka.data_parallel.transport.base import OwnerTransport, PendingWork
from duoka.data_parallel.transport.collective import CollectiveOwnerTransport
from duoka.data_parallel.transport.shared import SharedOwnerTransport
from duoka.data_parallel.transport.shared_memory import Allocation, SharedArena
from duoka.data_parallel.worker import serve
from duoka.devices.cpu import threads_per_rank
from duoka.workers import WorkerSession, exceptions
from duoka.workers.channel import Message
from duoka.workers.serialization import Payload

__all__ = ["WorkerGroup", "crew_of"]

_SENDS_ON_CPU = "DUOKA_MIRROR_SENDS"
"""For tests: where this environment variable is set, CPU workers are sent their tensors as accelerators are, over gloo."""


class WorkerGroup:
    """Helpers for all devices but the first; they are started by the first question, and by the first after a failure."""

    def __init__(self, devices: Sequence[torch.device], transport: OwnerTransport) -> None:
        self.devices = tuple(devices)
        self.transport = transport
        share = min(torch.get_num_threads(), threads_per_rank(len(devices)))
        self.threads = ThreadLimit(share if devices[0].type == "cpu" else torch.get_num_threads())
        self._helpers_threads = share
        self.lock = threading.RLock()
        self.in_forward = False
        self.generation = 0
        """Another number whenever helpers start or end: what earlier ones were sent must be sent again."""
        self._pid = os.getpid()
        self._tickets = itertools.count(1)
        self._conversation: WorkerSession | None = None
        self._members = 0
        self._answers: dict[tuple[int, int], Message] = {}
        self._asked: dict[tuple[int, int], tuple[Any, Sequence[PendingWork]]] = {}
        self._unwanted: set[tuple[int, int]] = set()
        self._dropped: deque[int] = deque()
        self._given_up: deque[tuple[int, int, PendingWork | None]] = deque()
        self._forgotten: deque[int] = deque()
        self._finished: list[list[int]] = []

    @property
    def is_ours(self) -> bool:
        """Whether this process started the helpers: a forked child did not."""
        return os.getpid() == self._pid

    def join(self) -> None:
        """One more model uses the helpers."""
        self._members += 1

    def leave(self, model: int) -> None:
        """A model is gone; with the last one the helpers are given back. Not by a forked child, which does not own them."""
        if not self.is_ours:
            return
        with self.lock:
            self._forgotten.append(model)
            self._members -= 1
            if self._members == 0:
                self._end()

    def drop(self, ticket: int) -> None:
        """Note that nobody will ask for the backward of a forward any more; called when it is collected, so do nothing."""
        self._dropped.append(ticket)

    def new_ticket(self) -> int:
        """Return a number that no other question has."""
        return next(self._tickets)

    def start(self) -> None:
        """Make sure that the helpers are there."""
        if self._conversation is not None:
            return
        self.generation += 1
        count = len(self.devices) - 1
        self._finished = [[] for _ in range(count)]
        posts = self.transport.posts(self._helpers_threads)
        try:
            self._conversation = WorkerSession(serve, posts, (), self.devices[1:], temp_dir=self.transport.folder)
            self.transport.connect(self._conversation)
        except BaseException:
            self.stop()
            raise

    def tell(
        self, message: CreateReplica | UpdateAttributes | ReceiveWeights | RebindParameters, fd: int | None = None
    ) -> None:
        """Tell every helper something that has no answer."""
        for index in range(len(self.devices) - 1):
            self._send(index, "tell", Payload(pickle.dumps(message), fd=fd))

    def ask(
        self, index: int, question: ForwardRequest | BackwardRequest, lease: Allocation, fd: int | None = None
    ) -> None:
        """Send a question to helper ``index``; its answer is fetched with ``answers``, and ``lease`` kept as long."""
        with self.lock:
            self._forget_given_up()
            finished, self._finished[index] = self._finished[index], []
            self._asked[index, question.ticket] = lease, ()
            body = pickle.dumps(question._replace(done_with=tuple(finished)))
            self._send(index, "ask", Payload(body, fd=fd))
            with self.all_or_none():
                if (pending := self.transport.deliver(index, lease)) is not None:
                    self._asked[index, question.ticket] = lease, [pending]

    def answers(self, asked: Sequence[tuple[int, int]]) -> list[tuple[Any, int | None]]:
        """Wait for all answers and return each and the file that came with it; raises what a helper raised, or WorkerDied."""
        answers, failed = self.await_all(asked)
        if failed is not None:
            for _, fd in answers.values():
                if fd is not None:
                    os.close(fd)
            raise failed
        return list(answers.values())

    def await_all(
        self, asked: Sequence[tuple[int, int]]
    ) -> tuple[dict[int, tuple[Any, int | None]], BaseException | None]:
        """Wait for all answers; return them by helper, and the first failure; raises WorkerDied."""
        with self.lock, CLOCK.waits():
            self._forget_given_up()
            messages = [(index, self._await((index, ticket))) for index, ticket in asked]
        answers: dict[int, tuple[Any, int | None]] = {}
        failed: BaseException | None = None
        for index, message in messages:
            if not message.kind.startswith("raised"):
                answers[index] = pickle.loads(message.payload.data), message.payload.fd
            elif failed is None:
                helper = self._talk().workers[index]
                failed = exceptions.deserialize_exception(message.payload, helper.rank, helper.label, self.devices[0])
            else:
                message.payload.close()
        return answers, failed

    def give_up(self, index: int, ticket: int, rest: PendingWork | None = None) -> None:
        """Note that nobody waits for an answer any more; ``rest`` is waited for when it has come.

        Called when something is collected, so do nothing else.
        """
        self._given_up.append((index, ticket, rest))

    def _forget_given_up(self) -> None:
        """Until the answer comes the helper may still use the memory that it was given."""
        while self._given_up:
            index, ticket, rest = self._given_up.popleft()
            key = index, ticket
            if key in self._asked:
                self._unwanted.add(key)
                lease, pending = self._asked[key]
                self._asked[key] = lease, [*pending, *([rest] if rest is not None else [])]
                continue
            if (message := self._answers.pop(key, None)) is not None:
                message.payload.close()
            if rest is not None:
                with self.all_or_none():
                    rest.wait()

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """End the helpers if the ``with`` block, in which tensors are sent or received, is left half-way."""
        try:
            yield
        except BaseException as error:
            death = self._death() if exceptions.is_secondary_failure(error) else None
            self.stop()
            if death is not None:
                raise death from None
            raise

    def _death(self) -> BaseException | None:
        """Return the death of a helper, if there is or is about to be one."""
        deadline = time.monotonic() + exceptions.SECONDARY_FAILURE_WAIT_S
        while self._conversation is not None and time.monotonic() < deadline:
            for helper in self._conversation.workers:
                if not helper.is_alive():
                    return helper.death()
            time.sleep(0.01)
        return None

    def stop(self) -> None:
        """End the helpers now: their state is not known any more, or the user has pressed Ctrl-C."""
        conversation, self._conversation = self._conversation, None
        self._answers.clear()
        self._asked.clear()
        self._unwanted.clear()
        self._given_up.clear()
        self.generation += 1
        self.threads.give_back()
        if self.is_ours:
            if conversation is not None:
                conversation.kill()
            self.transport.close()

    def _end(self) -> None:
        conversation, self._conversation = self._conversation, None
        self.generation += 1
        self.threads.give_back()
        if conversation is not None:
            self.transport.finish()
            conversation.close()
        self._answers.clear()
        self._asked.clear()
        self._unwanted.clear()
        self._given_up.clear()
        self.transport.close()

    def _talk(self) -> WorkerSession:
        assert self._conversation is not None, "start() comes first"
        return self._conversation

    def _send(self, index: int, kind: str, payload: Payload) -> None:
        try:
            self._tell_news(index)
            self._talk().send(index, kind, payload)
        except BaseException:
            self.stop()
            raise

    def _tell_news(self, index: int) -> None:
        """Before anything refers to them: new memory, models that are gone; and with the next question, dropped graphs."""
        for kind, payload in self.transport.news(index):
            self._talk().send(index, kind, payload)
        while self._dropped:
            ticket = self._dropped.popleft()
            for finished in self._finished:
                finished.append(ticket)
        while self._forgotten:
            message = Payload(pickle.dumps(DeleteReplica(self._forgotten.popleft())))
            for other in range(len(self.devices) - 1):
                self._talk().send(other, "forget", message)

    def _await(self, key: tuple[int, int]) -> Message:
        while key not in self._answers:
            with self.all_or_none():
                index, message = self._talk().receive()
                self._sort_in(index, message)
        return self._answers.pop(key)

    def _sort_in(self, index: int, message: Message) -> None:
        if self.transport.takes(index, message):
            return
        key = index, int(message.kind.partition(":")[2])
        _, pending = self._asked.pop(key, (None, ()))
        if key in self._unwanted:
            self._unwanted.discard(key)
            message.payload.close()
        else:
            self._answers[key] = message
        for one in pending:  # it has come, for the helper has answered
            one.wait()


class WorkerGroupRegistry:
    """The crews of this process, each as long as a model uses it, and the memory that all parameters lie in."""

    def __init__(self) -> None:
        self._crews: weakref.WeakValueDictionary[tuple[str, ...], WorkerGroup] = weakref.WeakValueDictionary()
        self._weights: SharedArena | None = None
        self._pid = os.getpid()

    def crew_of(self, devices: Sequence[torch.device]) -> WorkerGroup:
        """Return the crew of these devices."""
        if self._weights is None or self._pid != os.getpid():
            self._weights, self._pid = SharedArena("weights"), os.getpid()
            self._weights.keep_from_children()
            self._crews = weakref.WeakValueDictionary()
        sends = devices[0].type != "cpu" or bool(os.environ.get(_SENDS_ON_CPU))
        key = (str(sends), *map(str, devices))
        crew = self._crews.get(key)
        if crew is None:
            transport = CollectiveOwnerTransport(devices) if sends else SharedOwnerTransport(devices, self._weights)
            crew = self._crews[key] = WorkerGroup(devices, transport)
        return crew


_crews = WorkerGroupRegistry()
crew_of = _crews.crew_of
