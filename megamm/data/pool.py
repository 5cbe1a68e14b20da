"""Work done in this process, in several of this machine, or in the ranks of an MPI run: one interface for all three."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from typing import Any, TypeVar

from megamm.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
Pool = tuple[Executor, int]
"""An executor and the number of processes behind it."""


class _Here(Executor):
    """Does everything at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 it is raised where the result is asked for, as other executors do
            future.set_exception(error)
        return future


@contextmanager
def processes(workers: int, mpi: bool) -> Iterator[Pool | None]:
    """A pool. With `mpi`, rank 0 has it and every other rank works for it until rank 0 leaves the context; these get
    None then, and have nothing left to do.

    Raises DataError for less than one worker, where mpi4py is missing, or where a process dies.
    """
    if workers < 1:
        raise DataError(f"--workers: {workers}; give a number from 1 on")
    if mpi:
        try:
            from mpi4py import MPI
            from mpi4py.futures import MPICommExecutor
        except ImportError as error:  # also where there is no MPI library
            raise DataError(
                f"--mpi: {error}; pip install 'megamm[mpi]', or only mpi4py beside a cluster's MPI"
            ) from error
        ranks: Any = MPICommExecutor(MPI.COMM_WORLD, root=0)
        with ranks as executor:
            try:
                yield None if executor is None else (executor, max(MPI.COMM_WORLD.Get_size() - 1, 1))
            finally:
                if executor is not None:
                    executor.shutdown(wait=False, cancel_futures=True)
    elif workers == 1:
        yield _Here(), 1
    else:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as executor:
            try:
                yield executor, workers
            except BrokenProcessPool as error:
                raise DataError(
                    f"--workers: a process died ({error}); is memory full? Try fewer: finished parts are kept"
                ) from error
            finally:
                executor.shutdown(cancel_futures=True)


def in_order(pool: Pool, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, Future[R]]]:
    """Each task and its finished future, in the order of the tasks. A bounded number of them is under way."""
    executor, size = pool
    stream = iter(tasks)
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        while True:
            # What waits for a slow task lies on disk or in memory: not more than this.
            while len(pending) < (1 if isinstance(executor, _Here) else 4 * size):
                try:
                    task = next(stream)
                except StopIteration:
                    break
                pending.append((task, executor.submit(function, task)))
            if not pending:
                return
            task, future = pending.popleft()
            future.exception()  # waits
            yield task, future
    finally:
        for _, future in pending:
            future.cancel()


def _end_with_parent() -> None:
    """End this process when its parent does, be it by kill -9: nobody would ever give it work, or tell it to end."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_wait_for, args=(parent.sentinel,), daemon=True).start()


def _wait_for(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
