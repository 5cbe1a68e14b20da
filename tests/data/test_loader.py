import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from megamm.batch import IGNORE, IMAGE
from megamm.data.image import ImageFormat, decode, to_pixels
from megamm.data.indexed import Writer
from megamm.data.loader import FILLER, Dataset, Loader, collate, collate_packed, grouped_order
from megamm.data.packing import pack
from megamm.errors import ConfigError, DataError

TOKENS, SIZE, PAD = 4, 8, 0
FORMAT = ImageFormat(size=SIZE, mean=(0.5, 0.5, 0.5), tokens=TOKENS)


def dataset(prefix, max_tokens=100, with_pixels=True):
    return Dataset(prefix, FORMAT, max_tokens, with_pixels)


def loader(prefix, **options):
    defaults = {"dp_rank": 0, "dp_size": 1, "micro_batch": 1, "global_batch": 4, "pad_id": PAD}
    source = options.pop("dataset", None) or dataset(prefix)
    return Loader(source, **(defaults | options))


def first_ids(step):
    """Which samples a step holds: in `make_dataset` the first id of a sample is its name."""
    return [row[0].item() for batch in step for row in batch.ids_BS if row[0] != PAD]


def take(source, steps):
    stream = iter(source)
    return [next(stream) for _ in range(steps)]


def same(a, b):
    names = ("ids_BS", "targets_BS", "slots_K", "rows_K")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def collated(samples, **options):
    defaults = {"pad_id": PAD, "pad_multiple": 1, "tokens_per_image": TOKENS, "with_pixels": True, "image_size": SIZE}
    return collate(samples, **(defaults | options))


def test_sample(make_dataset):
    source = dataset(make_dataset(3))
    sample = source[2]
    I, _ = IMAGE, IGNORE  # noqa: E741
    assert sample.ids_S.tolist() == [1002, I, I, I, I, 7, I, I, I, I, 7, 100, 101, 102, 103, 104]
    assert sample.labels_S.tolist() == [_] * 14 + [103, 104]
    assert sample.num_images == 2 and sample.pixels_I3HW.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(sample.pixels_I3HW[1], to_pixels(decode(source.reader.image(2, 1)), FORMAT))
    assert source[0].pixels_I3HW.shape == (0, 3, SIZE, SIZE) and source[0].num_images == 0
    assert source.num_tokens.tolist() == [len(source[i].ids_S) for i in range(3)]


@pytest.mark.parametrize(("max_tokens", "num_images"), [(16, 2), (7, 2), (6, 1), (2, 1), (1, 0)])
def test_cut_sample_keeps_the_pictures_that_begin_inside(max_tokens, num_images, make_dataset):
    sample = dataset(make_dataset(3), max_tokens)[2]
    assert len(sample.ids_S) == max_tokens and sample.num_images == len(sample.pixels_I3HW) == num_images


def test_batch(make_dataset):
    source = dataset(make_dataset(3))
    batch = collated([source[1], source[0], source[2]], pad_multiple=5)
    assert batch.ids_BS.shape == (3, 20) and batch.num_images == 3 and batch.num_tokens == 10 + 4 + 16
    assert batch.ids_BS[1].tolist() == [1000, 100, 101, 102] + [PAD] * 16
    assert batch.targets_BS[1].tolist() == [IGNORE, 101, 102] + [IGNORE] * 17  # each position predicts the next id
    assert batch.positions_BS.tolist() == [list(range(20))] * 3
    assert batch.pixels_I3HW.shape == (3, 3, SIZE, SIZE) and batch.pixels_I3HW.dtype == torch.uint8


@pytest.mark.parametrize("max_tokens", [100, 8, 7, 3])
def test_every_visual_token_has_its_row_and_place(max_tokens, make_dataset):
    """Placing [picture, token] pairs by slots and rows gives, in each sample, its own pictures in order."""
    source = dataset(make_dataset(6), max_tokens)
    samples = [source[i] for i in (2, 0, 1, 5)]
    batch = collated(samples)
    visual = torch.stack(torch.meshgrid(torch.arange(len(batch.pixels_I3HW)), torch.arange(TOKENS), indexing="ij"), -1)
    placed = torch.full((batch.ids_BS.numel(), 2), -1)
    placed[batch.slots_K] = visual.reshape(-1, 2)[batch.rows_K]
    placed = placed.reshape(*batch.ids_BS.shape, 2)
    assert torch.equal(placed[..., 0] >= 0, batch.ids_BS == IMAGE)
    picture = 0
    for b, sample in enumerate(samples):
        expected = [[picture + k, t] for k in range(sample.num_images) for t in range(TOKENS)]
        found = placed[b][batch.ids_BS[b] == IMAGE].tolist()
        assert found == expected[: len(found)] and len(found) > len(expected) - TOKENS
        picture += sample.num_images


def test_batch_without_pictures_carries_a_blank_one(make_dataset):
    source = dataset(make_dataset(3))
    batch = collated([source[0]])
    assert torch.equal(batch.pixels_I3HW, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    assert batch.num_images == 0 and len(batch.slots_K) == len(batch.rows_K) == 0


def test_ranks_without_vision_see_all_but_the_pixels(make_dataset, monkeypatch):
    prefix = make_dataset(6)
    with_pixels = take(loader(prefix, micro_batch=2), 2)
    monkeypatch.setattr("megamm.data.loader.decode", None)  # calling it would raise
    without = take(loader(prefix, micro_batch=2, dataset=dataset(prefix, with_pixels=False)), 2)
    for a, b in zip(sum(with_pixels, []), sum(without, []), strict=True):
        assert same(a, b) and (a.num_images, a.num_tokens) == (b.num_images, b.num_tokens)
        assert b.pixels_I3HW is None


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_holds_the_same_samples_at_any_layout(shuffle, make_dataset):
    prefix = make_dataset(13)
    expected = [sorted(first_ids(step)) for step in take(loader(prefix, shuffle=shuffle, seed=5), 8)]
    for dp_size, micro_batch in ((1, 4), (2, 1), (2, 2), (4, 1)):
        ranks = [
            take(loader(prefix, shuffle=shuffle, seed=5, dp_size=dp_size, micro_batch=micro_batch, dp_rank=rank), 8)
            for rank in range(dp_size)
        ]
        for i, step in enumerate(expected):
            assert all(len(rank[i]) == 4 // (dp_size * micro_batch) for rank in ranks)
            assert sorted(sum((first_ids(rank[i]) for rank in ranks), [])) == step


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(make_dataset):
    prefix = make_dataset(13)
    stream = sum((first_ids(step) for step in take(loader(prefix, seed=5), 13)), [])  # 4 epochs in 13 steps of 4
    epochs = [stream[i : i + 13] for i in range(0, 52, 13)]
    assert all(sorted(epoch) == list(range(1000, 1013)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sum((first_ids(step) for step in take(loader(prefix, seed=6), 4)), [])[:13] != epochs[0]
    stored = sum((first_ids(step) for step in take(loader(prefix, shuffle=False), 7)), [])
    assert stored[:26] == list(range(1000, 1013)) * 2


def test_order_never_changes(make_dataset):
    """A run resumed with another numpy or megamm must go on with the same samples."""
    stream = sum((first_ids(step) for step in take(loader(make_dataset(8), seed=2**40 + 3), 4)), [])
    assert [i - 1000 for i in stream] == [6, 7, 0, 3, 4, 1, 2, 5, 7, 6, 4, 3, 0, 1, 5, 2]


def mixture(num, seed=0):
    """Tokens and modality of samples like those of an instruction mix: one picture of 576 tokens and mostly short
    answers, and an eighth long conversations without."""
    draw = np.random.RandomState(seed)
    has_images = draw.rand(num) > 0.125
    words = np.exp(np.where(has_images, draw.normal(4.5, 0.8, num), draw.normal(6.0, 1.0, num))).astype(np.int64)
    return np.minimum(words + 1 + 576 * has_images, 2048), has_images


def padding(order, num_tokens, micro_batch):
    """Share of the tokens of all micro-batches that are padding."""
    tokens = num_tokens[order[: len(order) // micro_batch * micro_batch]].reshape(-1, micro_batch)
    return 1 - tokens.sum() / (tokens.max(axis=1).sum() * micro_batch)


@pytest.mark.parametrize("num", [0, 1, 31, 32, 1000])
@pytest.mark.parametrize("head", [0, 5, 31])
def test_grouped_order_has_every_sample_once_and_steps_of_one_modality(num, head):
    num_tokens, has_images = mixture(num)
    order = grouped_order(np.random.RandomState(1), num_tokens, has_images, 32, head)
    assert sorted(order.tolist()) == list(range(num))
    steps = order[head:]
    num_whole = sum(np.count_nonzero(has_images[steps] == modality) // 32 for modality in (True, False))
    for step in steps[: num_whole * 32].reshape(-1, 32):
        assert len(set(has_images[step])) == 1  # the last steps have what is left of both
        assert (np.diff(num_tokens[step]) <= 0).all()
    assert len(steps) - num_whole * 32 < 2 * 32
    if num == 1000:
        modalities = has_images[steps[: num_whole * 32 : 32]]
        assert np.count_nonzero(np.diff(modalities.astype(int))) > 3  # text comes between pictures, not at one end
        assert order.tolist() != grouped_order(np.random.RandomState(2), num_tokens, has_images, 32, head).tolist()


def lengths_dealt_out_like_llava(order, num_tokens, ranks, global_batch):
    """llava_trainer.py, split_to_even_chunks: each next sample of a step goes to the chunk with the fewest tokens."""
    dealt = []
    for step in order[: len(order) // global_batch * global_batch].reshape(-1, global_batch):
        chunks, sums = [[] for _ in range(ranks)], [0.0] * ranks
        for sample in step:
            least = sums.index(min(sums))
            chunks[least].append(sample)
            sums[least] += num_tokens[sample]
            if len(chunks[least]) == global_batch // ranks:
                sums[least] = float("inf")
        dealt += sum(chunks, [])
    return np.array(dealt)


@pytest.mark.parametrize("micro_batch", [2, 4, 16])
def test_grouping_saves_padding(micro_batch):
    num_tokens, has_images = mixture(12_800)
    random = np.random.RandomState(0).permutation(len(num_tokens))
    grouped = grouped_order(np.random.RandomState(0), num_tokens, has_images, 128)
    llava = lengths_dealt_out_like_llava(grouped, num_tokens, 128 // micro_batch, 128)
    shares = [padding(order, num_tokens, micro_batch) for order in (random, llava, grouped)]
    print("padding of a random order, LLaVA's chunks, ours: " + ", ".join(f"{share:.1%}" for share in shares))
    assert shares[2] < 0.3 * shares[0] and shares[2] < 0.3 * shares[1]


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(8, 2), (4, 4), (2, 16)])
def test_ranks_of_a_grouped_step_have_about_the_same_to_do(dp_size, micro_batch):
    num_tokens, has_images = mixture(12_800)
    order = grouped_order(np.random.RandomState(0), num_tokens, has_images, 128)
    for step in order[: 90 * 128].reshape(-1, 128):
        padded = num_tokens[step].reshape(-1, dp_size, micro_batch).max(axis=2) * micro_batch
        work = padded.sum(axis=0)
        assert work.max() - work.min() <= micro_batch * (num_tokens[step].max() - num_tokens[step].min())


@pytest.mark.parametrize(("num_samples", "most_mixed"), [(29, 3), (16, 1), (3, 3)])
def test_grouped_steps_stay_whole_in_every_epoch(num_samples, most_mixed, make_dataset):
    """Epochs do not end where steps end; each has every sample once, and its groups lie where the run's steps lie.
    Mixed are the step that spans two epochs and those with what is left over of both modalities."""
    source = dataset(make_dataset(num_samples), with_pixels=False)
    options = {"dataset": source, "group_by_modality_length": True, "seed": 3}
    steps = [first_ids(step) for step in take(loader(None, **options), num_samples)]  # of 4: four epochs
    stream = sum(steps, [])
    epochs = [stream[i : i + num_samples] for i in range(0, 4 * num_samples, num_samples)]
    assert all(sorted(epoch) == list(range(1000, 1000 + num_samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    num_mixed = sum(len({(name - 1000) % 3 > 0 for name in step}) == 2 for step in steps)
    assert num_mixed <= 4 * most_mixed


def test_a_grouped_order_is_the_same_at_any_layout_and_after_a_resume(make_dataset):
    source = dataset(make_dataset(29), with_pixels=False)
    options = {"dataset": source, "group_by_modality_length": True, "seed": 5, "global_batch": 8}
    whole = [first_ids(step) for step in take(loader(None, **options), 12)]  # more than three epochs
    for dp_size, micro_batch, num_workers in ((1, 8, 0), (2, 1, 0), (2, 4, 1), (4, 2, 0), (8, 1, 0)):
        layout = {"dp_size": dp_size, "micro_batch": micro_batch, "num_workers": num_workers} | options
        ranks = [loader(None, dp_rank=rank, **layout) for rank in range(dp_size)]
        first = list(zip(*(take(rank, 5) for rank in ranks), strict=True))
        resumed = [loader(None, dp_rank=rank, **layout) for rank in range(dp_size)]
        for rank in resumed:
            rank.load_state_dict(ranks[0].state_dict())
        steps = first + list(zip(*(take(rank, 7) for rank in resumed), strict=True))
        assert [sorted(sum(map(first_ids, step), [])) for step in steps] == [sorted(step) for step in whole]


def test_grouped_order_never_changes(make_dataset):
    options = {"group_by_modality_length": True, "seed": 2**40 + 3, "global_batch": 2}
    stream = sum((first_ids(step) for step in take(loader(make_dataset(9), **options), 9)), [])
    assert [i - 1000 for i in stream] == [7, 2, 3, 0, 4, 1, 8, 5, 6, 4, 8, 7, 5, 1, 6, 3, 2, 0]


def test_a_packed_batch_is_one_row_of_samples(make_dataset):
    source = Dataset(make_dataset(4), FORMAT, 10, keeps_images_whole=True)
    samples = [source[i] for i in (3, 0, 2, 1)]  # of 7, 4, 10 and 10 tokens; the third is cut behind its pictures
    options = {"pad_id": PAD, "tokens_per_image": TOKENS, "with_pixels": True, "image_size": SIZE}
    batch = collate_packed(samples, pad_multiple=4, **options)
    lengths = [len(sample.ids_S) for sample in samples]
    assert batch.ids_BS.shape == batch.targets_BS.shape == batch.positions_BS.shape == (1, 32)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.tolist() == [0, 7, 11, 21, 31, 32]
    assert batch.max_seqlen == 10 and batch.num_tokens == 31 and batch.num_images == 3
    alone = [collated([sample]) for sample in samples]
    for name in ("ids_BS", "targets_BS", "positions_BS"):
        assert torch.equal(getattr(batch, name)[:, :31], torch.cat([getattr(one, name) for one in alone], dim=1)), name
    assert batch.positions_BS[0, 31] == 0 and batch.targets_BS[0, 31] == IGNORE
    firsts = np.cumsum([0, *lengths])
    assert batch.starts_BM.tolist() == [[firsts[2] + 1, firsts[2] + 6, firsts[3] + 1]]
    assert torch.equal(batch.pixels_I3HW, torch.cat([sample.pixels_I3HW for sample in samples]))
    assert (batch.ids_BS.flatten()[batch.slots_K] == IMAGE).all()
    assert batch.rows_K.tolist() == list(range(len(batch.slots_K)))


def test_what_stays_of_a_packed_sample_has_its_pictures_whole(make_dataset):
    """1002, picture of 4, 7, picture of 4, 7, 100 ...: a cut at 7 would leave one token of the second picture."""
    prefix = make_dataset(3)
    for max_tokens, kept in ((16, 16), (10, 10), (9, 6), (7, 6), (6, 6), (5, 5), (4, 1), (1, 1)):
        sample = Dataset(prefix, FORMAT, max_tokens, keeps_images_whole=True)[2]
        assert len(sample.ids_S) == len(sample.labels_S) == kept, max_tokens
        assert (sample.ids_S == IMAGE).sum() == TOKENS * sample.num_images == TOKENS * len(sample.pixels_I3HW)


def test_a_packed_sample_may_lose_all_that_it_had(make_dataset):
    """One that begins with a picture for which there is no room: nothing of it is left."""
    source = Dataset(make_dataset(4), FORMAT, 10, keeps_images_whole=True)
    empty = source[FILLER]
    options = {"pad_id": PAD, "tokens_per_image": TOKENS, "with_pixels": True, "image_size": SIZE}
    expected = collate_packed([source[0], source[1]], pad_multiple=4, **options)
    for samples in ([empty, source[0], source[1]], [source[0], empty, source[1]], [source[0], source[1], empty]):
        batch = collate_packed(samples, pad_multiple=4, **options)
        assert same(batch, expected) and torch.equal(batch.positions_BS, expected.positions_BS)
        assert torch.equal(batch.cu_seqlens, expected.cu_seqlens)
    nothing = collate_packed([empty, empty], pad_multiple=4, **options)
    assert nothing.cu_seqlens.tolist() == [0, 4] and nothing.num_tokens == 0
    assert nothing.targets_BS.tolist() == [[IGNORE] * 4] and nothing.pixels_I3HW.shape == (1, 3, SIZE, SIZE)


def packed_loader(prefix, seed=5, **options):
    source = Dataset(prefix, FORMAT, 40, keeps_images_whole=True)
    return loader(prefix, dataset=source, seed=seed, packs=pack(source.num_tokens, 40, seed), **options)


def names(step):
    """Which samples a packed step holds, in order."""
    return [i for batch in step for i in batch.ids_BS.flatten().tolist() if i >= 1000]


def test_packs_are_dealt_out_alike_at_any_layout_and_every_sample_comes_once(make_dataset):
    prefix = make_dataset(23)
    one = packed_loader(prefix, global_batch=4)
    num_packs = len(pack(one.dataset.num_tokens, 40, 5))
    assert 8 <= num_packs < 20
    steps = take(one, num_packs)  # four epochs
    expected = [names(step) for step in steps]
    assert sorted(sum(expected, [])) == sorted(list(range(1000, 1023)) * 4)
    assert one.samples == one.state_dict()["samples_seen"] == 4 * 23
    assert all(batch.ids_BS.shape == (1, batch.num_tokens) for step in steps for batch in step)
    for dp_size, micro_batch in ((1, 4), (2, 1), (2, 2), (4, 1)):
        options = {"dp_size": dp_size, "micro_batch": micro_batch, "global_batch": 4}
        ranks = [take(packed_loader(prefix, dp_rank=rank, **options), num_packs) for rank in range(dp_size)]
        for i, step in enumerate(expected):
            assert sorted(sum((names(rank[i]) for rank in ranks), [])) == sorted(step)


def test_packs_resume_exactly_with_other_ranks_and_workers(make_dataset):
    prefix = make_dataset(23)
    whole = take(packed_loader(prefix, micro_batch=2), 9)
    running = packed_loader(prefix, dp_size=2, dp_rank=1, num_workers=2)
    take(running, 4)
    resumed = packed_loader(prefix, micro_batch=2, num_workers=1)
    resumed.load_state_dict(running.state_dict())
    for a, b in zip(sum(whole[4:], []), sum(take(resumed, 5), []), strict=True):
        assert same(a, b) and torch.equal(a.pixels_I3HW, b.pixels_I3HW) and torch.equal(a.cu_seqlens, b.cu_seqlens)


def test_other_packs_are_another_order(make_dataset):
    prefix = make_dataset(23)
    state = packed_loader(prefix).state_dict()
    with pytest.raises(DataError, match="resume: the checkpoint read its data with packs = .*, this run has None"):
        loader(prefix, seed=5).load_state_dict(state)
    source = dataset(prefix, max_tokens=40)
    with pytest.raises(DataError, match="resume: .* the same data.packing, data.max_tokens and packs beside"):
        loader(prefix, dataset=source, seed=5, packs=pack(source.num_tokens, 50, 5)).load_state_dict(state)


def test_a_global_batch_may_span_epochs(make_dataset):
    steps = take(loader(make_dataset(3), global_batch=8), 3)
    stream = sum((first_ids(step) for step in steps), [])
    assert all(sorted(stream[i : i + 3]) == [1000, 1001, 1002] for i in range(0, 24, 3))


def test_resume_is_exact_with_other_ranks_and_workers(make_dataset):
    prefix = make_dataset(13)
    whole = take(loader(prefix, seed=5, micro_batch=2), 9)
    running = loader(prefix, seed=5, dp_size=2, dp_rank=1, num_workers=2)
    take(running, 4)
    state = running.state_dict()
    identity = {"seed": 5, "shuffle": True, "samples": 13, "group_by_modality_length": False, "global_batch": None}
    data = {"bytes": Path(f"{prefix}.bin").stat().st_size, "blend": None, "packs": None}
    assert state == {"consumed": 16, "samples_seen": 16, "truncated": 0} | identity | data
    resumed = loader(prefix, seed=5, micro_batch=2)
    resumed.load_state_dict(state)
    for a, b in zip(sum(whole[4:], []), sum(take(resumed, 5), []), strict=True):
        assert same(a, b) and torch.equal(a.pixels_I3HW, b.pixels_I3HW)
    assert resumed.state_dict()["consumed"] == 36


def test_workers_change_nothing(make_dataset):
    prefix = make_dataset(13)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone, together = take(loader(prefix), 5), take(loader(prefix, num_workers=2), 5)
    assert torch.equal(torch.get_rng_state(), before)  # otherwise resuming would change dropout
    assert all(same(a, b) for a, b in zip(sum(alone, []), sum(together, []), strict=True))


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"shuffle": False}, {"num": 12}, {"group_by_modality_length": False}, {"global_batch": 8}]
)
def test_state_of_another_order_is_refused(change, make_dataset):
    options = {"seed": 5, "group_by_modality_length": True}
    state = loader(make_dataset(13), **options).state_dict()
    num = change.get("num", 13)
    options |= {key: value for key, value in change.items() if key != "num"}
    with pytest.raises(DataError, match="resume: the checkpoint read its data with .*; give it the same, or start"):
        loader(make_dataset(num, "other"), **options).load_state_dict(state)


def test_a_random_order_goes_on_with_another_global_batch(make_dataset):
    prefix = make_dataset(13)
    running = loader(prefix, seed=5)
    take(running, 2)
    resumed = loader(prefix, seed=5, global_batch=2)
    resumed.load_state_dict(running.state_dict())
    expected = sum((first_ids(step) for step in take(loader(prefix, seed=5), 4)), [])
    assert sum((first_ids(step) for step in take(resumed, 4)), []) == expected[8:]


def test_cut_samples_are_counted_over_all_ranks(make_dataset):
    prefix = make_dataset(6)
    source = dataset(prefix, max_tokens=10)
    per_epoch = sum(source.num_tokens > 10)
    assert per_epoch == 3
    cut = loader(prefix, dataset=source, dp_size=2, dp_rank=1, global_batch=6)
    take(cut, 2)
    assert cut.truncated == cut.state_dict()["truncated"] == 2 * per_epoch


@pytest.mark.parametrize(("dp_size", "micro_batch", "num_workers"), [(1, 1, 0), (2, 2, 0), (2, 1, 2), (4, 1, 0)])
def test_evaluation_sees_each_sample_once_and_ranks_keep_step(dp_size, micro_batch, num_workers, make_dataset):
    prefix = make_dataset(13)
    options = {"shuffle": False, "dp_size": dp_size, "micro_batch": micro_batch, "num_workers": num_workers}
    ranks = [loader(prefix, dp_rank=rank, num_samples=9, **options) for rank in range(dp_size)]
    for _ in range(2):  # every iteration is a pass of its own
        steps = [list(rank) for rank in ranks]
        assert {len(rank) for rank in steps} == {3}
        batches = [batch for rank in steps for step in rank for batch in step]
        seen = sum((first_ids(step) for rank in steps for step in rank), [])
        assert sorted(seen) == list(range(1000, 1009))
        assert sum((batch.targets_BS != IGNORE).sum().item() for batch in batches) == 9 * 2
        assert all(batch.ids_BS.shape[0] == micro_batch and batch.pixels_I3HW is not None for batch in batches)


def test_evaluation_of_more_than_there_is_is_the_whole_set(make_dataset):
    steps = list(loader(make_dataset(5), shuffle=False, num_samples=256))
    assert [len(first_ids(step)) for step in steps] == [4, 1]


def test_filler_is_no_token():
    assert FILLER == -1
    samples = [Dataset.__getitem__(_Bare(), FILLER)] * 2
    batch = collated(samples, pad_multiple=4)
    assert batch.ids_BS.shape == (2, 4) and batch.num_tokens == batch.num_images == 0
    assert (batch.targets_BS == IGNORE).all() and batch.pixels_I3HW.shape == (1, 3, SIZE, SIZE)


class _Bare(Dataset):
    def __init__(self):
        self.image_format, self.max_tokens, self.with_pixels = FORMAT, 10, True


@pytest.mark.parametrize("num_workers", [0, 1])
def test_picture_that_does_not_decode_is_one_clear_message(num_workers, tmp_path):
    with Writer(tmp_path / "set") as writer:
        writer.add(np.array([IMAGE, 1], np.int32), [b"no picture"], np.array([[1, 2]], np.int32))
        writer.finish({})
    with pytest.raises(DataError) as error:
        take(loader(tmp_path / "set", num_workers=num_workers), 1)
    assert str(error.value).startswith(f"{tmp_path}/set: document 0, picture 0: the picture is empty")
    assert "Traceback" not in str(error.value)


class _Deadly(Dataset):
    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_worker_that_dies_is_one_clear_message(make_dataset):
    source = _Deadly(make_dataset(3), FORMAT, 10)
    with pytest.raises(DataError, match="data.num_workers: DataLoader worker .* is memory full"):
        take(loader(None, dataset=source, num_workers=1), 1)


def test_bad_sizes_are_refused(make_dataset):
    with pytest.raises(ConfigError, match="train.global_batch: 4 is no multiple of data parallel size 3 x"):
        loader(make_dataset(3), dp_size=3)
    with pytest.raises(DataError, match="holds no sample; give another data.path"):
        loader(make_dataset(0, "empty"))
