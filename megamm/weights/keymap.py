"""The table: one row per tensor says what it is called on both sides, its shape, how it is packed and how it is cut.

Import, export, slicing, drawing and the completeness check all read these rows; no direction is written by hand.
Canonical name = the key megatron-core writes to its distributed checkpoint, with global layer numbers. Names and sizes
only: no model, no file.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megamm.errors import CheckpointError
from megamm.weights.pack import PACKINGS
from megamm.weights.shard import PARTITION_DIM, cut_vocab, join_slices, pad_vocab, slice_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """The sizes of one part of a model that packing and cutting need."""

    layers: int = 0
    heads: int = 0
    groups: int = 0
    vocab: int = 0
    vocab_padded: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of ours and the Hugging Face tensors it is made of. `{i}` is the global layer number on both sides."""

    name: str
    """Canonical name."""
    hf: tuple[str, ...]
    """Hugging Face names, in the order that `pack` expects."""
    shape: tuple[int, ...]
    """Shape of our whole tensor, vocabulary padded; the shapes of the `hf` tensors follow from it."""
    pack: str = "same"
    """Key of pack.PACKINGS."""
    tp: str | None = None
    """Key of shard.PARTITION_DIM. `vocab` pads on import and cuts on export."""
    std: float = 0.02
    """Standard deviation that it is drawn with, where it is drawn and is neither norm nor bias."""
    is_exported: bool = True
    """Whether an export writes it; False: the layout has no place for it."""


@dataclass(frozen=True, slots=True)
class Keep:
    """A tensor that a release may store and the forward never uses: kept beside the checkpoint and exported again."""

    hf: str
    """Hugging Face name; `{i}` is any integer. Never takes a name that a Row produces."""
    name: str = ""
    """What it is called across dialects; by default `hf`, as written before any renaming."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A Row of one layer, with the functions that its columns name."""

    name: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    packing: str
    tp: str | None
    dims: Dims
    std: float = 0.02
    is_exported: bool = True

    @property
    def partition_dim(self) -> int | None:
        """Dimension that tensor parallelism cuts; None: replicated."""
        return PARTITION_DIM[self.tp]

    @property
    def num_elements(self) -> int:
        """Elements of the global tensor."""
        return math.prod(self.shape)

    @property
    def hf_shapes(self) -> list[tuple[int, ...]]:
        """The shapes that the tensors of `hf` must have, in order: unpacking says it."""
        return [tuple(tensor.shape) for tensor in self.unpack(torch.empty(self.shape, device="meta"))]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The global tensor, vocabulary padded, from the tensors of `hf` in order. CheckpointError: they do not fit."""
        if len({tensor.dtype for tensor in tensors}) > 1:
            found = ", ".join(f"{key} {tensor.dtype}" for key, tensor in zip(self.hf, tensors, strict=True))
            raise CheckpointError(f"{self.name} is packed from tensors of one dtype, found: {found}. Cast them first.")
        try:
            packed = PACKINGS[self.packing].pack(list(tensors), self.dims)
            if self.tp == "vocab":
                packed = pad_vocab(packed, self.dims.vocab, self.dims.vocab_padded)
        except (ValueError, RuntimeError) as error:  # RuntimeError: torch refuses shapes that cannot be concatenated
            found = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in zip(self.hf, tensors, strict=True))
            raise CheckpointError(f"cannot make {self.name} from {found}: {error}. Does config.json fit?") from error
        return packed

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of `hf` in order from the global tensor; exact inverse of `pack`. CheckpointError: no fit."""
        try:
            if self.tp == "vocab":
                tensor = cut_vocab(tensor, self.dims.vocab, self.dims.vocab_padded)
            return PACKINGS[self.packing].unpack(tensor, self.dims)
        except ValueError as error:
            raise CheckpointError(
                f"cannot unpack {self.name} {tuple(tensor.shape)}: {error}. Does the configuration fit the checkpoint?"
            ) from error

    def slice(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        """What rank `rank` of `size` tensor parallel ranks holds of the global tensor. CheckpointError: no even cut."""
        try:
            return slice_tensor(tensor, self.tp, rank, size)
        except ValueError as error:
            raise CheckpointError(f"{self.name}: {error}") from error

    def join(self, slices: Sequence[Tensor]) -> Tensor:
        """The global tensor from the slices of all ranks in order; exact inverse of `slice`."""
        return join_slices(slices, self.tp)

    def to_hf(self, slices: Sequence[Tensor]) -> dict[str, Tensor]:
        """Hugging Face name -> tensor from the slices of all ranks in order; weights and gradients alike."""
        return dict(zip(self.hf, self.unpack(self.join(slices)), strict=True))


class KeyMap:
    """A table of rows, each with the sizes of its part. Immutable; `+` concatenates, `renamed` puts under prefixes.

    ValueError: a row that cannot be right, such as an unknown packing, or one name twice (a mistake in a model's file).
    """

    def __init__(self, rows: Iterable[Row | Keep], dims: Dims | None = None):
        part = dims or Dims()
        self._aliases: dict[str, str] = {}
        self._rows: tuple[tuple[Row | Keep, Dims], ...] = tuple(
            (row if isinstance(row, Row) or row.name else replace(row, name=row.hf), part) for row in rows
        )
        for row, _ in self._rows:
            _check(row, part)

    @classmethod
    def _of(cls, rows: Iterable[tuple[Row | Keep, Dims]]) -> "KeyMap":
        table = cls(())
        table._rows = tuple(rows)
        return table

    def __add__(self, other: "KeyMap") -> "KeyMap":
        """Both tables, each row with its own sizes, and what both accept."""
        table = KeyMap._of((*self._rows, *other._rows))
        table._aliases = self._aliases | other._aliases
        return table

    def renamed(self, *, ours: str = "", hf: Mapping[str, str] | None = None) -> "KeyMap":
        """`ours` put before canonical names; in Hugging Face names the longest prefix that is in `hf` replaced."""

        def rename(row: Row | Keep) -> Row | Keep:
            if isinstance(row, Keep):
                return Keep(_prefixed(row.hf, hf or {}), ours + row.name)
            return replace(row, name=ours + row.name, hf=tuple(_prefixed(key, hf or {}) for key in row.hf))

        return KeyMap._of((rename(row), dims) for row, dims in self._rows)

    def accepting(self, aliases: Mapping[str, str]) -> "KeyMap":
        """This table for releases, too, whose names begin with a key of `aliases` where its own begin with the value;
        the longest one that fits counts. `renamed` forgets it."""
        table = KeyMap._of(self._rows)
        table._aliases = dict(aliases)
        return table

    def spelt(self, names: Iterable[str]) -> dict[str, str]:
        """As this table spells them -> names of a release as found. Of two that would become one, the second stays as
        it is, so that it is found to be one too many."""
        found: dict[str, str] = {}
        for name in sorted(names, key=lambda name: (_prefixed(name, self._aliases) != name, name)):
            ours = _prefixed(name, self._aliases)
            found[name if ours in found else ours] = name
        return found

    def entries(self) -> list[Entry]:
        """Every tensor of ours, `{i}` expanded over the layers, in the order of the rows, layer by layer."""
        return list(self._entries.values())

    def __getitem__(self, name: str) -> Entry:
        """The entry of a canonical name; KeyError if there is none."""
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        entries = [entry for row, dims in self._rows if isinstance(row, Row) for entry in _expand(row, dims)]
        for names in ([entry.name for entry in entries], [key for entry in entries for key in entry.hf]):
            if twice := sorted(name for name, count in Counter(names).items() if count > 1):
                raise ValueError(f"in more than one row of the table: {', '.join(twice)}")
        return {entry.name: entry for entry in entries}

    @cached_property
    def hf_names(self) -> frozenset[str]:
        """The Hugging Face names that the rows produce; a release must have them all. Keep names are not among them."""
        return frozenset(key for entry in self.entries() for key in entry.hf)

    def kept(self, hf_names: Iterable[str]) -> dict[str, str]:
        """Of these Hugging Face names those that a Keep takes, with what they are called across dialects."""
        return self._translated(hf_names, [(keep.hf, keep.name) for keep in self._keeps])

    def kept_hf(self, names: Iterable[str]) -> dict[str, str]:
        """The inverse of `kept`: across-dialect names to this dialect's Hugging Face names, where it has them."""
        return self._translated(names, [(keep.name, keep.hf) for keep in self._keeps])

    @property
    def _keeps(self) -> list[Keep]:
        return [row for row, _ in self._rows if isinstance(row, Keep)]

    def _translated(self, names: Iterable[str], patterns: list[tuple[str, str]]) -> dict[str, str]:
        compiled = [(re.compile(r"(\d+)".join(map(re.escape, old.split("{i}")))), new) for old, new in patterns]
        found: dict[str, str] = {}
        for name in names:
            for pattern, new in compiled:
                if name not in self.hf_names and (numbers := pattern.fullmatch(name)):
                    parts = new.split("{i}")
                    found[name] = "".join(map("".join, zip(parts, (*numbers.groups(), ""), strict=True)))
                    break
        return found


def _check(row: Row | Keep, dims: Dims) -> None:
    if isinstance(row, Keep):
        if row.hf.count("{i}") != row.name.count("{i}"):
            raise ValueError(f"{row.hf}: {{i}} must be as often in its name {row.name}")
        return
    if row.pack not in PACKINGS or row.tp not in PARTITION_DIM:
        raise ValueError(f"{row.name}: unknown pack {row.pack!r} or tp {row.tp!r}")
    if len(row.hf) != PACKINGS[row.pack].num_hf:
        raise ValueError(f"{row.name}: pack {row.pack!r} takes {PACKINGS[row.pack].num_hf} tensors, not {len(row.hf)}")
    if len({"{i}" in name for name in (row.name, *row.hf)}) > 1:
        raise ValueError(f"{row.name}: {{i}} must be on both sides or on neither")
    if row.tp == "vocab" and row.shape[:1] != (dims.vocab_padded,):
        raise ValueError(f"{row.name}: tp 'vocab' needs dims.vocab_padded rows, not shape {row.shape}")
    if row.tp == "vocab" and not 0 < dims.vocab <= dims.vocab_padded:
        raise ValueError(f"{row.name}: tp 'vocab' needs dims.vocab and a dims.vocab_padded that holds it")
    if row.pack in ("qkv", "qkv_fused", "kv") and (dims.groups < 1 or dims.heads % dims.groups):
        raise ValueError(f"{row.name}: pack {row.pack!r} needs dims.heads to be a multiple of dims.groups")


def _expand(row: Row, dims: Dims) -> Iterator[Entry]:
    if "{i}" not in row.name:
        yield Entry(row.name, row.hf, row.shape, row.pack, row.tp, dims, row.std, row.is_exported)
        return
    for layer in range(dims.layers):
        name, *hf = (name.replace("{i}", str(layer)) for name in (row.name, *row.hf))
        yield Entry(name, tuple(hf), row.shape, row.pack, row.tp, dims, row.std, row.is_exported)


def _prefixed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the longest prefix that is in `prefixes` replaced."""
    old = max((old for old in prefixes if name.startswith(old)), key=len, default=None)
    return name if old is None else prefixes[old] + name.removeprefix(old)


def fill(names: Iterable[str], others: Iterable[str], table: KeyMap) -> dict[str, str]:
    """What a plain tower or llm adds to a release: names that `table` takes and `names` lacks -> its own names.

    A release puts a prefix before the names of its parts. It is found, not configured: the one under which the part
    fills most of what is missing.
    """
    present, part = set(names), set(others)
    prefixes: Counter[str] = Counter()
    for key in sorted(table.hf_names - present):
        words = key.split(".")
        ends = (".".join(words[start:]) for start in range(len(words)))
        prefixes.update(key.removesuffix(end) for end in ends if end in part)
    if not prefixes:
        return {}
    prefix = prefixes.most_common(1)[0][0]
    candidates = {prefix + name: name for name in sorted(part) if prefix + name not in present}
    kept = table.kept(candidates)
    return {name: theirs for name, theirs in candidates.items() if name in table.hf_names or name in kept}


def match(
    names: Iterable[str],
    tables: Mapping[str, KeyMap],
    parts: Sequence[Iterable[str]] = (),
    new: tuple[str, ...] = (),
) -> str:
    """The one dialect of `tables` in which these Hugging Face names are written.

    A dialect matches if every name is taken by a Row or a Keep and no Row lacks a name. The names of `parts`, each of a
    plain tower or llm, fill what is lacking. What begins with one of `new`, beginnings of canonical names (`{i}`: any
    number), may be lacking, but of each of them only as a whole. With `parts`, of several that match the first counts.

    CheckpointError: none matches, and the message lists what is left over and what is missing in the nearest dialect;
    or, without `parts`, several do.
    """
    release = set(names)
    beginnings = [re.compile(r"\d+".join(map(re.escape, start.split("{i}")))) for start in new]
    faults: dict[str, tuple[list[str], list[str]]] = {}
    for dialect, table in tables.items():
        found = set(table.spelt(release))
        for part in parts:
            found |= fill(found, part, table).keys()
        entries = table.entries()
        groups = [{key for entry in entries if start.match(entry.name) for key in entry.hf} for start in beginnings]
        needed = table.hf_names.difference(*(group for group in groups if not group & found))
        unknown = found - table.hf_names
        faults[dialect] = (sorted(unknown - table.kept(unknown).keys()), sorted(needed - found))
    matching = [dialect for dialect, (left_over, missing) in faults.items() if not left_over and not missing]
    if len(matching) == 1 or (matching and parts):  # a release without its parts does not say how it would spell them
        return matching[0]
    if matching:
        raise CheckpointError(f"the tensor names fit more than one dialect of the family: {', '.join(matching)}")
    nearest = min(faults, key=lambda dialect: tuple(map(len, faults[dialect])))
    left_over, missing = faults[nearest]
    raise CheckpointError(
        f"the tensor names fit no dialect of the family. Nearest is {nearest!r}:\n"
        f"  missing: {_listed(missing)}\n  not in its table: {_listed(left_over)}\n"
        "Is this the right --family? A vision tower that is published apart is given with --tower."
    )


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "nothing"
