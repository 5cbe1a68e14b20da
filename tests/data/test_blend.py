import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from megamm.batch import IMAGE
from megamm.data.blend import Blend, counts_by_tokens, counts_by_weight, num_tokens, open_reader, write_blend
from megamm.data.image import ImageFormat
from megamm.data.indexed import Reader, Writer
from megamm.data.loader import Dataset, Loader
from megamm.errors import DataError

FORMAT = ImageFormat(size=8, mean=(0.5,) * 3, tokens=4)


def write(prefix, num, name, origin=None):
    """Documents whose first id says which they are: 1000 * name + number; they have 3 to 5 ids."""
    with Writer(prefix) as writer:
        for i in range(num):
            ids = [1000 * name + i, *range(10, 12 + i % 3)]
            writer.add(np.array(ids, np.int32), [], np.array([[1, len(ids)]], np.int32))
        writer.finish(origin or {"family": "llava", "tokenizer": {"hash": "abc"}})
    return Reader(prefix)


@pytest.fixture
def readers(tmp_path):
    return [write(tmp_path / "sets" / f"set{k}", num, k) for k, num in ((1, 10), (2, 7), (3, 4))]


def blended(blend):
    """How often each sample is there."""
    return Counter(int(blend.text(i)[0][0]) for i in range(len(blend)))


def drawn(prefix, dp_size=1, num_workers=0, steps=12, state=None, micro_batch=1):
    """The first ids of every step, over all ranks, in the global order; and the state after each step."""
    ranks, states = [], []
    for rank in range(dp_size):
        loader = Loader(
            Dataset(prefix, FORMAT, 100), dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch, global_batch=4,
            pad_id=0, seed=3, num_workers=num_workers,
        )  # fmt: skip
        if state is not None:
            loader.load_state_dict(state)
        stream, of_rank = iter(loader), []
        for _ in range(steps):
            of_rank.append([batch.ids_BS[:, 0].tolist() for batch in next(stream)])
            states.append(loader.state_dict())
        ranks.append(of_rank)
    per_step = [[ids for shares in zip(*step, strict=True) for ids in sum(shares, [])] for step in zip(*ranks)]  # noqa: B905
    return per_step, states


def test_every_sample_is_there_as_often_as_the_blend_says(readers, tmp_path):
    blend = write_blend(tmp_path / "mix", readers, [10, 17, 3], seed=0)
    assert blend.counts == [10, 17, 3] and len(blend) == 30
    counts = blended(blend)
    assert all(counts[1000 + i] == 1 for i in range(10))
    assert sorted(counts[2000 + i] for i in range(7)) == [2] * 4 + [3] * 3
    assert sorted(counts[3000 + i] for i in range(4)) == [0, 1, 1, 1]
    assert [reader.prefix for reader in blend.readers] == [str(tmp_path / "sets" / f"set{k}") for k in (1, 2, 3)]
    assert blend.num_ids.tolist() == [len(blend.text(i)[0]) for i in range(30)]
    assert num_tokens(blend, 4).sum() == blend.num_ids.sum()
    with pytest.raises(IndexError, match="30 samples"):
        blend.text(30)


def test_order_is_mixed_and_never_changes(readers, tmp_path):
    blend = write_blend(tmp_path / "mix", readers, [3, 3, 3], seed=2**40 + 1)
    order = [int(blend.text(i)[0][0]) for i in range(9)]
    assert order == [int(Blend(tmp_path / "mix").text(i)[0][0]) for i in range(9)]
    assert order == [2005, 1005, 2002, 3001, 3000, 2003, 3003, 1008, 1004]
    other = write_blend(tmp_path / "other", readers, [3, 3, 3], seed=0)
    assert order != [int(other.text(i)[0][0]) for i in range(9)]


def test_training_sees_each_epoch_whole_and_resumes_at_another_layout(readers, tmp_path):
    """Killed in mid-epoch, with other ranks and workers: the same samples in the same global order."""
    blend = write_blend(tmp_path / "mix", readers, [10, 9, 2], seed=1)
    steps, states = drawn(tmp_path / "mix", steps=12)
    stream = sum(steps, [])
    assert Counter(stream[:21]) == Counter(stream[21:42]) == blended(blend)
    for dp_size, micro_batch, workers in ((2, 1, 0), (4, 1, 0), (2, 2, 2)):
        resumed, _ = drawn(tmp_path / "mix", dp_size, workers, 9, json.loads(json.dumps(states[2])), micro_batch)
        assert resumed == steps[3:]


def test_resuming_with_another_blend_is_refused(readers, tmp_path):
    write_blend(tmp_path / "mix", readers, [10, 7, 4], seed=1)
    write_blend(tmp_path / "other", readers, [10, 7, 4], seed=2)
    _, states = drawn(tmp_path / "mix", steps=1)
    with pytest.raises(DataError, match="read its data with blend"):
        drawn(tmp_path / "other", steps=1, state=states[0])


def test_a_blend_of_pictures(make_dataset, tmp_path):
    """make_dataset's document i has i % 3 pictures."""
    prefixes = [make_dataset(6, "a"), make_dataset(3, "b")]
    readers = [Reader(prefix) for prefix in prefixes]
    write_blend(tmp_path / "mix", readers, [6, 6], seed=0)
    mixed = Dataset(tmp_path / "mix", FORMAT, 100)
    alone = [Dataset(prefix, FORMAT, 100) for prefix in prefixes]
    assert pickle.loads(pickle.dumps(mixed.reader)).info == mixed.reader.info  # noqa: S301 our own bytes
    for i in range(12):
        reader, number = mixed.reader.place(i)
        expected = alone[[str(prefix) for prefix in prefixes].index(reader.prefix)][number]
        assert torch.equal(mixed[i].ids_S, expected.ids_S) and torch.equal(mixed[i].pixels_I3HW, expected.pixels_I3HW)
        assert mixed.num_tokens[i] == len(expected.ids_S)
        assert mixed.reader.num_images[i] == (mixed[i].ids_S == IMAGE).sum() // FORMAT.tokens


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [
        ((1, 1, 1), 10, [4, 3, 3]),
        ((0.7, 0.2, 0.1), None, [14, 4, 2]),
        ((10, 7, 4), None, [10, 7, 4]),
        ((0, 1, 1), None, [0, 4, 4]),
        ((1, 1, 1), 1, [1, 0, 0]),
        ((0.1, 0.2, 0.7), 1000, [100, 200, 700]),
    ],
)
def test_counts_by_weight(weights, total, counts):
    assert counts_by_weight(weights, [14, 7, 4], total) == counts


@pytest.mark.parametrize("weights", [(0, 0), (1, -1), (1, float("nan")), (1, float("inf"))])
def test_bad_weights(weights):
    with pytest.raises(DataError, match="--weights"):
        counts_by_weight(weights, [3, 4], None)


def test_counts_by_tokens_are_the_fewest_that_reach_the_budget(readers, tmp_path):
    budgets = [17, 100, 0]
    counts = counts_by_tokens(readers, budgets, 4, seed=5)
    blend = write_blend(tmp_path / "mix", readers, counts, seed=5)
    tokens = [int(blend.num_ids[blend.member == k].sum()) for k in range(3)]
    for budget, found in zip(budgets, tokens, strict=True):
        assert budget <= found < budget + 5  # the longest document has 5
    assert counts[2] == 0
    whole = int(readers[0].num_ids.sum())
    assert counts_by_tokens(readers[:1], [whole], 4, seed=5) == [10]
    with pytest.raises(DataError, match="--tokens"):
        counts_by_tokens([write(tmp_path / "none", 0, 9)], [5], 4, seed=0)


def test_a_folder_of_datasets_and_blend_can_be_moved(readers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_blend("sets/mix", [Reader("sets/set1"), Reader("sets/set2")], [1, 1], seed=0)
    (tmp_path / "sets").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert len(open_reader(tmp_path / "moved" / "mix")) == 2


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 7}, "format version 7"),
        ({"seed": "x"}, "`seed` is 'x'"),
        ({"blend": 5}, "`blend` is no list of datasets"),
        ({"blend": [{"prefix": "a"}]}, "`blend` is no list of datasets"),
        ({"blend": []}, "a blend without samples"),
        ({"blend": [{"prefix": "a", "samples": -1, "documents": 1, "bin_bytes": 1}]}, "`blend` has"),
        ({"blend": [{"prefix": "gone", "samples": 1, "documents": 1, "bin_bytes": 1}]}, "gone.json: not found"),
    ],
)
def test_damaged_blend_is_refused(changes, message, readers, tmp_path):
    write_blend(tmp_path / "mix", readers, [1, 1, 1], seed=0)
    edit(tmp_path / "mix.json", **changes)
    with pytest.raises(DataError, match=message):
        open_reader(tmp_path / "mix")


def test_members_must_fit(readers, tmp_path):
    write_blend(tmp_path / "mix", readers, [1, 1, 1], seed=0)
    for origin, key in (({"family": "imp"}, "family"), ({"family": "llava", "tokenizer": {"hash": "x"}}, "tokenizer")):
        stranger = write(tmp_path / "stranger", 2, 8, origin)
        with pytest.raises(DataError, match=f"stranger: preprocessed with another {key} than .*set1"):
            write_blend(tmp_path / "other", [readers[0], stranger], [1, 1], seed=0)
    with pytest.raises(DataError, match="set1.bin: a dataset; give another --output"):
        write_blend(tmp_path / "sets" / "set1", readers, [1, 1, 1], seed=0)
    with pytest.raises(DataError, match="a blend without samples"):
        write_blend(tmp_path / "other", readers, [0, 0, 0], seed=0)
    with pytest.raises(DataError, match="a blend of datasets; give one dataset"):
        Reader(tmp_path / "mix")
    write(tmp_path / "sets" / "set2", 8, 2)
    with pytest.raises(DataError, match="set2 is not what it was when it was blended"):
        open_reader(tmp_path / "mix")
    (tmp_path / "mix.json").write_text("{")
    with pytest.raises(DataError, match="mix.json: not readable as JSON"):
        open_reader(tmp_path / "mix")
    with pytest.raises(DataError, match="mix.json: not readable as JSON"):
        Blend(tmp_path / "mix")


@pytest.mark.parametrize("suffix", ["json", "bin", "idx"])
def test_a_file_in_place_of_the_prefix_is_told(suffix, readers):
    with pytest.raises(DataError, match=f"set1.{suffix}: a file of a dataset; give its prefix, .*set1$"):
        open_reader(f"{readers[0].prefix}.{suffix}")
