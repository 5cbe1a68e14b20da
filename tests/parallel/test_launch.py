"""A pool of local ranks: it serves many cases, re-raises what a rank raises, and never hangs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamm.errors import ConfigError
from megamm.parallel.launch import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=300.0) as pool:
        yield pool


def join() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def sum_of_ranks(offset: int) -> tuple[int, int, int]:
    join()
    x = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(x)
    return int(x), dist.get_world_size(), os.getpid()


def environment() -> dict[str, str]:
    return dict(os.environ) | {"threads": str(torch.get_num_threads())}


def raise_on_rank_1(error: Exception) -> None:
    join()
    if dist.get_rank() == 1:
        raise error
    dist.barrier()


def die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def sleep_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(600)


def return_a_function() -> object:
    return lambda: None


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_pool_serves_cases_of_several_sizes(pool: RankPool) -> None:
    first = pool.run(sum_of_ranks, 10)
    assert [result[:2] for result in first] == [(21, 2)] * 2
    alone = pool.run(sum_of_ranks, 5, ranks=1)
    assert [result[:2] for result in alone] == [(5, 1)]
    again = pool.run(sum_of_ranks, 20)
    assert [result[:2] for result in again] == [(41, 2)] * 2
    assert [pid for *_, pid in again] == [pid for *_, pid in first]  # no process was started anew
    assert alone[0][-1] == first[0][-1]


def test_ranks_see_what_torchrun_would_tell_them(pool: RankPool) -> None:
    for rank, seen in enumerate(pool.run(environment)):
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert seen["MASTER_ADDR"] == "127.0.0.1"
        assert (seen["OMP_NUM_THREADS"], seen["threads"]) == ("1", "1")


def test_an_exception_of_one_rank_arrives_whole_and_stops_the_others(pool: RankPool) -> None:
    pids = [pid for *_, pid in pool.run(sum_of_ranks, 0)]
    with pytest.raises(ConfigError) as error:
        pool.run(raise_on_rank_1, ConfigError(["first problem", "second problem"]))
    assert error.value.problems == ["first problem", "second problem"]
    (note,) = error.value.__notes__
    assert note.startswith("on rank 1:")
    assert "in raise_on_rank_1" in note
    assert not any(exists(pid) for pid in pids)
    assert [result[:2] for result in pool.run(sum_of_ranks, 1)] == [(3, 2)] * 2  # and the pool is good again


def test_a_rank_that_dies_is_reported() -> None:
    with RankPool(2) as pool, pytest.raises(RuntimeError, match="the process of rank 1 died with exit code -9"):
        pool.run(die_on_rank_1)


def test_a_rank_that_hangs_is_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    with RankPool(2) as pool:
        pool.run(environment)  # so that the limit does not count the start
        with pytest.raises(TimeoutError, match="sleep_on_rank_1: rank 1 did not finish within 1 s"):
            pool.run(sleep_on_rank_1, timeout_s=1.0)
    assert "in sleep_on_rank_1" in capfd.readouterr().err


def test_what_cannot_travel_is_an_error_not_a_hang() -> None:
    with RankPool(1) as pool:
        with pytest.raises(Exception, match="lambda"):
            pool.run(return_a_function)
        with pytest.raises(ValueError, match="a pool of 1 cannot run 2 ranks"):
            pool.run(environment, ranks=2)


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 30.0
    while exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not exists(pid)


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from megamm.parallel.launch import RankPool\n"
        "if __name__ == '__main__':\n"
        "    pool = RankPool(1)\n"
        "    print(pool.run(os.getpid)[0], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.run([sys.executable, script], env=environment, stdout=subprocess.PIPE, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert ends(int(parent.stdout))


def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path: Path) -> None:
    script, pid = tmp_path / "rank.py", tmp_path / "pid"
    script.write_text(
        "import os, pathlib, signal, time\n"
        "from megamm.parallel import groups\n"
        "groups.end_with_torchrun()\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGKILL)\n"
        "time.sleep(600)\n"
    )
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    assert subprocess.run([*torchrun, script], env=environment, check=False).returncode == -signal.SIGKILL
    assert ends(int(pid.read_text()))
