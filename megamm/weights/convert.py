"""Hugging Face directory -> megamm checkpoint -> Hugging Face directory, one tensor at a time, no model built.

Tables come from a family, which is passed in; this file names none.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megamm.errors import CheckpointError
from megamm.log import get_logger
from megamm.weights.directory import (
    HF_FILES,
    INFO,
    KEPT,
    TOWER,
    CheckpointInfo,
    copy_hf_files,
    find_checkpoint,
    read_info,
    write_info,
)
from megamm.weights.draw import draw
from megamm.weights.hf import (
    CONFIG,
    HfSource,
    HfWriter,
    TensorInfo,
    has_weights,
    new_directory,
    read_config,
    write_json,
)
from megamm.weights.keymap import Entry, KeyMap, fill, match
from megamm.weights.positions import resize_positions
from megamm.weights.torch_dist import StoredTensors, save_torch_dist

log = get_logger(__name__)

POSITIONS = "vision.position_embedding"
"""Canonical name of the tower's learned positions, whose number follows from the size of the pictures."""


class FamilyTables(Protocol):
    """What conversion needs of a family."""

    @property
    def name(self) -> str: ...
    @property
    def read(self) -> Callable[[dict[str, Any], dict[str, Any] | None], Any]: ...
    @property
    def write(self) -> Callable[[Any, str], tuple[dict[str, Any], dict[str, Any] | None]]: ...
    @property
    def compose(self) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]: ...
    @property
    def complete(self) -> Callable[[dict[str, Any], Iterable[str]], dict[str, Any]]: ...
    @property
    def drawn(self) -> tuple[str, ...]: ...
    @property
    def duplicated(self) -> Callable[[Any], dict[str, str]]: ...
    @property
    def export_dialect(self) -> str: ...
    @property
    def is_recognised(self) -> bool: ...
    @property
    def keys(self) -> Mapping[str, Callable[[Any], KeyMap]]: ...
    @property
    def resized(self) -> Callable[[dict[str, Any], int], dict[str, Any]] | None: ...
    @property
    def start_keys(self) -> Callable[[Any], KeyMap] | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HfCheckpoint:
    """Opened Hugging Face directories that together are a checkpoint whose family and dialect are known."""

    family: FamilyTables
    info: CheckpointInfo
    options: Any
    """What the family reads of the configuration."""
    table: KeyMap
    source: HfSource
    """Every tensor under the name that the table has for it, from whichever directory."""
    drawn: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Canonical names that no directory has and that are drawn instead."""
    seed: int = 0
    duplicated: Mapping[str, str] = field(default_factory=dict)
    """Canonical names that no directory has -> those whose weights they begin with."""
    is_resized: bool = False
    """Whether the tower's positions were made for pictures of another size, and are interpolated."""

    def load(self, name: str) -> Tensor:
        """The global tensor of a canonical name, in its source dtype, vocabulary padded."""
        name = self.duplicated.get(name, name)
        entry = self.table[name]
        if name in self.drawn:
            return draw(name, entry.shape, self.seed, entry.std).to(self.drawn[name].dtype)
        tensors = [self.source.read(key) for key in entry.hf]
        if self.is_resized and name == POSITIONS:
            tensors = [resize_positions(*pair) for pair in zip(tensors, entry.hf_shapes, strict=True)]
        return entry.pack(tensors)

    def metas(self) -> dict[str, Tensor]:
        """Every canonical tensor without data. CheckpointError: dtypes that do not fit together."""
        infos = self.source.infos

        def dtypes(entry: Entry) -> list[torch.dtype]:
            return [infos[key].dtype for key in entry.hf]

        found = {
            entry.name: self.drawn[entry.name].meta()
            if entry.name in self.drawn
            else entry.pack([TensorInfo(*pair).meta() for pair in zip(entry.hf_shapes, dtypes(entry), strict=True)])
            for entry in self.table.entries()
            if entry.name not in self.duplicated
        }
        return found | {name: found[other] for name, other in self.duplicated.items()}

    def origins(self) -> dict[tuple[str, str, str], list[str]]:
        """(part, how, directory) -> the canonical names that came from there so. How is copied, drawn, or duplicated
        for what is a copy of another weight of the model."""
        origins: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for entry in self.table.entries():
            part = entry.name.split(".")[0]
            if entry.name in self.drawn:
                origins[part, "drawn", ""].append(entry.name)
                continue
            how = "duplicated" if entry.name in self.duplicated else "copied"
            first = self.table[self.duplicated.get(entry.name, entry.name)].hf[0]
            origins[part, how, str(self.source.file(first).parent)].append(entry.name)
        return dict(origins)

    def load_slice(self, name: str, tp_rank: int, tp_size: int) -> Tensor:
        """What one tensor parallel rank holds of a canonical name. CheckpointError: no even cut."""
        return self.table[name].slice(self.load(name), tp_rank, tp_size)


def open_hf(hf_dir: str | Path, tower_dir: str | Path | None, families: Sequence[FamilyTables]) -> HfCheckpoint:
    """Open a Hugging Face directory as the one of `families` whose configuration and key names it has.

    `tower_dir` fills only tensors that `hf_dir` lacks, and the tower's sizes where config.json leaves them out; by
    default it is `hf_dir`/vision_tower, where there is one, as an export has it. Nothing is read but names, shapes and
    dtypes, and every row is checked against them. Only where there is one family, what it duplicates may be absent. Of
    several families that fit, the one whose own spelling it is counts (`export_dialect`).
    CheckpointError: no family fits, or several do and the user must say which.
    """
    is_named = len(families) == 1
    families = families if is_named else [family for family in families if family.is_recognised]
    config = read_config(hf_dir)
    _refuse_adapter(hf_dir)
    source = HfSource(hf_dir)
    if tower_dir is None and (Path(hf_dir) / TOWER / CONFIG).exists():
        tower_dir = Path(hf_dir) / TOWER
    tower_config, parts = _open_tower(tower_dir)
    found: list[HfCheckpoint] = []
    refusals: dict[str, CheckpointError] = {}
    for family in families:
        try:
            may_duplicate = is_named and family.start_keys is None
            checkpoint = _open_as(family, config, tower_config, source, parts, may_duplicate=may_duplicate)
            checkpoint.metas()  # what cannot be packed is refused here
            found.append(checkpoint)
        except CheckpointError as error:
            refusals[family.name] = error
    own = [checkpoint for checkpoint in found if checkpoint.info.dialect == checkpoint.family.export_dialect]
    for fitting in (found, own):
        if len(fitting) == 1:
            return fitting[0]
    if found:
        names = ", ".join(checkpoint.family.name for checkpoint in found)
        raise CheckpointError(f"{hf_dir} fits more than one family: {names}. Say which with --family.")
    if len(refusals) == 1:
        raise next(iter(refusals.values()))
    reasons = "\n".join(f"- {name}: {error}" for name, error in refusals.items())
    raise CheckpointError(f"{hf_dir} is no checkpoint of a family that megamm knows:\n{reasons}")


def open_start(
    llm_dir: str | Path, tower_dir: str | Path, family: FamilyTables, seed: int, hf_dir: str | Path | None = None
) -> HfCheckpoint:
    """Open a plain llm and a plain vision tower as a model of `family`; what neither has is drawn, in the llm's dtype.

    `hf_dir`: weights that count before those of both, such as a trained projector, and a config.json that says what the
    model is; either may be absent. CheckpointError: anything that does not fit, and a tensor of the llm that the family
    has not.
    """
    llm_config, tower_config = read_config(llm_dir), read_config(tower_dir)
    llm, tower = HfSource(llm_dir), HfSource(tower_dir)
    source, config = HfSource.empty(), family.compose(llm_config, tower_config)
    if hf_dir is not None:
        _refuse_adapter(hf_dir)
        has_config = (Path(hf_dir) / CONFIG).exists()
        source = HfSource(hf_dir) if has_weights(hf_dir) or not has_config else source
        config = read_config(hf_dir) if has_config else config
    keys = None if family.start_keys is None else {family.export_dialect: family.start_keys}
    checkpoint = _open_as(
        family, config, tower_config, source, (llm, tower), family.drawn, may_duplicate=True, keys=keys
    )
    if unused := sorted(llm.infos.keys() - fill((), llm.infos, checkpoint.table).values()):
        raise CheckpointError(
            f"{llm_dir} holds {unused[0]} ({len(unused)} such tensors), which the llm of family {family.name} does not "
            "have; is it a plain llm of that kind?"
        )
    dtype = Counter(info.dtype for info in llm.infos.values()).most_common(1)[0][0]
    found = checkpoint.source.infos.keys()
    drawn = {
        entry.name: TensorInfo(entry.shape, dtype)
        for entry in checkpoint.table.entries()
        if not found >= set(entry.hf) and entry.name not in checkpoint.duplicated
    }
    checkpoint = replace(checkpoint, drawn=drawn, seed=seed)
    checkpoint.metas()
    return checkpoint


def with_image_size(checkpoint: HfCheckpoint, image_size: int) -> HfCheckpoint:
    """The same model for pictures of another size, in pixels: the tower's positions are interpolated.

    What is stored and never computed with is left out, for it may depend on the old size. CheckpointError: the family
    cannot, or the size is none for its tower.
    """
    family, info = checkpoint.family, checkpoint.info
    if family.resized is None:
        raise CheckpointError(f"the pictures of family {family.name} have the size that its tower was made for")
    config = family.resized(info.hf_config, image_size)
    options = family.read(config, None)
    spellings = [*family.keys.values(), *([family.start_keys] if family.start_keys else [])]
    make = next(make for make in spellings if make(checkpoint.options).hf_names == checkpoint.table.hf_names)
    table = make(options)
    source = checkpoint.source.renamed({name: name for name in checkpoint.source.infos if name in table.hf_names})
    return replace(
        checkpoint,
        info=replace(info, hf_config=config, tower_config=None),
        options=options,
        table=table,
        source=source,
        is_resized=True,
    )


def _open_tower(tower_dir: str | Path | None) -> tuple[dict[str, Any] | None, tuple[HfSource, ...]]:
    """Configuration and weights of a tower's directory, each where it is there."""
    if tower_dir is None:
        return None, ()
    config = read_config(tower_dir) if (Path(tower_dir) / CONFIG).exists() else None
    is_described_only = config is not None and not has_weights(tower_dir)
    return config, () if is_described_only else (HfSource(tower_dir),)


def _refuse_adapter(hf_dir: str | Path) -> None:
    if found := sorted(Path(hf_dir).glob("adapter_model.*")):
        raise CheckpointError(f"{found[0]} is a LoRA adapter, which would be left out; merge it into its base first")


def _open_as(
    family: FamilyTables,
    config: dict[str, Any],
    tower_config: dict[str, Any] | None,
    source: HfSource,
    parts: Sequence[HfSource],
    new: tuple[str, ...] = (),
    may_duplicate: bool = False,
    keys: Mapping[str, Callable[[Any], KeyMap]] | None = None,
) -> HfCheckpoint:
    """`parts` fill what `source` lacks, one after the other; what begins with one of `new` may be nowhere, and with
    `may_duplicate` what the family duplicates. `keys`: by default the family's."""
    config = family.complete(config, source.infos)
    options = family.read(config, tower_config)
    made = {dialect: make(options) for dialect, make in (keys or family.keys).items()}
    tables = {dialect: table for dialect, table in made.items() if table.entries()}
    copies = family.duplicated(options) if may_duplicate else {}
    dialect = match(source.infos, tables, [part.infos for part in parts], (*new, *copies))
    table = tables[dialect]
    source = source.renamed(table.spelt(source.infos))
    for part in parts:
        source += part.renamed(fill(source.infos, part.infos, table))
    _check_shapes(table, source.infos)
    info = CheckpointInfo(family=family.name, dialect=dialect, hf_config=config, tower_config=tower_config)
    copies = {name: other for name, other in copies.items() if not source.infos.keys() >= set(table[name].hf)}
    return HfCheckpoint(family=family, info=info, options=options, table=table, source=source, duplicated=copies)


def _check_shapes(table: KeyMap, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors whose shapes are not those that the configuration makes, before anything is read."""
    wrong = [
        f"  {key} is {infos[key].shape}, not {shape}"
        for entry in table.entries()
        for key, shape in zip(entry.hf, entry.hf_shapes, strict=True)
        if key in infos and infos[key].shape != shape
    ]
    if wrong:
        more = [f"  and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        lines = "\n".join(["tensors have other shapes than config.json makes them; do they fit?", *wrong[:8], *more])
        raise CheckpointError(lines)


def import_hf(
    hf_dir: str | Path, tower_dir: str | Path | None, families: Sequence[FamilyTables], output: str | Path
) -> CheckpointInfo:
    """Write the megamm checkpoint of a Hugging Face directory to `output`, in source dtypes.

    `families` is one, or all that are known and the right one is found (see `open_hf`). Holds at most about twice the
    largest tensor. CheckpointError: anything that does not fit; then `output` is not made.
    """
    checkpoint = open_hf(hf_dir, tower_dir, families)
    write_checkpoint(checkpoint, output, hf_dir)
    return checkpoint.info


def write_checkpoint(checkpoint: HfCheckpoint, output: str | Path, *file_dirs: str | Path) -> None:
    """Write an opened checkpoint as megamm's to `output`; tokenizer and processor files come from `file_dirs`, of two
    with one name the first's. Holds at most about twice the largest tensor."""
    infos = checkpoint.source.infos
    kept = {name: infos[name] for name in sorted(checkpoint.table.kept(infos))}
    with new_directory(output) as directory:
        save_torch_dist(directory, checkpoint.metas(), checkpoint.load)
        with HfWriter(directory, kept, filename=KEPT, max_shard_bytes=None) as writer:
            for name in kept:
                writer.write(name, checkpoint.source.read(name))
        for file_dir in reversed(file_dirs):
            copy_hf_files(file_dir, directory)
        write_info(directory, checkpoint.info)


def export_hf(
    checkpoint_dir: str | Path,
    family: FamilyTables,
    output: str | Path,
    dialect: str | None = None,
    more_vocab: int = 0,
    finish: Callable[[Path], None] | None = None,
) -> str:
    """Write the Hugging Face directory of a megamm checkpoint to `output`; returns its dialect.

    `dialect` None: the one imported from. The tower's tensors are among the rest, wherever they came from. Every
    tensor keeps its stored dtype, a vocabulary loses its padding, kept tensors and files come back. `more_vocab` rows
    are put behind every vocabulary, each the mean of its own. `finish` is called with the directory at last, before it
    gets its name. Holds at most about twice the largest tensor. CheckpointError: another family, an unknown dialect or
    one that cannot say this model, tensors missing, unknown or of other shapes; then `output` is not made.
    """
    source_dir = find_checkpoint(checkpoint_dir)
    info = read_info(source_dir)
    if info.family != family.name:
        raise CheckpointError(f"{source_dir} is a checkpoint of family {info.family}, not of {family.name}")
    dialect = dialect or info.dialect
    for wanted in (dialect, info.dialect):
        if wanted not in family.keys:
            known = ", ".join(family.keys)
            raise CheckpointError(f"family {family.name} has no dialect {wanted!r}; it has {known}")
    options = family.read(info.hf_config, info.tower_config)
    config, tower_config = family.write(options, dialect)
    table = family.keys[dialect](options)
    stored = StoredTensors(source_dir)
    _check_complete(table, stored.infos, source_dir)

    infos: dict[str, TensorInfo] = {}
    exported = [entry for entry in table.entries() if entry.is_exported]
    for entry in exported:
        metas = _lengthened(entry, entry.unpack(stored.infos[entry.name].meta()), more_vocab)
        infos |= zip(entry.hf, map(TensorInfo.of, metas), strict=True)
    config = _with_dtype(config, {tensor.dtype for tensor in infos.values()})

    kept = HfSource.of_file(source_dir / KEPT) if (source_dir / KEPT).exists() else None
    across = family.keys[info.dialect](options).kept(kept.infos) if kept else {}
    here = table.kept_hf(across.values())
    kept_names = {here[name]: theirs for theirs, name in across.items() if name in here}
    if kept:
        infos |= {name: kept.infos[theirs] for name, theirs in kept_names.items()}
    with new_directory(output) as directory:
        with HfWriter(directory, infos) as writer:
            for entry in exported:
                _export_entry(entry, stored, writer, more_vocab)
            if kept:
                for name, theirs in kept_names.items():
                    writer.write(name, kept.read(theirs))
        write_json(directory / CONFIG, config)
        if tower_config is not None:
            (directory / TOWER).mkdir()
            write_json(directory / TOWER / CONFIG, tower_config)
        if (source_dir / HF_FILES).is_dir():
            shutil.copytree(source_dir / HF_FILES, directory, dirs_exist_ok=True)
        if finish is not None:
            finish(directory)
    if left_out := [entry.name for entry in table.entries() if not entry.is_exported]:
        log.warning("left out, since dialect %s has no place for it: %s", dialect, ", ".join(left_out))
    return dialect


def _check_complete(table: KeyMap, stored: Mapping[str, TensorInfo], source_dir: Path) -> None:
    names = {entry.name for entry in table.entries()}
    if missing := sorted(names - stored.keys()):
        raise CheckpointError(f"{source_dir} lacks {missing[0]} ({len(missing)} such tensors); it is not whole")
    parts = {name.split(".")[0] for name in names}
    if wrong := next((e for e in table.entries() if stored[e.name].shape != e.shape), None):
        raise CheckpointError(
            f"{source_dir}: {wrong.name} is {stored[wrong.name].shape}, and its {INFO} makes it {wrong.shape}"
        )
    if unknown := sorted(name for name in stored.keys() - names if name.split(".")[0] in parts):
        raise CheckpointError(
            f"{source_dir} holds {unknown[0]} ({len(unknown)} such tensors), which its family's table does not have; "
            "an export would lose it"
        )


def _with_dtype(config: dict[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """config.json names a dtype in which transformers loads: it must be that of the tensors after a training, too."""
    if len(dtypes) != 1:
        return config
    name = str(next(iter(dtypes))).removeprefix("torch.")
    return config | {key: name for key in ("dtype", "torch_dtype") if key in config}


def _lengthened(entry: Entry, tensors: list[Tensor], more_vocab: int) -> list[Tensor]:
    """A vocabulary with `more_vocab` rows behind it: their logits are means, which never exceed all others."""
    if entry.tp != "vocab" or not more_vocab:
        return tensors
    means = (tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype) for tensor in tensors)
    return [
        torch.cat([tensor, mean.expand(more_vocab, *tensor.shape[1:])])
        for tensor, mean in zip(tensors, means, strict=True)
    ]


def _export_entry(entry: Entry, stored: "StoredTensors", writer: HfWriter, more_vocab: int) -> None:
    """A function of its own so that its tensors are gone before the next one is read."""
    tensors = _lengthened(entry, entry.unpack(stored.read(entry.name)), more_vocab)
    for name, tensor in zip(entry.hf, tensors, strict=True):
        writer.write(name, tensor)
