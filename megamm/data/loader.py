"""Dataset on disk -> the micro-batches of each step on each data parallel rank, in a seeded order, resumable exactly.

What is drawn depends on the seed, the number of samples consumed and, where samples are grouped, the global batch:
never on ranks, micro-batches or workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from megamm.batch import IGNORE, IMAGE, Batch, Sample
from megamm.data.blend import members, num_tokens, open_reader
from megamm.data.faults import SampleFault
from megamm.data.image import ImageFormat, decode, to_views
from megamm.data.packing import Packs
from megamm.data.text import expand
from megamm.errors import ConfigError, DataError, MegammError

FILLER = -1
"""Stands in an order for a sample without tokens, where a rank has nothing left to evaluate."""


class Dataset:
    """Samples of an indexed dataset by number, as one model wants them."""

    def __init__(
        self,
        prefix: str | Path,
        image_format: ImageFormat,
        max_tokens: int,
        with_pixels: bool = True,
        keeps_images_whole: bool = False,
    ):
        """`prefix`: of an indexed dataset or of a blend. `with_pixels=False`: for ranks that run no vision.embed;
        pictures are neither read nor decoded. `keeps_images_whole`: a sample that is too long is cut in front of a
        picture, never inside it.

        Raises DataError for a dataset that is not whole, or whose tiles are not of the tower's size."""
        self.reader = open_reader(prefix)
        self.image_format = image_format
        self.max_tokens = max_tokens
        self.with_pixels = with_pixels
        self.keeps_images_whole = keeps_images_whole
        self.placeholder: list[int] | None = self.reader.info.get("placeholder")
        """The ids that stand for a picture where its visual tokens are no part of the sequence."""
        for reader in members(self.reader):
            rules = reader.info.get("views")
            if rules is not None and rules["cut"] != "none" and rules["tile_size"] != image_format.size:
                raise DataError(
                    f"{reader.prefix}: pictures were cut for tiles of {rules['tile_size']} pixels, the model's tower "
                    f"sees {image_format.size}; preprocess again with --tile-size {image_format.size}"
                )

    def __len__(self) -> int:
        """Samples."""
        return len(self.reader)

    @property
    def num_tokens(self) -> np.ndarray:
        """int64 [samples]: tokens of each sample after expansion and before the cut to `max_tokens`."""
        return num_tokens(self.reader, self.image_format.tokens)

    def __getitem__(self, i: int) -> Sample:
        """Sample `i`; FILLER is one without tokens. Raises DataError for a picture that cannot be decoded."""
        if i == FILLER:
            ids = labels = starts = np.empty(0, dtype=np.int64)
        else:
            stored_ids, spans = self.reader.text(i)
            views = [count for _, count in self.reader.views(i)] if self.keeps_images_whole else None
            ids, labels, starts = expand(
                stored_ids, spans, self.image_format.tokens, self.max_tokens, self.placeholder, views
            )
        return Sample(
            ids_S=torch.from_numpy(ids),
            labels_S=torch.from_numpy(labels),
            pixels_I3HW=self._pixels(i, len(starts)) if self.with_pixels else None,
            num_images=len(starts),
            starts_I=torch.from_numpy(starts),
        )

    def _pixels(self, i: int, num_images: int) -> torch.Tensor:
        size = self.image_format.size
        if not num_images:
            return torch.empty(0, 3, size, size, dtype=torch.uint8)
        pictures = []
        for k, num_views in self.reader.views(i):
            if k >= num_images:
                break
            try:
                views = to_views(decode(self.reader.image(i, k)), self.image_format, num_views)
            except SampleFault as fault:
                where = f"{self.reader.prefix}: document {i}, picture {k}"
                raise DataError(f"{where}: {fault}; preprocess again") from fault
            pictures.append(views[: num_images - k])
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)  # what is cut short is cut behind the rest


def collate(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    pad_multiple: int,
    tokens_per_image: int,
    with_pixels: bool,
    image_size: int,
) -> Batch:
    """One micro-batch of samples, right padded to their longest, rounded up to a multiple of `pad_multiple`."""
    longest = max(len(sample.ids_S) for sample in samples)
    S = -(-max(longest, 1) // pad_multiple) * pad_multiple
    ids_BS = torch.full((len(samples), S), pad_id, dtype=torch.int64)
    targets_BS = torch.full((len(samples), S), IGNORE, dtype=torch.int64)
    most = max(1, *(sample.num_images for sample in samples))
    starts_BM = torch.full((len(samples), most), S, dtype=torch.int64)
    slots, rows, num_images = [], [], 0
    for b, sample in enumerate(samples):
        num_tokens = len(sample.ids_S)
        ids_BS[b, :num_tokens] = sample.ids_S
        targets_BS[b, : max(num_tokens - 1, 0)] = sample.labels_S[1:]
        places = torch.nonzero(sample.ids_S == IMAGE).flatten()
        slots.append(b * S + places)
        # Only the last image of a sample can be cut short, so its visual tokens are a prefix of its images' rows.
        rows.append(num_images * tokens_per_image + torch.arange(len(places)))
        starts_I = places[::tokens_per_image] if sample.starts_I is None else sample.starts_I
        starts_BM[b, : sample.num_images] = starts_I[: sample.num_images]
        num_images += sample.num_images
    pixels_I3HW = None
    if with_pixels:
        pictures = [sample.pixels_I3HW for sample in samples if sample.pixels_I3HW is not None]
        blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        pixels_I3HW = torch.cat(pictures) if num_images else blank
    return Batch(
        ids_BS=ids_BS,
        targets_BS=targets_BS,
        positions_BS=torch.arange(S).expand(len(samples), S).contiguous(),
        pixels_I3HW=pixels_I3HW,
        slots_K=torch.cat(slots),
        rows_K=torch.cat(rows),
        starts_BM=starts_BM,
        num_images=num_images,
        num_tokens=sum(len(sample.ids_S) for sample in samples),
    )


def join(samples: Sequence[Sample]) -> Sample:
    """Samples one behind the other as one. None of their pictures may be cut: only the last of a sample could be."""
    begins = [0, *accumulate(len(sample.ids_S) for sample in samples[:-1])]
    labels_S = torch.cat([sample.labels_S for sample in samples])
    # Nothing of a sample predicts the first token of the next; one that lost all in front of a picture has none.
    labels_S[[begin for begin in begins if begin < len(labels_S)]] = IGNORE
    pixels = [sample.pixels_I3HW for sample in samples if sample.pixels_I3HW is not None]
    starts = [sample.starts_I for sample in samples if sample.starts_I is not None]
    return Sample(
        ids_S=torch.cat([sample.ids_S for sample in samples]),
        labels_S=labels_S,
        pixels_I3HW=torch.cat(pixels) if pixels else None,
        num_images=sum(sample.num_images for sample in samples),
        starts_I=torch.cat([first + x for first, x in zip(begins, starts, strict=True)]) if starts else None,
    )


def collate_packed(samples: Sequence[Sample], **layout: Any) -> Batch:
    """One micro-batch of one row that holds all samples, one behind the other. layout: what `collate` takes."""
    batch = collate([join(samples)], **layout)
    lengths = [len(sample.ids_S) for sample in samples if len(sample.ids_S)]
    if padding := batch.ids_BS.size(1) - sum(lengths):
        lengths.append(padding)
    return replace(
        batch,
        positions_BS=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
    )


def grouped_order(
    random: np.random.RandomState, num_tokens: np.ndarray, has_images: np.ndarray, global_batch: int, head: int = 0
) -> np.ndarray:
    """int64 [samples]: every sample once, each global batch of one modality and its longest sample first.

    num_tokens, has_images: of each sample. head: samples at the front that fill up the step in which the epoch before
    ended. The last steps hold what is left of both modalities, and the head is mixed, too.

    `group_by_modality_length` of LLaVA's trainer for W = global batch and B = 1. There a megabatch of W x B
    random samples of one modality, W = ranks x accumulation steps, is sorted by length and dealt out to W chunks of B.
    W x B is the global batch at every layout, but the chunks are not, so a choice of W that layouts do not change must
    be W = W x B: chunks of one, in the sorted order. It is also the choice with the least padding: neighbours share a
    micro-batch, where LLaVA deals out equal sums, one long sample to each chunk. The ranks keep step all the same: over
    a global batch, two of them differ by less than one micro-batch of its longest. Which samples share a step is
    LLaVA's, and the loss of a step does not depend on their order.

    Lengths are tokens, visual ones counted, where LLaVA counts words: tokens are what is padded. A last megabatch is
    left over only where it is short; LLaVA leaves over a whole one, too.
    """
    drawn = random.permutation(len(num_tokens))
    first, rest = drawn[:head], drawn[head:]
    whole, left_over = [], [first]
    for samples in (rest[has_images[rest]], rest[~has_images[rest]]):
        num_whole = len(samples) // global_batch * global_batch
        megabatches = samples[:num_whole].reshape(-1, global_batch)
        longest_first = np.argsort(-num_tokens[megabatches], axis=1, kind="stable")
        whole.append(np.take_along_axis(megabatches, longest_first, axis=1))
        left_over.append(samples[num_whole:])
    steps = random.permutation(np.concatenate(whole))
    head_part, *tails = (part[np.argsort(-num_tokens[part], kind="stable")] for part in left_over)
    return np.concatenate([head_part, steps.ravel(), *tails])


class Loader:
    """Iterating gives one list per step: the micro-batches of this rank, `global_batch / (dp_size * micro_batch)` long.

    Endless, epoch after epoch: the step that reaches the end of an epoch goes on with the order of the next, so that
    every sample is seen exactly once per epoch. With `num_samples` it is one pass for an evaluation, instead.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch: int,
        global_batch: int,
        pad_id: int,
        pad_multiple: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        group_by_modality_length: bool = False,
        num_workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
        num_samples: int | None = None,
        packs: Packs | None = None,
    ):
        """`pad_multiple`: what sequence lengths are rounded up to; tp, for sequence parallel. `shuffle`: a new order
        every epoch, or always the stored one. `group_by_modality_length`: the new order is a `grouped_order`.
        `num_workers`: processes that read and decode, each up to `prefetch` micro-batches ahead; 0: in this process.
        `pin_memory`: hand out batches in pinned memory. `num_samples`: exactly these first samples of the order (all,
        where there are fewer), each once; the last step is filled up with samples without tokens, on every rank alike.
        `packs`: samples that share a sequence, for an endless loader; then micro-batch and global batch count packs,
        and those of a micro-batch stand in one row.

        Raises ConfigError where `global_batch` does not divide, DataError where the dataset is empty.
        """
        if global_batch % (dp_size * micro_batch):
            raise ConfigError(
                [
                    f"train.global_batch: {global_batch} is no multiple of data parallel size {dp_size} x "
                    f"train.micro_batch {micro_batch}; change one of them"
                ]
            )
        if not len(dataset):
            raise DataError(f"{dataset.reader.prefix}: holds no sample; give another data.path")
        self.dataset = dataset
        self.truncated = 0
        """Samples so far, on all ranks together, that were longer than `max_tokens` and lost their end."""
        self.samples = 0
        """Samples so far, on all ranks together."""
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._micro_batch, self._global_batch = micro_batch, global_batch
        self._pad_id, self._pad_multiple = pad_id, pad_multiple
        self._seed, self._shuffle, self._is_grouped = seed, shuffle, shuffle and group_by_modality_length
        self._num_workers, self._prefetch = num_workers, prefetch
        self._pin_memory = pin_memory
        self._num_samples = None if num_samples is None else min(num_samples, len(dataset))
        self._packs = packs
        self._consumed = 0
        self._is_cut = dataset.num_tokens > dataset.max_tokens
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[list[Batch]]:
        """Steps from the present state on. The state moves with what was handed out, not with what was prefetched."""
        start = self._consumed
        if self._num_samples is not None:
            start = self.truncated = self.samples = 0
        batches = self._batches(self._micro_batches(start))
        per_step = self._global_batch // (self._dp_size * self._micro_batch)
        for first in self._steps(start):
            step = [next(batches) for _ in range(per_step)]
            drawn = np.asarray(self._samples(self._draw(first)))
            drawn = drawn[drawn != FILLER]
            self.samples += len(drawn)
            self.truncated += int(np.count_nonzero(self._is_cut[drawn]))
            self._consumed = first + self._global_batch
            yield step

    def state_dict(self) -> dict[str, Any]:
        """Small, plain and the same on every rank; describes the moment after the last step that was handed out."""
        counts = {"consumed": self._consumed, "samples_seen": self.samples, "truncated": self.truncated}
        return {**counts, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind what `state` describes, at the next `iter()`; ranks, micro-batch and workers may differ.

        Raises DataError where the order of the data would be another one.
        """
        for key, here in self._identity().items():
            if state.get(key) != here:
                decides = " data.packing, data.max_tokens and packs beside data.path" if key == "packs" else ""
                raise DataError(
                    f"resume: the checkpoint read its data with {key} = {state.get(key)}, this run has {here}; give it "
                    f"the same{decides}, or start a new run from the checkpoint as model.pretrained"
                )
        self._consumed, self.truncated = int(state["consumed"]), int(state["truncated"])
        self.samples = int(state.get("samples_seen", self._consumed))  # older checkpoints knew no packs

    def _identity(self) -> dict[str, Any]:
        """What the order is drawn from."""
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "samples": len(self.dataset),
            "bytes": self.dataset.reader.info["bin_bytes"],
            "blend": self.dataset.reader.info.get("blend"),
            "group_by_modality_length": self._is_grouped,
            "global_batch": self._global_batch if self._is_grouped else None,  # a random order has no use for it
            "packs": None if self._packs is None else self._packs.digest,
        }

    def _steps(self, start: int) -> Iterator[int]:
        """Number of samples consumed before each step."""
        while self._num_samples is None or start < self._num_samples:
            yield start
            start += self._global_batch

    def _draw(self, first: int) -> np.ndarray:
        """int64 [global_batch]: the samples, or the packs, of the step that begins when `first` are consumed."""
        at = np.arange(first, first + self._global_batch)
        epochs, places = np.divmod(at, self._per_epoch)
        drawn = np.empty_like(at)
        for epoch in np.unique(epochs):
            drawn[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
        if self._num_samples is not None:
            drawn[at >= self._num_samples] = FILLER
        return drawn

    @property
    def _per_epoch(self) -> int:
        """Samples, or packs, of an epoch."""
        return len(self.dataset if self._packs is None else self._packs)

    def _samples(self, drawn: np.ndarray) -> list[int]:
        """The samples of what was drawn."""
        if self._packs is None:
            return drawn.tolist()
        return [sample for number in drawn for sample in self._packs[number].tolist()]

    def _order(self, epoch: int) -> np.ndarray:
        """int64: every sample, or every pack, once."""
        if epoch not in self._orders:
            num_samples = self._per_epoch
            # RandomState, because numpy promises never to change its streams; its newer generators may.
            random = np.random.RandomState([self._seed & 0xFFFFFFFF, self._seed >> 32 & 0xFFFFFFFF, epoch])
            if self._is_grouped:
                head = -epoch * num_samples % self._global_batch
                has_images = self.dataset.reader.num_images > 0
                order = grouped_order(random, self.dataset.num_tokens, has_images, self._global_batch, head)
            elif self._shuffle:
                order = random.permutation(num_samples)
            else:
                order = np.arange(num_samples)
            self._orders[epoch] = order
            if len(self._orders) > 2:  # what is read ahead and what is handed out are seldom further apart
                del self._orders[next(iter(self._orders))]
        return self._orders[epoch]

    def _micro_batches(self, start: int) -> Iterator[list[int]]:
        """Samples of each micro-batch of this rank."""
        for first in self._steps(start):
            shares = self._draw(first).reshape(-1, self._dp_size, self._micro_batch)
            yield from map(self._samples, shares[:, self._dp_rank])

    def _batches(self, micro_batches: Iterable[list[int]]) -> Iterator[Batch]:
        put_together = collate if self._packs is None else collate_packed
        fetch = _Fetch(self.dataset, self._pad_id, self._pad_multiple, put_together)
        results: DataLoader[Any] = DataLoader(
            fetch,  # type: ignore[arg-type]
            sampler=micro_batches,
            batch_size=None,  # `fetch` makes whole micro-batches
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            collate_fn=_same,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # otherwise it draws from the global one, and resuming would change dropout
        )
        stream = iter(results)
        while True:
            try:
                result = next(stream)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker (pid" not in str(error):  # torch has no type of its own for a worker that died
                    raise
                raise DataError(f"data.num_workers: {error}; is memory full, or /dev/shm?") from error
            if isinstance(result, MegammError):
                raise result
            yield result


class _Fetch:
    """Numbers of samples -> Batch, in a worker. Returns a MegammError: raised there, it would arrive as a traceback."""

    def __init__(self, dataset: Dataset, pad_id: int, pad_multiple: int, put_together: Callable[..., Batch]):
        self._dataset = dataset
        self._put_together = put_together
        self._pad_id = pad_id
        self._pad_multiple = pad_multiple

    def __getitem__(self, samples: list[int]) -> Batch | MegammError:
        try:
            return self._put_together(
                [self._dataset[i] for i in samples],
                pad_id=self._pad_id,
                pad_multiple=self._pad_multiple,
                tokens_per_image=self._dataset.image_format.tokens,
                with_pixels=self._dataset.with_pixels,
                image_size=self._dataset.image_format.size,
            )
        except MegammError as error:
            return error


def _same(result: Any) -> Any:
    return result
