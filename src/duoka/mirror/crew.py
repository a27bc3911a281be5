"""The helpers of one list of devices, shared by all wrapped models of this process: asked, answered, ended, started anew."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from duoka.mirror.ambient import Threads
from duoka.mirror.clock import CLOCK
from duoka.mirror.memory import Arena, Lease, Window
from duoka.mirror.messages import Backward, Configure, Forget, Forward, Patch, Reseat
from duoka.mirror.serve import serve
from duoka.scaling import threads_per_rank
from duoka.team import Conversation, failure
from duoka.team.connection import Message
from duoka.team.payload import Payload

__all__ = ["Crew", "crew_of"]


class Crew:
    """Helpers for all devices but the first; they are started by the first question, and by the first after a failure."""

    def __init__(self, devices: Sequence[torch.device], weights: Arena) -> None:
        self.devices = tuple(devices)
        self.weights = weights
        self.traffic = Arena("traffic")
        self.threads = Threads(min(torch.get_num_threads(), threads_per_rank(len(devices))))
        self.lock = threading.RLock()
        self.in_forward = False
        self.generation = 0
        """Another number whenever helpers start or end: what earlier ones were sent must be sent again."""
        self._pid = os.getpid()
        self._tickets = itertools.count(1)
        self._conversation: Conversation | None = None
        self._members = 0
        self._answers: dict[tuple[int, int], Message] = {}
        self._asked: dict[tuple[int, int], Lease] = {}
        self._unwanted: set[tuple[int, int]] = set()
        self._dropped: deque[int] = deque()
        self._forgotten: deque[int] = deque()
        self._finished: list[list[int]] = []
        self._announced: list[dict[str, int]] = []
        self._windows: list[Window] = []

    @property
    def is_ours(self) -> bool:
        """Whether this process started the helpers: a forked child did not."""
        return os.getpid() == self._pid

    def join(self) -> None:
        """One more model uses the helpers."""
        self._members += 1

    def leave(self, model: int) -> None:
        """A model is gone; with the last one the helpers are given back."""
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
        places = [self.threads.while_shared] * count
        self._finished = [[] for _ in range(count)]
        self._announced = [{} for _ in range(count)]
        self._windows = [Window() for _ in range(count)]
        self._conversation = Conversation(serve, places, (), self.devices[1:])

    def tell(self, message: Configure | Patch | Reseat, fd: int | None = None) -> None:
        """Tell every helper something that has no answer."""
        for index in range(len(self.devices) - 1):
            self._send(index, "tell", Payload(pickle.dumps(message), fd=fd))

    def ask(self, index: int, question: Forward | Backward, lease: Lease, fd: int | None = None) -> None:
        """Send a question to helper ``index``; its answer is fetched with ``answer``, and ``lease`` kept as long."""
        with self.lock:
            self._asked[index, question.ticket] = lease
            finished, self._finished[index] = self._finished[index], []
            body = pickle.dumps(question._replace(done_with=tuple(finished)))
            self._send(index, "ask", Payload(body, fd=fd))

    def answer(self, index: int, ticket: int) -> tuple[Any, int | None]:
        """Wait for an answer and return it, and the file that came with it; raises what the helper raised, or WorkerDied."""
        with self.lock, CLOCK.waits():
            message = self._await((index, ticket))
        if message.kind.startswith("raised"):
            helper = self._talk().helpers[index]
            error = failure.unpack(message.payload, helper.rank, helper.label, self.devices[0])
            message.payload.close()
            raise error
        return pickle.loads(message.payload.data), message.payload.fd

    def window(self, index: int) -> Window:
        """Return the memory that helper ``index`` writes its outputs to."""
        return self._windows[index]

    def give_up(self, index: int, ticket: int) -> None:
        """An answer is not waited for any more; until it comes the helper may still use the memory that it was given."""
        if self._answers.pop((index, ticket), None) is None and (index, ticket) in self._asked:
            self._unwanted.add((index, ticket))

    def stop(self) -> None:
        """End the helpers now: their state is not known any more, or the user has pressed Ctrl-C."""
        conversation, self._conversation = self._conversation, None
        self._answers.clear()
        self._asked.clear()
        self._unwanted.clear()
        self.generation += 1
        self.threads.give_back()
        if conversation is not None and self.is_ours:
            conversation.kill()

    def _end(self) -> None:
        conversation, self._conversation = self._conversation, None
        self.generation += 1
        self.threads.give_back()
        if conversation is not None and self.is_ours:
            conversation.end()
        self._answers.clear()
        self._asked.clear()
        self._unwanted.clear()
        self._windows.clear()
        self.traffic.close()

    def _talk(self) -> Conversation:
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
        for arena in (self.weights, self.traffic):
            known = self._announced[index].get(arena.name, 0)
            for segment in arena.segments[known:]:
                self._talk().send(index, arena.name, Payload(b"", fd=segment.fd))
            self._announced[index][arena.name] = len(arena.segments)
        while self._dropped:
            ticket = self._dropped.popleft()
            for finished in self._finished:
                finished.append(ticket)
        while self._forgotten:
            message = Payload(pickle.dumps(Forget(self._forgotten.popleft())))
            for other in range(len(self.devices) - 1):
                self._talk().send(other, "forget", message)

    def _await(self, key: tuple[int, int]) -> Message:
        while key not in self._answers:
            try:
                index, message = self._talk().receive()
                self._sort_in(index, message)
            except BaseException:
                self.stop()
                raise
        return self._answers.pop(key)

    def _sort_in(self, index: int, message: Message) -> None:
        if message.kind == "segment":
            assert message.payload.fd is not None
            self._windows[index].add(message.payload.fd)
            return
        key = index, int(message.kind.partition(":")[2])
        self._asked.pop(key, None)
        if key in self._unwanted:
            self._unwanted.discard(key)
            message.payload.close()
        else:
            self._answers[key] = message


class _Crews:
    """The crews of this process, each as long as a model uses it, and the memory that all parameters lie in."""

    def __init__(self) -> None:
        self._crews: weakref.WeakValueDictionary[tuple[str, ...], Crew] = weakref.WeakValueDictionary()
        self._weights: Arena | None = None
        self._pid = os.getpid()

    def crew_of(self, devices: Sequence[torch.device]) -> Crew:
        """Return the crew of these devices."""
        if self._weights is None or self._pid != os.getpid():
            self._weights, self._pid = Arena("weights"), os.getpid()
            self._crews = weakref.WeakValueDictionary()
        key = tuple(map(str, devices))
        crew = self._crews.get(key)
        if crew is None:
            crew = self._crews[key] = Crew(devices, self._weights)
        return crew


_crews = _Crews()
crew_of = _crews.crew_of
