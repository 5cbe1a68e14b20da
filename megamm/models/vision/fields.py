"""How the files of this folder read and write a tower's config.json. No architecture is named here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.options import VisionOptions

_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "stored_layers",
    "num_attention_heads": "num_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """The fields of one architecture's config.json beside the sizes that all have; `read` and `write` are inverse."""

    model_type: str
    defaults: dict[str, Any]
    """What its own code assumes for a field that config.json leaves out."""
    only: Mapping[str, Any]
    """Fields of which megamm has one value."""
    fixed: Mapping[str, Any]
    """Fields of VisionOptions that the architecture settles."""

    def read(self, config: dict[str, Any], feature_layer: int, keep_first_token: bool) -> VisionOptions:
        """vision_config -> options. `feature_layer` indexes (embedding output, output of block 0, ...).

        CheckpointError: a value that megamm has not, naming the field, or a tower that has no such output."""
        get = {**self.defaults, **config}
        for name, only in self.only.items():
            if get[name] != only:
                raise CheckpointError(
                    f"config.json: {self.model_type} with {name} {get[name]!r} is not supported, only {only!r}"
                )
        values = {ours: get[name] for name, ours in _SIZES.items()}
        stored = values["stored_layers"]
        if not -stored - 1 <= feature_layer <= stored:
            raise CheckpointError(f"config.json: vision feature layer {feature_layer} of a tower of {stored} blocks")
        return VisionOptions(
            model_type=self.model_type,
            num_layers=feature_layer % (stored + 1),
            keep_first_token=keep_first_token,
            **values,
            **self.fixed,
        )

    def write(self, options: VisionOptions, source: dict[str, Any]) -> dict[str, Any]:
        """Options -> vision_config, written over the one they came from."""
        known = {name: getattr(options, ours) for name, ours in _SIZES.items()}
        return overlay(source, {"model_type": self.model_type, **known, **self.only}, self.defaults)
