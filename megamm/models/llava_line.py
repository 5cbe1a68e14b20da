"""A family of the LLaVA line from its parts: any decoder, tower and projector, visual tokens in place of the marker."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megamm.models import native, original
from megamm.models.family import Family
from megamm.models.options import VlmOptions
from megamm.models.parts import Parts
from megamm.weights.keymap import KeyMap


def family(*, name: str, parts: Parts, template: str, classes: Sequence[original.Class] = ()) -> Family:
    """A family whose models are made of `parts`, published in transformers' spelling, and in that of the authors' code
    where that has `classes`."""

    def read(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> VlmOptions:
        """config.json in either spelling -> options."""
        if classes and original.is_original(config):
            return original.read(config, tower_config, family=name, parts=parts, classes=classes)
        return native.read(config, tower_config, family=name, parts=parts)

    def write(options: VlmOptions, dialect: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Options -> config.json, and the tower's where the dialect keeps it apart."""
        if dialect == "original":
            return original.write(options, parts=parts, classes=classes)
        return native.write(options, parts=parts), None

    keys: dict[str, Callable[[VlmOptions], KeyMap]] = {"hf": partial(native.keys, parts=parts)}
    if classes:
        keys["original"] = partial(original.keys, parts=parts)
    return Family(
        name=name,
        read=read,
        write=write,
        compose=partial(native.compose, parts=parts),
        keys=keys,
        export_dialect="hf",
        template=template,
    )
