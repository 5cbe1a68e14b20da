"""Only rank 0 speaks, unless a line is for every rank."""

import subprocess
import sys

import pytest

SCRIPT = """
from megamm.log import EVERY_RANK, get_logger
logger = get_logger("megamm.models.vlm")
get_logger("megamm.train").info("from the top")
logger.warning("once")
logger.error("from each", extra=EVERY_RANK)
logger.debug("never")
"""


@pytest.mark.parametrize(
    ("rank", "expected"),
    [("0", ["INFO from the top", "WARNING once", "ERROR rank 0: from each"]), ("3", ["ERROR rank 3: from each"])],
)
def test_ranks_speak_when_they_should(rank: str, expected: list[str]) -> None:
    environment = {"RANK": rank, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == expected
    assert done.stdout == ""
