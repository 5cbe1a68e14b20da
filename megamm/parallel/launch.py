"""Local ranks for a tool or a test: processes that are started once and run many cases.

Importing torch and megatron-core takes seconds per process, so the ranks live as long as the pool, and the groups are
built anew between cases. Process groups are the caller's: a function given to `run` begins with
`groups.start_distributed()`. Jobs of several machines are started by torchrun, not from here.

The ranks are spawned: the calling script needs the `if __name__ == "__main__"` guard.
"""

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

ADDRESS = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class _Failure:
    """An exception on its way to the parent. Not pickled as such: that would call `__init__` with what `args` holds."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]
    trace: str

    def rebuild(self, rank: int) -> BaseException:
        error = self.kind.__new__(self.kind, *self.args)
        error.__dict__.update(self.state)
        error.add_note(f"on rank {rank}:\n{self.trace}")
        return error


@dataclass(frozen=True, slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection


class RankPool:
    """Processes on this machine that run a function as the ranks of a distributed job.

    Each sees the environment that torchrun would give it and computes with one thread. A pool that a failure has
    stopped starts again with the next `run`.
    """

    def __init__(self, size: int, timeout_s: float | None = 600.0):
        """size: number of processes, started by the first `run`. timeout_s: longest that one `run` may take; None: any
        time."""
        self.size = size
        self.timeout_s = timeout_s
        self._workers: list[_Worker] = []
        self._world = 0  # ranks in the current distributed job; 0 when there is none
        self._store: dist.TCPStore | None = None
        self._finalizer = weakref.finalize(self, _stop, self._workers)

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int | None = None, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `function(*args)` on the first `ranks` processes (all by default); what each returned, by rank.

        function: importable by name, so at the top level of a module. Arguments and results must be picklable. Groups
        of an earlier case stay if it had as many ranks; otherwise they are dropped first. An exception of one rank is
        raised here, with that rank's traceback as a note, after all ranks have been stopped. Raises TimeoutError after
        `timeout_s`, and RuntimeError when a process dies.
        """
        world = ranks or self.size
        if not 1 <= world <= self.size:
            raise ValueError(f"a pool of {self.size} cannot run {world} ranks")
        try:
            if not self._workers:
                self._start()
            if world != self._world:
                if self._world:
                    self._call(_leave, (), self.size, self.timeout_s)
                # The store lives in this process, which chooses the port by binding it: no other can take it meanwhile.
                self._store = dist.TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
                self._world = world
            return self._call(function, args, world, timeout_s or self.timeout_s)
        except BaseException:
            self.close(patience_s=0.0)  # ranks that still wait for the one that failed would wait for ever
            raise

    def close(self, patience_s: float = 5.0) -> None:
        """Stop all ranks; those still busy after `patience_s` are killed."""
        _stop(self._workers, patience_s)
        self._world, self._store = 0, None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            # Not a daemon: megatron-core saves checkpoints with processes of its own, which a daemon may not start.
            process = context.Process(target=_serve, args=(theirs,), name=f"rank {rank}", daemon=False)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], world: int, timeout_s: float | None
    ) -> list[Any]:
        for rank, worker in enumerate(self._workers[:world]):
            worker.connection.send((function, args, self._environment(rank)))
        results: list[Any] = [None] * world
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers[:world])}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                self._print_stacks(list(waiting.values()))
                ranks = ", ".join(str(rank) for rank in waiting.values())
                raise TimeoutError(f"{function.__qualname__}: rank {ranks} did not finish within {timeout_s:g} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    results[rank] = connection.recv()
                except EOFError:
                    process = self._workers[rank].process
                    process.join(timeout=5.0)
                    raise RuntimeError(
                        f"{function.__qualname__}: the process of rank {rank} died with exit code {process.exitcode}"
                    ) from None
                if isinstance(results[rank], _Failure):
                    raise results[rank].rebuild(rank)
        return results

    def _environment(self, rank: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._world),
            "LOCAL_WORLD_SIZE": str(self._world),
            "MASTER_ADDR": ADDRESS,
            "MASTER_PORT": str(self._store.port if self._store else 0),
            "TORCHELASTIC_USE_AGENT_STORE": str(True),  # rank 0 connects to our store and opens none
            "OMP_NUM_THREADS": "1",
        }

    def _print_stacks(self, ranks: list[int]) -> None:
        """Let ranks that hang say where, on standard error."""
        for rank in ranks:
            pid = self._workers[rank].process.pid
            if pid is not None and self._workers[rank].process.is_alive():
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)


def _stop(workers: list[_Worker], patience_s: float = 0.0) -> None:
    """Idle ranks end by themselves when their connection closes, and take their own children along: megatron-core's
    checkpoint writer leaves some. Those that are not gone within `patience_s` are killed with all their children."""
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + patience_s
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        if worker.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.join()
    workers.clear()


def _serve(connection: Connection) -> None:
    """The life of one rank: run what arrives and report, until the parent closes the connection or is gone."""
    os.setsid()  # a group of its own, so that its children can be stopped with it
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops us
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            function, args, environment = connection.recv()
            os.environ.update(environment)
        except EOFError:
            return
        except (AttributeError, ImportError) as error:  # the function is not at the top level of a module
            connection.send(_failure(error))
            continue
        try:
            connection.send(function(*args))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
            connection.send(_failure(error))


def _leave() -> None:
    """Drop the groups of the case before, if it built any."""
    if dist.is_initialized():
        from megamm.parallel import groups  # imports megatron-core, which whoever built groups has paid for

        groups.stop()


def _failure(error: BaseException) -> _Failure:
    trace = "".join(traceback.format_exception(error))
    failure = _Failure(type(error), error.args, error.__dict__, trace)
    try:
        ForkingPickler.dumps(failure)
    except (AttributeError, TypeError, ValueError):  # it holds something that cannot travel
        return _Failure(RuntimeError, (f"{type(error).__name__}: {error}",), {}, trace)
    return failure


def _die_with_parent(parent: int) -> None:
    """A rank that waits in a collective does not notice that its parent was killed; this thread does."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)
