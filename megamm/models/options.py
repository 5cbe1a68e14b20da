"""What a part of a model is, as plain values read from a Hugging Face config.json. No torch, no megatron."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionOptions:
    """A vision tower and the features taken from it."""

    num_layers: int
    """Blocks that are built and run: up to the one whose output is used."""
    stored_layers: int
    """Blocks that the checkpoint holds; those above `num_layers` are kept but never computed with."""
    hidden_size: int
    ffn_size: int
    num_heads: int
    image_size: int
    """Side of the square input picture, in pixels."""
    patch_size: int
    activation: Literal["quick_gelu", "gelu_tanh", "gelu"]
    norm_eps: float
    has_class_token: bool
    keep_first_token: bool
    """Whether the projector sees the first token, too: the class token, or where there is none the first patch."""
    has_pre_norm: bool
    has_patch_bias: bool
    has_post_norm: bool = False
    """Whether the features are normalised behind the last block, the class token's, too."""
    model_type: str = ""
    """`MODEL_TYPE` of the file of models/vision/ that reads and writes it."""

    @property
    def num_patches(self) -> int:
        """Patches of one picture; pixels right and below the last whole patch are not seen."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Tokens inside the tower."""
        return self.num_patches + self.has_class_token

    @property
    def num_features(self) -> int:
        """Image features per picture that enter the projector."""
        return self.num_positions - (not self.keep_first_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorOptions:
    """What turns image features into visual tokens."""

    kind: str
    """`linear`; `mlpNx_gelu`, N linears with an exact GELU between; `resampler` or `perceiver`, learned queries that
    attend to the features (models/projector/resampler.py); `abstractor`, another such (abstractor_layers.py)."""
    in_size: int
    out_size: int
    num_queries: int = 0
    """Learned queries, each of which becomes a visual token; 0: every feature becomes one."""
    num_layers: int = 0
    hidden_size: int = 0
    """Width of the queries between the layers."""
    num_heads: int = 0
    head_dim: int = 0
    ffn_size: int = 0
    """Width inside the MLP of a layer."""
    inner_norm_eps: float = 0.0
    """Epsilon of a norm inside that MLP."""

    @property
    def num_linears(self) -> int:
        """Linears of a `linear` or `mlpNx_gelu`."""
        return 1 if self.kind == "linear" else int(self.kind.removeprefix("mlp").removesuffix("x_gelu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperOptions:
    """Decoder layers that read the visual tokens themselves, which then are no part of the sequence."""

    layers: tuple[int, ...]
    """Their numbers, counted from 0."""
    kind: Literal["gated", "joint"]
    """Two attentions and a learned gate between them, or one softmax over visual tokens and text."""
    tokens_per_image: int
    """Visual tokens of one picture."""

    @property
    def delay(self) -> int:
        """Tokens between a picture's first and the first token that sees the picture."""
        return int(self.kind == "gated")


@dataclass(frozen=True, kw_only=True, slots=True)
class LlmOptions:
    """A decoder."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    max_positions: int
    norm: Literal["RMSNorm", "LayerNorm"]
    norm_eps: float
    rope_theta: float
    rotary_factor: float = 1.0
    """Share of a head's channels that carry its position, the first ones; rounded down."""
    window: int | None = None
    """Positions that a query looks back over, its own counted; None: all."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    is_gated: bool = True
    """Whether the MLP multiplies its activation with a second linear of the input."""
    has_qkv_bias: bool = False
    has_bias: bool = False
    """Whether every linear of a layer has a bias; then `has_qkv_bias`, too."""
    has_head_bias: bool = False
    has_tied_embeddings: bool = False
    """Whether the head uses the embedding's weights."""
    has_parallel_residual: bool = False
    """Whether attention and MLP read the same norm of the layer's input, and both are added to it."""
    is_modality_adaptive: bool = False
    """Whether visual tokens have norms, keys and values of their own (models/layers/modality_adaptive.py)."""
    hyper: HyperOptions | None = None
    """None: visual tokens are placed in the sequence, and no layer reads them beside it."""
    model_type: str = "llama"
    """`model_type` of a plain decoder of this architecture: which file of models/llm/ it is."""

    @property
    def num_ways(self) -> int:
        """How many norms, keys and values every layer has."""
        return 2 if self.is_modality_adaptive else 1

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rows that are stored: a fixed multiple, so that the shape does not depend on the layout."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """How a picture becomes the tower's input."""

    mean: tuple[float, float, float]
    """Per channel, of values in 0..1."""
    std: tuple[float, float, float]
    """Per channel, of values in 0..1."""
    resize: Literal["shortest_edge_crop", "squash"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VlmOptions:
    """A whole model: the parts, and what joins them."""

    family: str
    vision: VisionOptions
    projector: ProjectorOptions
    llm: LlmOptions
    image: ImageOptions
    image_token_id: int | None
    """Id that stands for a visual token in the released tokenizer; None where it has none."""
    tokens_per_image: int
    """Visual tokens that one picture becomes."""
    max_tokens: int | None = None
    """Tokens at which the authors' code cuts a sequence, visual ones counted, where config.json says it: may be more
    than the positions that the llm was made for. None: at these."""
    has_visual_words: bool = False
    """Whether a head gives each visual token a distribution over the vocabulary, with which training compares what the
    llm predicts there (models/layers/visual_words.py)."""
    has_pseudo_features: bool = False
    """Whether the llm reads, instead of a visual token, the mean embedding under its visual words."""
    hf: dict[str, Any] = field(default_factory=dict, repr=False)
    """The config.json that these options were read from, word for word."""
    tower_hf: dict[str, Any] | None = field(default=None, repr=False)
    """The vision tower's own config.json, word for word, where these options were read from that, too."""

    @property
    def max_sample_tokens(self) -> int:
        """Tokens that a sample may have: the positions of the llm, or more where config.json says so."""
        return max(self.llm.max_positions, self.max_tokens or 0)

    def reads_features(self, unit: str) -> bool:
        """Whether that unit of the llm reads the visual tokens, beside the hidden states that they were placed in."""
        if self.has_visual_words and unit == "llm.head":
            return True
        hyper = self.llm.hyper
        return hyper is not None and unit in {f"llm.layer.{layer}" for layer in hyper.layers}

    def reads_words(self, unit: str) -> bool:
        """Whether that unit of the llm computes with the head of visual words."""
        return self.has_visual_words and (unit == "llm.head" or (self.has_pseudo_features and unit == "llm.embed"))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the model has, of `PARTS` in megamm/config/schema.py."""
        return ("vision", "projector", "llm") + ("words",) * self.has_visual_words
