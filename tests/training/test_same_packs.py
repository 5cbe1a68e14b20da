import numpy as np
import pytest

from megamm.data.packing import pack
from megamm.errors import DataError
from megamm.training import loop


@pytest.mark.parametrize("seed_of_other", [1, 2])
def test_ranks_with_other_packs_are_told_before_the_first_step(seed_of_other, monkeypatch):
    mine, other = (pack(np.arange(1, 60), 64, seed) for seed in (1, seed_of_other))

    def gather(digests: list, digest: str) -> None:
        digests[:] = [digest, other.digest]

    monkeypatch.setattr(loop.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(loop.dist, "all_gather_object", gather)
    if seed_of_other == 1:
        loop.check_same_packs(mine)
        return
    with pytest.raises(DataError, match="ranks found other packs beside data.path"):
        loop.check_same_packs(mine)
