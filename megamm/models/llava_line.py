"""A family of the LLaVA line from its parts: any decoder, tower and projector, visual tokens in place of the marker."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megamm.models import factory, native, original
from megamm.models.family import Family
from megamm.models.options import VlmOptions
from megamm.models.parts import Parts
from megamm.weights.keymap import KeyMap

_Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """One way in which models are published: what is in their config.json, and how their tensors are called."""

    holds: Callable[[_Json], bool]
    """Whether a config.json is written in it."""
    read: Callable[[_Json, _Json | None], VlmOptions]
    write: Callable[[VlmOptions], tuple[_Json, _Json | None]]
    keys: Callable[[VlmOptions], KeyMap]
    compose: Callable[[_Json, _Json], _Json] | None = None
    """As in Family; None: a model cannot be started in it."""


def in_transformers(family: str, parts: Parts) -> Spelling:
    """That of transformers' own LLaVA; it has one kind of projector."""
    return Spelling(
        holds=native.is_native,
        read=partial(native.read, family=family, parts=parts),
        write=lambda options: (native.write(options, parts=parts), None),
        keys=partial(native.keys, parts=parts),
        compose=partial(native.compose, parts=parts),
    )


def in_original(family: str, parts: Parts, classes: Sequence[original.Class]) -> Spelling:
    """That of LLaVA's code and its descendants, which have a class per decoder."""
    return Spelling(
        holds=original.is_original,
        read=partial(original.read, family=family, parts=parts, classes=classes),
        write=partial(original.write, parts=parts, classes=classes),
        keys=partial(original.keys, parts=parts),
    )


def in_factory(family: str, parts: Parts) -> Spelling:
    """That of TinyLLaVA_Factory."""
    return Spelling(
        holds=factory.is_factory,
        read=partial(factory.read, family=family, parts=parts),
        write=lambda options: (factory.write(options, parts=parts), None),
        keys=partial(factory.keys, parts=parts),
        compose=partial(factory.compose, parts=parts),
    )


def family(
    *,
    name: str,
    parts: Parts,
    template: str,
    classes: Sequence[original.Class] = (),
    more: Mapping[str, Spelling] | None = None,
    starts_in: str = "hf",
) -> Family:
    """A family whose models are made of `parts`, published in transformers' spelling (dialect `hf`), in that of the
    authors' code (`original`) where that has `classes`, and in `more`. `starts_in`: the dialect in which a plain llm
    and a plain tower become one."""
    spellings = {"hf": in_transformers(name, parts)}
    if classes:
        spellings["original"] = in_original(name, parts, classes)
    spellings |= more or {}
    compose = spellings[starts_in].compose
    assert compose is not None

    def read(config: _Json, tower_config: _Json | None = None) -> VlmOptions:
        """config.json in any of the spellings -> options."""
        chosen = next((s for s in spellings.values() if s.holds(config)), spellings["hf"])
        return chosen.read(config, tower_config)

    def write(options: VlmOptions, dialect: str) -> tuple[_Json, _Json | None]:
        """Options -> config.json, and the tower's where the dialect keeps it apart."""
        return spellings[dialect].write(options)

    return Family(
        name=name,
        read=read,
        write=write,
        compose=compose,
        keys={dialect: spellings[dialect].keys for dialect in (starts_in, *spellings)},
        export_dialect=starts_in,
        template=template,
    )
