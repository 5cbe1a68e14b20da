import os
import signal
import time

import pytest

from megamm.data.pool import in_order, processes
from megamm.errors import DataError


def square(number):
    time.sleep(0.01 * (5 - number % 5))  # later ones are ready first
    return number * number


def fail(number):
    raise DataError(f"number {number}")


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(workers):
    with processes(workers, mpi=False) as pool:
        assert [(task, future.result()) for task, future in in_order(pool, square, range(20))] == [
            (number, number * number) for number in range(20)
        ]


@pytest.mark.parametrize("workers", [0, -2])
def test_less_than_one_worker_is_refused(workers):
    with pytest.raises(DataError, match=f"--workers: {workers}; give a number"), processes(workers, mpi=False):
        pass


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_where_its_result_is_asked_for(workers):
    with processes(workers, mpi=False) as pool:
        futures = [future for _, future in in_order(pool, fail, range(3))]
        with pytest.raises(DataError, match="number 2"):
            futures[2].result()


@pytest.mark.parametrize("workers", [1, 2])
def test_only_so_many_tasks_are_taken_ahead(workers):
    taken = []
    with processes(workers, mpi=False) as pool:
        stream = in_order(pool, abs, (taken.append(number) or number for number in range(100)))
        next(stream)
        assert len(taken) <= 4 * workers
        stream.close()


def test_death_of_a_process_is_one_clear_message():
    with (
        pytest.raises(DataError, match="--workers: a process died .*is memory full"),
        processes(2, mpi=False) as pool,
    ):
        [future.result() for _, future in in_order(pool, die, range(5))]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
def test_processes_end_when_their_parent_is_killed():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with processes(3, mpi=False) as pool:
            executor, _ = pool
            pids = {executor.submit(os.getpid).result()} | set(executor._processes)
            os.write(write, " ".join(map(str, pids)).encode())
            time.sleep(60)
    os.close(write)
    pids = list(map(int, os.read(read, 1000).split()))
    os.close(read)
    assert len(pids) >= 1 and all(map(alive, pids))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))
