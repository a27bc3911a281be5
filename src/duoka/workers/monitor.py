"""Thread that watches the workers during ``run_on_all``: results, failures, deaths, output, and Ctrl-C."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import chain

import torch

from duoka.workers.channel import Message
from duoka.workers.events import EventSelector
from duoka.workers.exceptions import SECONDARY_FAILURE_WAIT_S, is_secondary_failure
from duoka.workers.handle import WorkerHandle
from duoka.workers.interrupts import InterruptHandler
from duoka.workers.rendezvous import READY_FOR_RENDEZVOUS
from duoka.workers.serialization import Payload
from duoka.workers.stall_watch import StallWatch

_POLL_S = 0.2
_IDLE_CPU_S, _IDLE_CPU_SHARE = 0.02, 0.02
"""Processor time that a thread may use while it counts as waiting: in seconds, and as a share of the wait."""


class WorkerMonitor:
    """Keeps each worker's messages, and in ``error`` the first failure, which stops the caller's thread."""

    def __init__(
        self,
        workers: Sequence[WorkerHandle],
        interrupts: InterruptHandler,
        unblock: Callable[[], None],
        receiver: torch.device,
        *,
        show_output: bool,
    ) -> None:
        self.error: BaseException | None = None
        self._workers = workers
        self._interrupts = interrupts
        self._unblock = unblock
        self._receiver = receiver
        self._show_output = show_output
        self._received: dict[str, dict[int, Payload]] = {READY_FOR_RENDEZVOUS: {}, "done": {}, "idle": {}}
        self._secondary: tuple[BaseException, float] | None = None
        self._stalls = StallWatch(workers, "runs its part of the launch while rank 0 waits")
        self._rank_zero_clock = _thread_clock()
        self._rank_zero_cpu_s = 0.0
        """Processor time of rank 0's thread when the present wait began."""
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="duoka-monitor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wait_for_all(self, kind: str) -> None:
        """Wait until every worker has sent a message of this kind; returns early after a failure."""
        self._wait(lambda: len(self._received[kind]) == len(self._workers))
        if kind == READY_FOR_RENDEZVOUS:
            self._received[kind] = {}  # the next barrier counts anew

    def take_result(self, rank: int) -> Payload:
        """Return the payload of the "done" message of ``rank``; the caller closes it."""
        return self._received["done"].pop(rank)

    def wait_for_failure(self, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` for a failure."""
        self._wait(lambda: False, timeout_s)

    def kill_workers(self) -> None:
        """Kill the workers; their deaths are not failures from now on."""
        self._ended = True
        for worker in self._workers:
            worker.kill()

    def stop(self) -> bool:
        """End the thread, and kill the workers unless all are idle; return whether they are, and can be used again."""
        all_idle = len(self._received["idle"]) == len(self._workers)
        if not all_idle:
            self.kill_workers()
        self._thread.join()
        for payload in chain.from_iterable(payloads.values() for payloads in self._received.values()):
            payload.close()
        return all_idle

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self.error is not None or self._ended, timeout_s)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with contextlib.closing(EventSelector(self._workers, self._receiver, self._interrupts)) as selector:
                self._handle_events(selector)
        except BaseException as error:  # rank 0 must not wait for a thread that has ended
            self._fail(error)
        self._notify()

    def _handle_events(self, selector: EventSelector) -> None:
        while len(self._received["idle"]) < len(self._workers):
            for worker, event in selector.poll(_POLL_S):
                if isinstance(event, Message):  # after the end, too: ``stop`` closes what has arrived
                    self._received[event.kind][worker.rank] = event.payload
                    self._notify()
                elif self._ended:
                    return
                elif isinstance(event, bytes):
                    self._show(worker, event.decode(errors="replace"))
                elif event is None:
                    if self._interrupts.read_signals():
                        self.kill_workers()
                        self._unblock()
                elif is_secondary_failure(event):
                    self._secondary = self._secondary or (event, time.monotonic() + SECONDARY_FAILURE_WAIT_S)
                else:
                    self._fail(event)
            if self._ended:
                return
            self._check_stall()
            if self._secondary is not None and time.monotonic() > self._secondary[1]:
                self._fail(self._secondary[0])

    def _check_stall(self) -> None:
        """Report workers when rank 0 has waited for long, or a worker has been stopped for long.

        A rank 0 that uses the processor does not wait, or it waits for a GPU.
        """
        if self._rank_zero_clock is None:
            return
        cpu_s = time.clock_gettime(self._rank_zero_clock)
        is_busy = cpu_s - self._rank_zero_cpu_s > _IDLE_CPU_S + _IDLE_CPU_SHARE * self._stalls.waited_s
        if is_busy and not any(worker.is_stopped() for worker in self._stalls.workers):
            self._rank_zero_cpu_s = cpu_s
            self._stalls.restart()
        self._stalls.workers = [worker for worker in self._workers if worker.rank not in self._received["done"]]
        self._stalls.check(ends_busy_workers=False)

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure, kill the workers, and stop rank 0 in any state."""
        if self._ended:
            return
        self.error = error
        self.kill_workers()
        self._unblock()
        self._notify()
        self._interrupts.stop_caller()

    def _show(self, worker: WorkerHandle, text: str) -> None:
        """Print a worker's output; characters that the user's stdout cannot encode become question marks."""
        if not self._show_output:
            return
        lines = "".join(f"[rank {worker.rank} {worker.label}] {line}\n" for line in text.splitlines())
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # a closed pipe or file; rank 0's own output raises for it
            sys.stdout.write(lines.encode(encoding, errors="replace").decode(encoding))


def _thread_clock() -> int | None:
    """Return the processor-time clock of this thread, which is rank 0's, where the system has one."""
    return time.pthread_getcpuclockid(threading.get_ident()) if hasattr(time, "pthread_getcpuclockid") else None
