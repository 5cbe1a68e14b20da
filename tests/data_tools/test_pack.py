import numpy as np
import pytest

from megamm.batch import IMAGE
from megamm.data.blend import open_reader, write_blend
from megamm.data.indexed import Reader, Writer
from megamm.data.packing import Sizes, find_packs
from megamm.errors import DataError


@pytest.fixture
def pack(load_script):
    return load_script("pack")


@pytest.fixture
def prefix(tmp_path):
    """20 samples of 5 ids and a picture each, and one of 90 ids."""
    with Writer(tmp_path / "set") as writer:
        for _ in range(20):
            ids = np.array([1, IMAGE, 3, 4, 5, 6], np.int32)
            writer.add(ids, [b"not looked at"], np.array([[4, 6]], np.int32))
        writer.add(np.arange(90, dtype=np.int32), [], np.array([[3, 5]], np.int32))
        writer.finish({"family": "llava"})
    return str(tmp_path / "set")


def test_packs_are_written_and_their_fill_is_printed(pack, prefix, capsys):
    pack.main(pack.Options(dataset=prefix, max_tokens=60, image_tokens=10))
    assert capsys.readouterr().out.splitlines() == [
        f"{prefix}.packs-60.npz: 21 samples in 6 sequences, 3.50 in each; 360 tokens fill 100.0% of them",
        "1 samples are longer than 60 tokens and will be cut",
    ]
    sizes = Sizes(capacity=60, sample_tokens=60, tokens_per_image=10)
    assert sorted(map(len, (find_packs(Reader(prefix), sizes, seed=0)[i] for i in range(6)))) == [1, 4, 4, 4, 4, 4]


def test_a_blend_is_packed_too(pack, prefix, tmp_path, capsys):
    write_blend(tmp_path / "mix", [Reader(prefix)], [15], seed=0)
    pack.main(pack.Options(dataset=str(tmp_path / "mix"), max_tokens=100, image_tokens=10, sample_tokens=30, seed=None))
    assert "15 samples in" in capsys.readouterr().out
    sizes = Sizes(capacity=100, sample_tokens=30, tokens_per_image=10)
    assert len(find_packs(open_reader(tmp_path / "mix"), sizes, seed=None).samples) == 15


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"max_tokens": 9, "image_tokens": 0}, {"max_tokens": 9, "sample_tokens": 0}]
)
def test_bad_numbers_are_refused(options, pack, prefix):
    with pytest.raises(DataError, match="give numbers from 1 on"):
        pack.main(pack.Options(dataset=prefix, **options))


def test_a_place_that_cannot_be_written_is_one_clear_message(pack, prefix, tmp_path):
    (tmp_path / "set.packs-60.npz.tmp").mkdir()
    with pytest.raises(DataError, match=r"packs-60\.npz: cannot be written"):
        pack.main(pack.Options(dataset=prefix, max_tokens=60))
