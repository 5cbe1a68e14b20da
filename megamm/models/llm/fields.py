"""How the files of this folder read and write a decoder's config.json. No architecture is named here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.options import LlmOptions

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "has_tied_embeddings",
}
_ROTARY = "partial_rotary_factor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """The fields of one architecture's config.json beside the sizes that all have; `read` and `write` are inverse."""

    model_type: str
    defaults: dict[str, Any]
    """What transformers assumes for a field that config.json leaves out. `partial_rotary_factor` is among them where
    the architecture has it."""
    options: Mapping[str, str]
    """Field of config.json -> field of LlmOptions, null included."""
    only: Mapping[str, Any]
    """Fields of which megamm has one value; it is that where config.json leaves them out."""
    fixed: Mapping[str, Any]
    """Fields of LlmOptions that the architecture settles."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that older releases have -> the field's name; written back as found."""

    def read(self, config: dict[str, Any]) -> LlmOptions:
        """config.json of the decoder (or the part of a larger one that describes it) -> options.

        CheckpointError: a value that megamm has not, naming the field."""
        config = renamed(config, self._older(config))
        get = {**self.defaults, **{key: value for key, value in config.items() if value is not None}}
        for name, only in self.only.items():
            if get.get(name, only) != only:
                raise CheckpointError(
                    f"config.json: {self.model_type} with {name} {get[name]!r} is not supported, only {only!r}"
                )
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or {}
        kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
        if kind != "default":
            raise CheckpointError(f"config.json: rotary scaling {kind!r} is not supported, only the default")
        values: dict[str, Any] = {ours: get[name] for name, ours in _SIZES.items()}
        values |= {ours: config.get(name, self.defaults[name]) for name, ours in self.options.items()}
        heads = values["num_heads"]
        groups = config.get("num_key_value_heads", self.defaults.get("num_key_value_heads")) or heads
        if heads % groups:
            raise CheckpointError(
                f"config.json: {heads} num_attention_heads cannot share {groups} num_key_value_heads; the second "
                "must divide the first"
            )
        if _ROTARY in self.defaults:
            values["rotary_factor"] = rope.get(_ROTARY, get[_ROTARY])
        return LlmOptions(
            model_type=self.model_type,
            num_groups=groups,
            head_dim=config.get("head_dim") or values["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta", get["rope_theta"])),
            **values,
            **self.fixed,
        )

    def write(self, options: LlmOptions, source: dict[str, Any]) -> dict[str, Any]:
        """Options -> config.json, written over the one they came from."""
        older = self._older(source)
        current, heads = renamed(source, older), options.num_heads
        known: dict[str, Any] = {
            "model_type": self.model_type,
            **{name: getattr(options, ours) for name, ours in (_SIZES | dict(self.options)).items()},
            "num_key_value_heads": options.num_groups,
            "head_dim": options.head_dim,
            **self.only,
        }
        defaults = {**self.only, **self.defaults, "head_dim": options.hidden_size // heads}
        if "num_key_value_heads" in current or "num_key_value_heads" not in defaults:
            defaults["num_key_value_heads"] = heads
        rotary = {"rope_theta": options.rope_theta}
        if _ROTARY in self.defaults:
            rotary[_ROTARY] = options.rotary_factor
        out = overlay(current, known, defaults)
        if "rope_parameters" in current:
            out["rope_parameters"] = overlay(current["rope_parameters"], rotary, self.defaults)
        else:
            out = overlay(out, rotary, self.defaults)
        return renamed(out, {name: alias for alias, name in older.items()})

    def _older(self, config: dict[str, Any]) -> dict[str, str]:
        """The aliases that stand in `config` in place of the field's name."""
        return {alias: name for alias, name in self.aliases.items() if alias in config and name not in config}


def renamed(config: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`config` with the fields that are in `names` under their other name."""
    return {names.get(name, name): value for name, value in config.items()}
