"""A family: which parts, how they are joined, how its checkpoints are spelt. One value per file beside this one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from megamm.models.options import VlmOptions
from megamm.weights.keymap import KeyMap


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Everything megamm knows about one family; `models/vlm.py` holds no family name."""

    name: str
    read: Callable[[dict[str, Any], dict[str, Any] | None], VlmOptions]
    """config.json, and that of a separately published vision tower -> options. CheckpointError: a model the family
    cannot be, or a config.json that leaves the tower's sizes to the tower's own, which is not given."""
    write: Callable[[VlmOptions, str], tuple[dict[str, Any], dict[str, Any] | None]]
    """Options, dialect -> what `read` takes. Nothing changes on the way there and back in the dialect that was read.
    CheckpointError: a model that the dialect cannot say."""
    compose: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    """config.json of a plain llm, and of a plain vision tower -> that of a model of both, in the export dialect."""
    keys: dict[str, Callable[[VlmOptions], KeyMap]]
    """Dialect -> table of its key names, without rows where it cannot spell the model; the export dialect first."""
    complete: Callable[[dict[str, Any], Iterable[str]], dict[str, Any]] = lambda config, _: config
    """config.json, key names of a release -> config.json, completed by what only the names tell of the model."""
    export_dialect: str
    """Dialect to export in when the checkpoint was not imported from one."""
    start_keys: Callable[[VlmOptions], KeyMap] | None = None
    """Table in the names of a plain llm and a plain tower, for a start of both, where these differ from the export
    dialect's by more than a prefix."""
    resized: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    """config.json, side of the pictures in pixels -> that of the same model for such pictures; None: there is none."""
    drawn: tuple[str, ...] = ("projector.",)
    """Beginnings of the canonical names that neither a plain llm nor a plain tower has: a start draws them. `{i}` is
    any number."""
    duplicated: Callable[[VlmOptions], dict[str, str]] = field(default=lambda _: {})
    """Canonical names that a release may lack -> those whose weights they then begin with."""
    is_recognised: bool = True
    """Whether its releases differ from those of other families; False: it is taken only where it is named."""
    template: str
    """Name of the conversation template of its sft."""
    pretrain_template: str = "plain"
    """Name of the conversation template of its pretrain."""
    marker: str = "<image>"
    """Text that stands for a picture in its conversations."""
    placeholder: str | None = None
    """Text whose tokens stand for a picture in the sequence, where its visual tokens are no part of that."""


def overlay(source: dict[str, Any], known: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`source` with the `known` values written over it; a key that the source leaves out, or gives as null, stays so
    where its value is the default: reading and writing a config.json changes nothing."""
    out = dict(source)
    for key, value in known.items():
        if not source or source.get(key) is not None or value != defaults.get(key, object()):
            out[key] = value
    return out
