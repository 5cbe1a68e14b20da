"""Several indexed datasets read as one: PREFIX.json names them, and how many samples of each make an epoch.

A blend has no .bin and no .idx: its order is drawn when it is opened, from what PREFIX.json says and nothing else. What
a document is, is a matter of data/indexed.py.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm.data.indexed import FORMAT_VERSION, Reader, paths_of, writing
from megamm.errors import DataError

_SHARED = ("family", "tokenizer", "placeholder")
"""What every member of a blend must have been made with alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One dataset of a blend, as PREFIX.json has it."""

    prefix: str
    """Of the dataset; a relative one begins at the directory of the blend's file."""
    samples: int
    """Samples of it in an epoch of the blend. Each is there as often as any other, or once more."""
    documents: int
    """Samples that the dataset has."""
    bin_bytes: int
    """Length of its .bin."""


def counts_by_weight(weights: Sequence[float], sizes: Sequence[int], total: int | None) -> list[int]:
    """Samples of each dataset, so that the shares of an epoch are as the weights, exact to the sample.

    sizes: samples that each has. total: samples of an epoch; None: as many as can be without any sample twice.
    Raises DataError."""
    if any(not np.isfinite(weight) or weight < 0 for weight in weights) or not sum(weights):
        raise DataError(f"--weights: {list(weights)}; give numbers from 0 on, not all of them 0")
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    if total is None:
        total = int(min(size / share for size, share in zip(sizes, shares, strict=True) if share) + 1e-6)
    wanted = shares * total
    counts = np.floor(wanted + 1e-6).astype(np.int64)
    largest_remainders = np.argsort(counts - wanted, kind="stable")
    counts[largest_remainders[: total - counts.sum()]] += 1
    return [int(count) for count in counts]


def counts_by_tokens(readers: Sequence[Reader], budgets: Sequence[int], tokens_per_image: int, seed: int) -> list[int]:
    """Samples of each dataset, the fewest that have at least so many tokens; a budget of 0 leaves a dataset out.

    Raises DataError where a dataset has no tokens."""
    counts = []
    for k, (reader, budget) in enumerate(zip(readers, budgets, strict=True)):
        tokens = num_tokens(reader, tokens_per_image)
        if budget < 0 or (budget and not tokens.sum()):
            raise DataError(f"--tokens: {budget} of {reader.prefix}, which has {tokens.sum()}; give what it can give")
        passes, rest = divmod(budget, int(tokens.sum())) if budget else (0, 0)
        reached = np.cumsum(tokens[_random(seed, k).permutation(len(reader))])
        counts.append(passes * len(reader) + (int(np.searchsorted(reached, rest)) + 1 if rest else 0))
    return counts


def num_tokens(reader: "Reader | Blend", tokens_per_image: int) -> np.ndarray:
    """int64 [samples]: tokens of each sample, a picture as `tokens_per_image` or as the placeholder it was given."""
    placeholder = reader.info.get("placeholder")
    per_image = tokens_per_image if placeholder is None else len(placeholder)
    return reader.num_ids + reader.num_images * (per_image - 1)


def write_blend(prefix: str | Path, readers: Sequence[Reader], counts: Sequence[int], seed: int) -> "Blend":
    """Write PREFIX.json and open it. Raises DataError where the datasets do not go together, or a dataset that is no
    blend lies there."""
    bin_path, _, path = paths_of(prefix)
    if bin_path.exists():
        raise DataError(f"{bin_path}: a dataset; give another --output")
    if not sum(counts):
        raise DataError(f"{path}: a blend without samples; give larger weights or budgets")
    _check_alike(readers)
    blended = [
        Member(
            prefix=reader.prefix if Path(reader.prefix).is_absolute() else os.path.relpath(reader.prefix, path.parent),
            samples=count,
            documents=len(reader),
            bin_bytes=reader.info["bin_bytes"],
        )
        for reader, count in zip(readers, counts, strict=True)
    ]
    content = {"format_version": FORMAT_VERSION, "seed": seed, "blend": [asdict(member) for member in blended]}
    aside = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)
    return Blend(prefix)


def open_reader(prefix: str | Path) -> "Reader | Blend":
    """The dataset or the blend that PREFIX.json describes. Raises DataError as these do."""
    if (path := Path(prefix)).suffix in (".json", ".bin", ".idx") and path.exists():
        raise DataError(f"{prefix}: a file of a dataset; give its prefix, {path.with_suffix('')}")
    try:
        content = json.loads(paths_of(prefix)[2].read_bytes())
    except (OSError, ValueError, RecursionError):
        return Reader(prefix)  # which says what is wrong
    return Blend(prefix) if isinstance(content, dict) and "blend" in content else Reader(prefix)


def members(reader: "Reader | Blend") -> list[Reader]:
    """The datasets that are read: those of a blend, or the one."""
    return reader.readers if isinstance(reader, Blend) else [reader]


class Blend:
    """Documents of several datasets by number, in the order of the blend; reads like a `Reader`."""

    def __init__(self, prefix: str | Path):
        """Raises DataError where PREFIX.json or a member is damaged, a member is not the one that was blended, or
        members do not go together."""
        self.prefix = str(prefix)
        path = paths_of(prefix)[2]
        blended, seed = _read_blend(path)
        self.readers = [Reader(path.parent / member.prefix) for member in blended]
        """The datasets."""
        for member, reader in zip(blended, self.readers, strict=True):
            found = (len(reader), reader.info["bin_bytes"])
            if found != (member.documents, member.bin_bytes):
                raise DataError(f"{path}: {reader.prefix} is not what it was when it was blended; blend again")
            if member.samples and not len(reader):
                raise DataError(f"{path}: {reader.prefix} holds no sample; blend again without it")
        _check_alike(self.readers)
        self.counts = [member.samples for member in blended]
        """Samples of each dataset in an epoch."""
        self.member, self._document = _draw(self.counts, [len(reader) for reader in self.readers], seed)
        """int32 [samples]: number of the dataset that each sample is from."""
        order = [seed, *((member.samples, member.documents, member.bin_bytes) for member in blended)]
        self.info: dict[str, Any] = {
            **{key: self.readers[0].info[key] for key in _SHARED if key in self.readers[0].info},
            "documents": len(self),
            "bin_bytes": sum(member.bin_bytes for member in blended),
            "blend": hashlib.sha256(json.dumps(order).encode()).hexdigest(),
        }
        """What PREFIX.json of a dataset would say, and as `blend` what the order is drawn from, hashed."""

    def __reduce__(self) -> tuple[type["Blend"], tuple[str]]:
        return Blend, (self.prefix,)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.member)

    @property
    def num_ids(self) -> np.ndarray:
        """int64 [samples], as Reader.num_ids."""
        return self._gathered([reader.num_ids for reader in self.readers])

    @property
    def num_images(self) -> np.ndarray:
        """int64 [samples], as Reader.num_images."""
        return self._gathered([reader.num_images for reader in self.readers])

    def text(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """As Reader.text."""
        reader, number = self.place(document)
        return reader.text(number)

    def views(self, document: int) -> list[tuple[int, int]]:
        """As Reader.views."""
        reader, number = self.place(document)
        return reader.views(number)

    def image(self, document: int, image: int) -> bytes:
        """As Reader.image."""
        reader, number = self.place(document)
        return reader.image(number, image)

    def place(self, document: int) -> tuple[Reader, int]:
        """The dataset that holds a sample, and its number there."""
        if not 0 <= document < len(self):
            raise IndexError(f"{self.prefix} has {len(self)} samples, not one numbered {document}")
        return self.readers[self.member[document]], int(self._document[document])

    def _gathered(self, values: Sequence[np.ndarray]) -> np.ndarray:
        gathered = np.empty(len(self), dtype=np.int64)
        for k, of_member in enumerate(values):
            here = self.member == k
            gathered[here] = of_member[self._document[here]]
        return gathered


def _draw(counts: Sequence[int], sizes: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Dataset and document of each sample, [samples]: of each dataset whole passes and a random rest, all mixed."""
    drawn = []
    for k, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        passes, rest = divmod(count, size) if count else (0, 0)
        drawn.append(np.concatenate([np.tile(np.arange(size), passes), _random(seed, k).permutation(size)[:rest]]))
    order = _random(seed, len(counts)).permutation(sum(counts))
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order], np.concatenate(drawn)[order]


def _random(seed: int, number: int) -> np.random.RandomState:
    # RandomState, because numpy promises never to change its streams; its newer generators may.
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, number])


def _check_alike(readers: Sequence[Reader]) -> None:
    for reader in readers[1:]:
        for key in _SHARED:
            if _made_with(readers[0], key) != _made_with(reader, key):
                raise DataError(
                    f"{reader.prefix}: preprocessed with another {key} than {readers[0].prefix}; preprocess one of "
                    "them again, as the other"
                )


def _made_with(reader: Reader, key: str) -> Any:
    value = reader.info.get(key)
    return value.get("hash") if key == "tokenizer" and isinstance(value, dict) else value


def _read_blend(path: Path) -> tuple[list[Member], int]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); blend again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version!r}, this megamm reads {FORMAT_VERSION}; blend again")
    if not isinstance(seed := content.get("seed"), int):
        raise DataError(f"{path}: `seed` is {seed!r}, not a number; blend again")
    try:
        blended = [Member(**member) for member in content["blend"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: `blend` is no list of datasets ({error}); blend again") from error
    for member in blended:
        numbers = (member.samples, member.documents, member.bin_bytes)
        if not isinstance(member.prefix, str) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise DataError(f"{path}: `blend` has {asdict(member)}; blend again")
    if not sum(member.samples for member in blended):
        raise DataError(f"{path}: a blend without samples; blend again")
    return blended, seed
