import numpy as np
import pytest
import torch.distributed as dist

from megamm import backend
from megamm.data.packing import pack
from megamm.errors import DataError
from megamm.parallel import groups
from megamm.training.loop import check_same_packs


def refusal(seeds: list[int]) -> str | None:
    """What a rank is told that packed with the seed of its number; None: nothing."""
    backend.start("cpu")
    groups.start_distributed()
    try:
        check_same_packs(pack(np.arange(1, 60), 64, seeds[dist.get_rank()]))
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("seeds", "is_refused"), [([1, 1], False), ([1, 2], True)])
def test_ranks_with_other_packs_are_told_before_the_first_step(seeds, is_refused, pool):
    for told in pool.run(refusal, seeds, ranks=2):
        assert told is None if not is_refused else "ranks found other packs beside data.path" in told
