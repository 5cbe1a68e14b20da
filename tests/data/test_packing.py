import json
from collections import Counter

import numpy as np
import pytest

from megamm.batch import IMAGE
from megamm.data.blend import open_reader, write_blend
from megamm.data.indexed import Reader, Writer
from megamm.data.packing import WINDOW, Sizes, find_packs, pack, packs_path, write_packs
from megamm.errors import DataError

MIX_665K = {
    # What LLaVA-1.5 was tuned on: thousands of samples (arXiv 2310.03744, table 7), a typical length of the text and
    # its spread. The numbers of samples are the paper's, the lengths are estimates.
    "conversations": (58, 320, 0.4),
    "descriptions": (23, 150, 0.3),
    "reasoning": (77, 220, 0.3),
    "vqav2": (83, 130, 0.5),
    "gqa": (72, 220, 0.5),
    "okvqa": (9, 60, 0.4),
    "ocrvqa": (80, 150, 0.35),
    "a-okvqa": (66, 70, 0.3),
    "textcaps": (22, 60, 0.3),
    "refcoco": (48, 350, 0.6),
    "vg": (86, 400, 0.6),
    "sharegpt": (40, 900, 0.9),
}


def lengths_of_665k(num_samples: int) -> np.ndarray:
    random = np.random.RandomState(0)
    weights = np.array([weight for weight, *_ in MIX_665K.values()], dtype=float)
    names = random.choice(list(MIX_665K), size=num_samples, p=weights / weights.sum())
    text = np.array([random.lognormal(np.log(MIX_665K[name][1]), MIX_665K[name][2]) for name in names])
    return text.astype(np.int64) + np.where(names == "sharegpt", 0, 576) + 40


def check(packs, lengths, capacity) -> float:
    """Every sample once, no pack too full -> how full they are."""
    members = [packs[i] for i in range(len(packs))]
    assert Counter(np.concatenate(members).tolist()) == Counter(range(len(lengths)))
    sums = [int(lengths[member].sum()) for member in members]
    assert min(map(len, members)) > 0 and max(sums) <= capacity
    return sum(sums) / (capacity * len(packs))


@pytest.mark.parametrize(("capacity", "fill"), [(4096, 0.98), (8192, 0.99), (16384, 0.99)])
def test_lengths_like_665k_fill_their_sequences(capacity, fill):
    lengths = np.minimum(lengths_of_665k(20_000), capacity)
    found = check(pack(lengths, capacity, seed=1), lengths, capacity)
    print(f"{capacity} tokens: {found:.1%}")
    assert found >= fill


def test_where_no_third_sample_fits_two_are_all_there_is():
    """At 2048 tokens: three samples with a picture never fit where each has more than 682."""
    lengths = np.random.RandomState(0).randint(683, 1024, size=4000)
    assert len(pack(lengths, 2048, seed=1)) == 2000


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("num", [0, 1, 5, WINDOW, 3 * WINDOW + 17])
def test_every_sample_once_and_always_the_same(num, seed):
    lengths = np.random.RandomState(3).randint(1, 101, size=num)
    packs, again = pack(lengths, 100, seed), pack(lengths, 100, seed)
    assert packs.digest == again.digest
    if num:
        check(packs, lengths, 100)
    assert len(packs.samples) == num


def test_the_seed_decides_and_without_one_neighbours_stay_together():
    lengths = np.random.RandomState(3).randint(1, 101, size=5 * WINDOW)
    assert pack(lengths, 100, 1).digest != pack(lengths, 100, 2).digest
    packs = pack(lengths, 100)
    assert max(int(np.ptp(packs[i])) for i in range(len(packs))) < 2 * WINDOW


def test_a_sample_that_is_too_long_is_refused():
    with pytest.raises(DataError, match="samples of 1 to 101 tokens do not fit packs of 100"):
        pack(np.array([1, 101]), 100)
    with pytest.raises(IndexError):
        pack(np.array([1]), 100)[1]


@pytest.fixture
def reader(tmp_path):
    with Writer(tmp_path / "set") as writer:
        for i in range(20):
            ids = np.arange(3, 8 + i, dtype=np.int32)
            ids[1] = IMAGE
            writer.add(ids, [b"not looked at"], np.array([[3, 5]], np.int32))
        writer.finish({"family": "llava"})
    return Reader(tmp_path / "set")


SIZES = Sizes(capacity=64, sample_tokens=48, tokens_per_image=10)


def test_packs_that_lie_beside_a_dataset_are_read(reader):
    assert find_packs(reader, SIZES, seed=1).digest == pack(SIZES.lengths(reader), 64, 1).digest
    written = write_packs(reader, SIZES, seed=5)
    assert find_packs(reader, SIZES, seed=1).digest == written.digest == pack(SIZES.lengths(reader), 64, 5).digest
    assert max(SIZES.lengths(reader)) == 33


def test_a_blend_has_packs_of_its_own(reader, tmp_path):
    blend = write_blend(tmp_path / "mix", [reader, reader], [20, 10], seed=0)
    write_packs(blend, SIZES, seed=1)
    assert packs_path(blend, 64) == tmp_path / "mix.packs-64.npz"
    assert len(find_packs(open_reader(tmp_path / "mix"), SIZES, seed=1).samples) == 30


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(capacity=64, sample_tokens=20, tokens_per_image=10), "48 tokens per sample, not 20; remove it"),
        (Sizes(capacity=64, sample_tokens=48, tokens_per_image=9), "10 tokens per picture, not 9; remove it"),
    ],
)
def test_packs_for_other_sizes_are_refused(sizes, message, reader):
    write_packs(reader, SIZES, seed=1)
    with pytest.raises(DataError, match=message):
        find_packs(reader, sizes, seed=1)


def test_packs_of_another_dataset_are_refused(reader, tmp_path):
    write_packs(reader, SIZES, seed=1)
    with Writer(tmp_path / "set") as writer:
        writer.add(np.arange(9, dtype=np.int32), [], np.array([[3, 5]], np.int32))
        writer.finish({"family": "llava"})
    with pytest.raises(DataError, match="made for 20 samples, not 1, .* bytes, not .*; remove it, or write it again"):
        find_packs(Reader(tmp_path / "set"), SIZES, seed=1)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and no more", None])
def test_damaged_packs_are_refused(damage, reader):
    write_packs(reader, SIZES, seed=1)
    path = packs_path(reader, 64)
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(DataError, match="packs-64.npz: not readable"):
        find_packs(reader, SIZES, seed=1)


def rewrite(path, **changed):
    with np.load(path) as content:
        entries = dict(content) | changed
    with path.open("wb") as file:
        np.savez(file, **entries)


@pytest.mark.parametrize("made_of", [[1], None])
def test_a_file_that_is_no_packs_is_refused(made_of, reader):
    write_packs(reader, SIZES, seed=1)
    path = packs_path(reader, 64)
    rewrite(path, made_of=json.dumps(made_of))
    with pytest.raises(DataError, match="packs-64.npz: not readable"):
        find_packs(reader, SIZES, seed=1)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(DataError, match="packs-64.npz: not readable"):
        find_packs(reader, SIZES, seed=1)


def test_packs_that_do_not_hold_every_sample_once_are_refused(reader):
    good = write_packs(reader, SIZES, seed=1)
    last, num = good.bounds[-1], len(good.samples)
    for changed in (
        {"samples": good.samples[::-1][np.r_[0, : num - 1]]},  # one twice, one never
        {"samples": np.r_[good.samples[:-1], num]},
        {"samples": good.samples.astype(float)},
        {"bounds": good.bounds[:-1]},
        {"bounds": np.r_[good.bounds[:-1], good.bounds[-2], last]},  # one without samples
        {"bounds": good.bounds[[0, -1]]},  # too many tokens
        {"bounds": good.bounds[:0]},
    ):
        write_packs(reader, SIZES, seed=1)
        rewrite(packs_path(reader, 64), **changed)
        with pytest.raises(DataError, match="not every sample once, or too many tokens in one sequence"):
            find_packs(reader, SIZES, seed=1)


def test_packs_of_a_dataset_that_changed_and_kept_its_size_are_refused(tmp_path):
    lengths, sizes = [60, 4, 4, 30, 34], Sizes(capacity=64, sample_tokens=64, tokens_per_image=10)
    for order in (lengths, sorted(lengths)):
        with Writer(tmp_path / "set") as writer:
            for length in order:
                writer.add(np.arange(length, dtype=np.int32), [], np.array([[1, 2]], np.int32))
            writer.finish({"family": "llava"})
        if order is lengths:
            write_packs(Reader(tmp_path / "set"), sizes, seed=None)
    with pytest.raises(DataError, match="too many tokens in one sequence; remove it, or write it again"):
        find_packs(Reader(tmp_path / "set"), sizes, seed=None)


@pytest.mark.parametrize(("written", "wanted"), [(1, "drawn order of samples, not stored"), (None, "stored .* drawn")])
def test_packs_of_samples_in_another_order_are_refused(written, wanted, reader):
    write_packs(reader, SIZES, seed=written)
    with pytest.raises(DataError, match=f"{wanted}; .* --sample-tokens 48 --image-tokens 10 --seed"):
        find_packs(reader, SIZES, seed=None if written else 1)


def test_memory_does_not_grow_with_the_capacity():
    assert len(pack(np.full(100, 10), 10**12)) == 1
