"""Ranks that live as long as the test run: importing torch and megatron-core takes seconds per process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megamm.parallel.launch import RankPool

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference vectors made by the authors' code."""
    return GOLDEN


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to 4 gloo ranks."""
    with RankPool(4, timeout_s=300) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def pool8() -> Iterator[RankPool]:
    """Up to 8 gloo ranks, for the slow tests. Not longer than a module: idle ranks cost time, too, since the threads of
    every gloo group keep waking up."""
    with RankPool(8, timeout_s=600) as ranks:
        yield ranks
