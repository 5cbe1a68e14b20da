"""Conversations and their pictures -> PREFIX.bin, PREFIX.idx and PREFIX.json, which training reads.

python data_tools/preprocess.py --input llava.json --image-dir images --family llava --tokenizer DIR --output PREFIX
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from megamm.data.faults import Fault
from megamm.data.indexed import paths_of, writing
from megamm.data.parts import Parts, make_parts
from megamm.data.pool import Pool, processes
from megamm.data.prepare import Recipe, preparer
from megamm.data.progress import progress
from megamm.data.sources import Source
from megamm.data.tokenizer import Tokenizer
from megamm.data.views import ViewRules
from megamm.errors import DataError, MegammError


@dataclass(kw_only=True, slots=True)
class Options:
    """Tokenise conversations and gather their pictures into one indexed dataset. Samples that cannot be used are
    skipped, counted by reason and listed in PREFIX.skipped.jsonl. Nothing is dropped for its length. A run that was
    interrupted goes on where it was when it is started again."""

    input: tuple[Path, ...]
    """Files of conversations, or directories of them: JSON lists or lines, Parquet, WebDataset tars."""
    image_dir: Path
    """Directory that the pictures' paths begin at; nothing outside it is ever read."""
    family: str
    """Family of models that will train on it, such as `llava`."""
    tokenizer: Path
    """Directory of the llm's tokenizer."""
    output: str
    """Prefix of the files to write."""
    format: str = "auto"
    """Of the input: auto (looks into each file), json, parquet or tar."""
    template: str | None = None
    """Conversation format; default: the family's for sft. `plain` is the one for pretraining the projector."""
    prompt_style: str = "none"
    """Prompt put behind questions of its kind: none, short_answer, multiple_choice or multiple_choice_owl."""
    marker: str | None = None
    """Text that stands for a picture in the conversations, beside `<image>`; default: the family's."""
    cut: Literal["none", "single", "all"] = "none"
    """Which still pictures are cut into tiles, for a template that keeps markers in place: none, the only one of a
    sample (mPLUG-Owl3 until October 2024 was trained so), or all (since)."""
    view_text: Literal["v2", "v3"] = "v2"
    """How tiles and video frames are announced: as mPLUG-Owl3 did until October 2024, or since."""
    tile_size: int = 384
    """Side of a tile in pixels: the image_size of the model's vision_config."""
    max_frames: int = 16
    """Frames of a video: one a second, at most so many."""
    max_views: int | None = None
    """Pictures of a sample, tiles and frames counted; samples with more are skipped. Default: no limit."""
    workers: int = 1
    """Processes. The output does not depend on it."""
    mpi: bool = False
    """Work in the ranks of `mpirun -n N` instead: rank 0 hands out the work, all others do it."""
    max_bad: float = 0.01
    """Largest share of samples that may be skipped, 0 to 1; above it nothing is written but the list of them."""
    max_tokens: int | None = None
    """Count, and keep, the samples that are longer. Tokens."""
    image_tokens: int = 576
    """Tokens of one picture, for `max-tokens`."""
    max_side: int | None = None
    """Scale larger pictures down to this many pixels, as JPEG. Default: pictures keep their bytes."""
    reencode: int | None = None
    """Store every picture as a JPEG of this quality, 1 to 100. Default: pictures keep their bytes."""
    pictures_are_checked: bool = False
    """check.py has found all pictures sound: do not decode each once more to see whether it can be."""


def main(options: Options) -> None:
    """Write the dataset. Raises MegammError where it cannot be, or where too many samples are bad."""
    with processes(options.workers, options.mpi) as pool:
        if pool is not None:
            _preprocess(options, pool)


def _preprocess(options: Options, pool: Pool) -> None:
    _check(options)
    from megamm.registry import family  # imports megatron, which the processes of --workers never need

    model = family(options.family)
    recipe = Recipe(
        image_dir=options.image_dir,
        tokenizer_dir=options.tokenizer,
        template=options.template or model.template,
        marker=options.marker or model.marker,
        views=ViewRules(
            cut=options.cut,
            text=options.view_text,
            tile_size=options.tile_size,
            max_frames=options.max_frames,
            max_views=options.max_views,
        ),
        prompt_style=options.prompt_style,
        max_side=options.max_side,
        quality=options.reencode,
        has_sound_pictures=options.pictures_are_checked,
    )
    tokenizer = preparer(recipe).tokenizer  # also says now, and not in some process later, what does not fit
    source = Source(list(options.input), options.format)
    written = {path.resolve() for path in (*paths_of(options.output), Path(f"{options.output}.skipped.jsonl"))}
    if taken := [path for path, _ in source.files if path.resolve() in written]:
        raise DataError(f"--output {options.output} would be written over --input {taken[0]}; choose another prefix")
    made_by: dict[str, Any] = {
        "family": options.family,
        "template": recipe.template,
        "tokenizer": {"file": tokenizer.name, "hash": tokenizer.hash},
    }
    settings = {"prompt_style": recipe.prompt_style, "max_side": recipe.max_side, "reencode": recipe.quality}
    made_by |= {name: value for name, value in settings.items() if value not in ("none", None)}
    made_by |= _of_views(recipe, model.placeholder, tokenizer)
    reads = {"image_dir": str(options.image_dir.resolve()), "marker": recipe.marker, "views": asdict(recipe.views)}
    reads["pictures_are_checked"] = options.pictures_are_checked
    leftovers = {"input": source.stamps(), **reads, **made_by}
    console = Console(stderr=True)
    with Parts(options.output, leftovers) as parts:
        if parts.merged:
            console.print(f"{parts.directory}: goes on behind {len(parts.index)} finished samples")
        with progress("preprocess", source.size, console) as advance:
            make_parts(parts, source, recipe, pool, advance)
        if changed := source.changed():
            parts.discard()
            raise DataError(f"{', '.join(changed)}: changed while it was read; run again when it is complete")
        total, skipped = len(parts.index) + parts.skipped.total(), dict(parts.skipped.most_common())
        if not total:
            parts.discard()
            raise DataError(f"{_names(options)}: holds no samples")
        _list_faults(Path(f"{options.output}.skipped.jsonl"), parts.faults())
        _check_share(parts, total, options, skipped)
        info = parts.finish({**made_by, "skipped": skipped})
        longer = parts.index.num_longer(options.max_tokens, options.image_tokens) if options.max_tokens else None
    console.print(
        f"{options.output}: {info['documents']} documents, {info['images']} images, {info['tokens']} tokens "
        f"({info['targets']} targets), {info['bin_bytes'] / 1e6:.1f} MB; skipped {_summary(skipped)}"
        + (f"; {longer} longer than {options.max_tokens} tokens" if longer is not None else ""),
        soft_wrap=True,
    )


def _check(options: Options) -> None:
    if not 0 <= options.max_bad <= 1:
        raise DataError(f"--max-bad: {options.max_bad} is no share; give a number from 0 to 1")
    if not options.output or options.output.endswith("/"):
        raise DataError(f"--output: {options.output!r} names no file; give a prefix, such as data/train")
    for name, value, most in (
        ("max-tokens", options.max_tokens, None),
        ("image-tokens", options.image_tokens, None),
        ("max-side", options.max_side, None),
        ("reencode", options.reencode, 100),
        ("tile-size", options.tile_size, None),
        ("max-frames", options.max_frames, None),
    ):
        if value is not None and (value < 1 or (most is not None and value > most)):
            raise DataError(f"--{name}: {value}; give a number from 1{f' to {most}' if most else ' on'}")


def _of_views(recipe: Recipe, placeholder: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the loader must know where a family's visual tokens are no part of the sequence."""
    if placeholder is None:
        return {}
    return {"placeholder": tokenizer.encode(placeholder, bos=False), "views": asdict(recipe.views)}


def _check_share(parts: Parts, total: int, options: Options, skipped: dict[str, int]) -> None:
    bad = parts.skipped.total()
    if bad > options.max_bad * total or bad == total:
        parts.discard()
        raise DataError(
            f"{_names(options)}: {bad} of {total} samples cannot be used ({_summary(skipped)}), --max-bad allows "
            f"{options.max_bad:.2%}; see {options.output}.skipped.jsonl, mend the data or raise --max-bad"
        )


def _names(options: Options) -> str:
    return ", ".join(map(str, options.input))


def _summary(skipped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "none"


def _list_faults(path: Path, faults: Iterable[Fault]) -> None:
    aside = path.with_name(path.name + ".tmp")
    with writing(path):
        with aside.open("w", encoding="utf-8") as file:
            for fault in faults:
                line = {"where": fault.where, "reason": fault.fault.reason, "message": str(fault.fault)}
                file.write(json.dumps(line) + "\n")
        os.replace(aside, path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except MegammError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
