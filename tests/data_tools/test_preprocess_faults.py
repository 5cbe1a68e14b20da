"""What must not lose or corrupt data: every way in which a run can be cut short, and in which its inputs can move."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megamm.data import parts as parts_module
from megamm.data.indexed import Reader
from megamm.data.parts import Parts
from megamm.errors import DataError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("small_pieces")


def outputs(prefix):
    """Every file beside the prefix."""
    return {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir() if path.is_file()}


def in_child(function):
    """Run in a process of its own, and return how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except DataError as error:
            Path(os.environ["CHILD_ERROR"]).write_text(str(error))
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(autouse=True)
def child_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD_ERROR", str(tmp_path / "error"))
    return tmp_path / "error"


@pytest.fixture
def expected(script, inputs, tmp_path):
    """What an undisturbed run writes."""
    script.main(script.Options(**inputs))
    files = outputs(inputs["output"])
    assert sorted(files) == ["set.bin", "set.idx", "set.json", "set.skipped.jsonl"]
    shutil.rmtree(Path(inputs["output"]).parent)
    return files


STEPS = ("replace", "fdatasync", "unlink", "truncate", "rmdir", "mkdir")


def die_at(moment, after):
    """Kill this process at one of its calls that change a directory or make data safe. Path's methods call os's."""
    count = 0

    def wrap(real):
        def step(*args, **kwargs):
            nonlocal count
            if not after and count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if after and count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return result

        return step

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_moment_a_run_goes_on_and_ends_with_the_same_files(after, script, inputs, expected, monkeypatch):
    monkeypatch.setattr("megamm.data.sources.piece.PIECE_RECORDS", 18)
    moment = 0
    while True:
        shutil.rmtree(Path(inputs["output"]).parent, ignore_errors=True)

        def run(moment=moment):
            die_at(moment, after)
            script.main(script.Options(**inputs))

        status = in_child(run)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if (Path(inputs["output"]).parent / "set.json").exists():  # whole, or not there
            Reader(inputs["output"])
        script.main(script.Options(**inputs))
        assert outputs(inputs["output"]) == expected
        assert not Path(inputs["output"] + ".parts").exists()
        moment += 1
    assert moment > 20  # three parts, four steps each, and the end


def test_killed_again_and_again_a_run_still_ends(script, inputs, expected):
    moment = 0
    while True:

        def run(moment=moment):
            die_at(8 + moment, after=True)
            script.main(script.Options(**inputs))

        if in_child(run) == 0:
            break
        moment += 1
    assert moment >= 3 and outputs(inputs["output"]) == expected


def test_finished_parts_are_not_made_again(script, inputs, expected, monkeypatch):
    def run():
        die_at(20, after=True)
        script.main(script.Options(**inputs))

    assert in_child(run) == -signal.SIGKILL
    made = []
    real = parts_module.write_part
    monkeypatch.setattr(parts_module, "write_part", lambda *task: made.append(task[1]) or real(*task))
    script.main(script.Options(**inputs))
    assert outputs(inputs["output"]) == expected and made == list(range(made[0], 9)) and made[0] >= 3


@pytest.mark.parametrize("delay_s", [0.05, 0.15, 0.4])
def test_killed_with_all_its_processes_at_work(delay_s, script, inputs, expected):
    child = os.fork()
    if child == 0:
        script.main(script.Options(**inputs, workers=3))
        os._exit(0)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 30
    while True:  # its processes end with it, but not in the same instant
        try:
            script.main(script.Options(**inputs, workers=2))
            break
        except DataError as error:
            assert "another run is writing" in str(error) and time.monotonic() < deadline
            time.sleep(0.1)
    assert outputs(inputs["output"]) == expected


def test_death_of_a_worker_keeps_what_is_finished(script, inputs, expected, monkeypatch):
    real = parts_module.write_part

    def write_part(directory, number, results):
        if number == 6:
            while not (directory / "000000.json").exists():  # the other process may be the slower one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        real(directory, number, results)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "write_part", write_part)
        with pytest.raises(DataError, match="--workers: a process died .*is memory full"):
            script.main(script.Options(**inputs, workers=2))
    assert Path(inputs["output"] + ".parts", "000000.json").exists() and not Path(inputs["output"] + ".json").exists()
    script.main(script.Options(**inputs, workers=2))
    assert outputs(inputs["output"]) == expected


@pytest.mark.parametrize("limit", [600, 8_000, 20_000])
@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_one_clear_message_and_the_run_goes_on_when_there_is_room(
    workers, limit, script, inputs, expected, child_error
):
    """No file may grow beyond `limit` bytes: a part, its index or the merged file, as it comes."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        script.main(script.Options(**inputs, workers=workers))

    assert in_child(run) == 3
    assert "cannot be written" in child_error.read_text() and "make room" in child_error.read_text()
    assert not Path(inputs["output"] + ".json").exists()
    script.main(script.Options(**inputs))
    assert outputs(inputs["output"]) == expected


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="uses /proc as a place that takes no files")
def test_target_that_takes_no_files(script, inputs):
    with pytest.raises(DataError, match=r"/proc/set.parts: cannot be written .*choose another place"):
        script.main(script.Options(**(inputs | {"output": "/proc/set"})))


def test_two_runs_on_one_output_are_refused(script, inputs, expected):
    with (
        Parts(inputs["output"], {}),
        pytest.raises(DataError, match="another run is writing this output; wait until it ends, or choose another"),
    ):
        script.main(script.Options(**inputs))
    shutil.rmtree(inputs["output"] + ".parts")
    script.main(script.Options(**inputs))
    assert outputs(inputs["output"]) == expected


def interrupted(script, inputs):
    def run():
        die_at(20, after=True)
        script.main(script.Options(**inputs))

    assert in_child(run) == -signal.SIGKILL


def test_leftovers_of_another_run_are_refused(script, inputs, expected):
    interrupted(script, inputs)
    with pytest.raises(DataError, match="left by a run with another template; give what was given then .*or delete"):
        script.main(script.Options(**(inputs | {"template": "plain"})))
    with pytest.raises(DataError, match="left by a run with another max_side, reencode; give"):
        script.main(script.Options(**inputs, max_side=10, reencode=50))
    os.utime(inputs["input"][0], ns=(0, 0))
    with pytest.raises(DataError, match="left by a run with another input; give"):
        script.main(script.Options(**inputs))
    shutil.rmtree(inputs["output"] + ".parts")
    script.main(script.Options(**inputs))
    assert outputs(inputs["output"]) == expected


@pytest.mark.parametrize("name", ["run.json", "000000.json", "merged.bin"])
def test_damaged_leftovers_are_refused(name, script, inputs):
    interrupted(script, inputs)
    os.truncate(Path(inputs["output"] + ".parts", name), 5)
    with pytest.raises(DataError, match="delete .*set.parts to start over"):
        script.main(script.Options(**inputs))


def test_an_input_that_changes_meanwhile_is_noticed(script, inputs, monkeypatch):
    real = parts_module.read_piece

    def read_piece(form, piece):
        os.utime(piece.path)
        return real(form, piece)

    monkeypatch.setattr(parts_module, "read_piece", read_piece)
    with pytest.raises(DataError, match="llava.json: changed while it was read; run again when it is complete"):
        script.main(script.Options(**inputs))
    assert outputs(inputs["output"]) == {} and not Path(inputs["output"] + ".parts").exists()


def jpeg(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def test_a_picture_replaced_meanwhile_is_the_old_or_the_new_one(script, inputs):
    """Half of the time with a rename, half of the time written over: then it may be a fault, never a broken picture."""
    kinds, path, stop = [jpeg(1), jpeg(2)], inputs["image_dir"] / "moving.jpg", threading.Event()
    path.write_bytes(kinds[0])

    def replace():
        turn = 0
        while not stop.is_set():
            turn += 1
            target = path if turn % 4 < 2 else path.with_suffix(".tmp")
            target.write_bytes(kinds[turn % 2])
            if target != path:
                os.replace(target, path)

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    inputs["input"][0].write_text(json.dumps([{"image": "moving.jpg", "conversations": turns}] * 300))
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        script.main(script.Options(**(inputs | {"max_bad": 1.0})))
    finally:
        stop.set()
        thread.join()
    reader = Reader(inputs["output"])
    assert {reader.image(i, 0) for i in range(len(reader))} <= set(kinds)
    assert reader.info["skipped"].keys() <= {"image_broken"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_ranks_of_an_mpi_run_write_the_same_files(ranks, inputs, script):
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("no mpirun; pip install 'megamm[mpi]'")
    source = Path(__file__).with_name("mpi_pieces.py")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in inputs.items() if name != "input"]
    command = [mpirun, "--oversubscribe", "-n", str(ranks), sys.executable, str(source), *options, "--mpi"]
    command += ["--input", str(inputs["input"][0])]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | as_root | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = outputs(inputs["output"])
    shutil.rmtree(Path(inputs["output"]).parent)
    script.main(script.Options(**inputs))
    assert outputs(inputs["output"]) == found
