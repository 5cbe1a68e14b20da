"""What `train.freeze` says: whole parts of a model, or the beginning of one. Names and numbers only."""

import re
from collections.abc import Collection

from megamm.config.schema import PARTS

TEXT_WAY = "llm.text"
"""Of an llm that has weights for visual tokens only all but these."""
VISUAL = "visual"
LEGAL = f"{', '.join(PARTS)}, vision[:N] or llm[:N] with N of 1 or more, {TEXT_WAY}"
_BEGINNING = re.compile(r"(vision|llm)\[:([1-9]\d*)\]")


def is_legal(item: str) -> bool:
    """Whether it is one of `LEGAL`."""
    return item in PARTS or item == TEXT_WAY or _BEGINNING.fullmatch(item) is not None


def num_frozen_layers(part: str, freeze: Collection[str]) -> int:
    """Layers at the beginning of `part` that are frozen by number, not with the whole of it."""
    found = (_BEGINNING.fullmatch(item) for item in freeze)
    return max((int(match[2]) for match in found if match and match[1] == part), default=0)


def is_frozen(unit: str, freeze: Collection[str]) -> bool:
    """Whether the unit of that name, such as `vision.embed` or `llm.layer.3`, is not trained; `.visual` behind the name
    means the weights for visual tokens only, where it has such, and without it the others."""
    part, *rest = unit.split(".")
    if part in freeze or (TEXT_WAY in freeze and part == "llm" and rest[-1] != VISUAL):
        return True
    first = num_frozen_layers(part, freeze)
    return first > 0 and (rest[0] == "embed" or (rest[0] == "layer" and int(rest[1]) < first))
