"""Conversation -> ids and target spans, and from these one training sequence. Knows no file format and no picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from megamm.batch import IGNORE, IMAGE
from megamm.data.faults import SampleFault
from megamm.data.template import Template

if TYPE_CHECKING:  # the import of transformers takes a second, and the loader needs no tokenizer
    from megamm.data.tokenizer import Tokenizer

Turn = tuple[str, str]
"""(role, text) as the source has it; roles are `human` and `gpt`."""


def tokenise(
    turns: list[Turn], num_images: int, template: Template, tokenizer: Tokenizer, marker: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] with one IMAGE per picture, and target spans int32 [N, 2] (first, last + 1) over them.

    Text between two markers is tokenised in one piece, as the authors do, so ids are theirs for
    any tokenizer. Targets come from where each token stands in the text, so they are right where the authors' counting
    fails and drops the sample. Raises SampleFault.
    """
    if not template.keeps_markers:
        turns = _place_markers(turns, num_images, marker)
    elif any(role == "gpt" and marker in text for role, text in turns):
        raise SampleFault("marker_count", "a marker in an answer, where this template has none")
    rounds = _rounds(turns)
    text, ranges = template.render(rounds, marker)
    pieces = text.split(marker)
    if len(pieces) - 1 != num_images:
        raise SampleFault("marker_count", f"{len(pieces) - 1} markers, {num_images} pictures")
    ids = [np.asarray(tokenizer.encode("", bos=True), dtype=np.int32)]
    spans: list[tuple[int, int]] = []
    num_ids, char = len(ids[0]), 0
    for i, piece in enumerate(pieces):
        if i > 0:
            ids.append(np.asarray([IMAGE], dtype=np.int32))
            num_ids, char = num_ids + 1, char + len(marker)
        answers = [start - char for start, _ in ranges if 0 < start - char < len(piece)]
        cuts = [0, *(answers if template.splits_answers else []), len(piece)]
        for part in (piece[a:b] for a, b in pairwise(cuts)):
            # Every token that shares a character with the range. A token that begins in the space before an
            # answer is a target; the end token always stands alone, so nothing behind it can be.
            here = [(a - char, b - char) for a, b in ranges if a - char < len(part) and b - char > 0]
            part_ids, found = tokenizer.encode_ranges(part, here)
            spans += [(num_ids + first, num_ids + last) for first, last in found if first < last]
            ids.append(part_ids)
            num_ids, char = num_ids + len(part_ids), char + len(part)
    return np.concatenate(ids), np.asarray(spans, dtype=np.int32).reshape(-1, 2)


def expand(
    ids: np.ndarray,
    spans: np.ndarray,
    tokens_per_image: int,
    max_tokens: int,
    placeholder: Sequence[int] | None = None,
    views: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and labels, int64 [S], with what stands for a picture in place of every IMAGE, and where each picture begins
    that begins inside, int64 [I]: `tokens_per_image` times IMAGE, or, where a model's visual tokens are no part of its
    sequence, the ordinary ids of a `placeholder`. Cut to `max_tokens` after that: in front of the picture in which the
    cut would fall, where `views` says of how many IMAGE each picture consists; else inside it, as theirs."""
    is_image = ids == IMAGE
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    for start, end in spans.tolist():
        labels[start:end] = ids[start:end]
    labels[is_image] = IGNORE
    per_image = tokens_per_image if placeholder is None else len(placeholder)
    repeats = np.where(is_image, per_image, 1)
    starts = (np.cumsum(repeats) - repeats)[is_image]
    expanded = np.repeat(ids.astype(np.int64), repeats)
    if placeholder is not None:
        expanded[(starts[:, None] + np.arange(per_image)).ravel()] = np.tile(placeholder, len(starts))
    end = max_tokens
    if views is not None and len(expanded) > end:
        behind = np.cumsum(views, dtype=np.int64)
        firsts, ends = starts[behind - np.asarray(views, np.int64)], starts[behind - 1] + per_image
        end = min([end, *firsts[(firsts < end) & (end < ends)]])
    return expanded[:end], np.repeat(labels, repeats)[:end], starts[starts < end]


def _place_markers(turns: list[Turn], num_images: int, marker: str) -> list[Turn]:
    """The authors' rule wherever it fits; the markers as written where only that fits: pictures between the text."""
    in_front = [(role, _one_marker_in_front(text, marker)) for role, text in turns]
    if sum(text.count(marker) for _, text in in_front) == num_images:
        return in_front
    return turns if sum(text.count(marker) for _, text in turns) == num_images else in_front


def _one_marker_in_front(text: str, marker: str) -> str:
    # LLaVA's preprocess_multimodal, to the letter: the markers of a turn become one, whatever their number and place.
    if marker not in text:
        return text
    return f"{marker}\n{text.replace(marker, '').strip()}".strip()


def _rounds(turns: list[Turn]) -> list[tuple[str, str]]:
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]  # as the authors do: an answer without a question in front is dropped
    expected = ["human", "gpt"] * (len(turns) // 2 + 1)
    if [role for role, _ in turns] != expected[: len(turns)]:
        raise SampleFault("bad_roles", "found " + ", ".join(repr(role) for role, _ in turns[:4]))
    if not turns or len(turns) % 2:
        raise SampleFault("no_answer", f"{len(turns)} turns, the last one is not an answer")
    rounds = [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]
    for i, (_, answer) in enumerate(rounds):
        if not answer.strip():
            raise SampleFault("no_answer", f"the answer of round {i + 1} is empty")
    return rounds
