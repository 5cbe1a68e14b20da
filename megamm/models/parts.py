"""What a family's file needs of the files of a decoder and of a vision tower, whichever they are.

The modules themselves (`models/llm/llama.py`, `models/vision/clip.py`) are passed around as values of these protocols.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megamm.errors import CheckpointError
from megamm.models.options import ImageOptions, LlmOptions, VisionOptions
from megamm.weights.keymap import KeyMap


class LlmPart(Protocol):
    """A file of models/llm/."""

    MODEL_TYPE: str
    """`model_type` of its config.json."""

    def from_hf(self, config: dict[str, Any]) -> LlmOptions: ...
    def to_hf(self, options: LlmOptions, source: dict[str, Any]) -> dict[str, Any]: ...
    def keys(self, options: LlmOptions) -> KeyMap: ...


class VisionPart(Protocol):
    """A file of models/vision/."""

    MODEL_TYPE: str
    """`model_type` of its config.json, or of the vision_config inside that of the model it comes from."""
    IMAGE: ImageOptions

    def from_hf(self, config: dict[str, Any], feature_layer: int, keep_first_token: bool) -> VisionOptions: ...
    def to_hf(self, options: VisionOptions, source: dict[str, Any]) -> dict[str, Any]: ...
    def keys(self, options: VisionOptions) -> KeyMap: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The parts that a family's models are made of; each model has one of each, which its `model_type`s name."""

    llms: tuple[LlmPart, ...]
    """The first one is meant where a config.json says no model_type."""
    visions: tuple[VisionPart, ...]
    """As `llms`."""
    projectors: tuple[str, ...] = ("linear", "mlpNx_gelu")
    """Kinds of projector in the authors' code, as ProjectorOptions calls them; N is any number."""

    def llm_options(self, config: dict[str, Any], name: str = "config.json") -> LlmOptions:
        """Options of a plain decoder's config.json. CheckpointError: none of `llms`."""
        return _chosen(self.llms, config, name, "llm").from_hf(config)

    def vision_options(
        self, config: dict[str, Any], feature_layer: int, keep_first_token: bool, name: str = "the tower's config.json"
    ) -> VisionOptions:
        """Options of a tower's config.json, or that of the model around it. CheckpointError: none of `visions`."""
        inner = vision_config(config)
        return _chosen(self.visions, inner, name, "vision").from_hf(inner, feature_layer, keep_first_token)

    def llm(self, options: LlmOptions) -> LlmPart:
        """The file that read these options."""
        return next(part for part in self.llms if part.MODEL_TYPE == options.model_type)  # noqa: SIM300

    def vision(self, options: VisionOptions) -> VisionPart:
        """The file that read these options."""
        return next(part for part in self.visions if part.MODEL_TYPE == options.model_type)  # noqa: SIM300


_Part = TypeVar("_Part", LlmPart, VisionPart)

_REFUSED = {
    "gemma": "Gemma (it scales its embeddings and shifts its norms)",
    "openelm": "OpenELM (its layers differ in heads and widths)",
}
"""Decoders of published models of these families that megamm has not, by their model_type."""


def _chosen(parts: Sequence[_Part], config: dict[str, Any], name: str, what: str) -> _Part:
    found = config.get("model_type", parts[0].MODEL_TYPE)
    for part in parts:
        if part.MODEL_TYPE == found:  # noqa: SIM300
            return part
    known = ", ".join(part.MODEL_TYPE for part in parts)
    if found in _REFUSED:
        raise CheckpointError(f"{name}: megamm does not support {_REFUSED[found]}; this family has: {known}")
    raise CheckpointError(f"{name}: model_type {found!r} is not a {what} that this family has, which are: {known}")


def vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """The tower's sizes from its config.json, or from that of the model around it, such as a CLIPModel."""
    return config.get("vision_config", config)
