"""What a family's file needs of the files of a decoder and of a vision tower, whichever they are.

The modules themselves (`models/llm/llama.py`, `models/vision/clip.py`) are passed around as values of these protocols.
"""

from typing import Any, Protocol

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

    def from_hf(self, config: dict[str, Any], feature_layer: int, keep_class_token: bool) -> VisionOptions: ...
    def to_hf(self, options: VisionOptions, source: dict[str, Any]) -> dict[str, Any]: ...
    def keys(self, options: VisionOptions) -> KeyMap: ...


def llm_config(config: dict[str, Any], part: LlmPart, name: str = "config.json") -> dict[str, Any]:
    """`config`, whose model_type must be the part's where it says one. CheckpointError: another."""
    if (found := config.get("model_type", part.MODEL_TYPE)) != part.MODEL_TYPE:
        raise CheckpointError(f"{name}: model_type {found!r} is not the {part.MODEL_TYPE!r} of this family's llm")
    return config


def vision_config(config: dict[str, Any], part: VisionPart, name: str = "the tower's config.json") -> dict[str, Any]:
    """The tower's sizes from its config.json, or from that of the model around it, such as a CLIPModel.

    CheckpointError: another kind of tower."""
    inner = config.get("vision_config", config)
    if (found := inner.get("model_type", part.MODEL_TYPE)) != part.MODEL_TYPE:
        raise CheckpointError(f"{name}: model_type {found!r} is not the {part.MODEL_TYPE!r} of this family's vision")
    return inner
