"""From options and a layout to the stages of this rank, and the flat unit list that layouts are made of."""

from dataclasses import dataclass, replace

from megatron.core import parallel_state

from megamm import backend
from megamm.config.frozen import VISUAL
from megamm.models.options import LlmOptions, ProjectorOptions, VisionOptions, VlmOptions
from megamm.models.parameters import mark_partitions
from megamm.models.spec import Build, PartConfigs
from megamm.models.vlm import VLM
from megamm.parallel.placement import Unit
from megamm.weights.keymap import KeyMap


def build_stages(options: VlmOptions, build: Build, table: KeyMap) -> list[VLM]:
    """The virtual stages of this rank, on its device, weights not yet filled. Needs the process groups.

    table: any dialect of the model's; it says which parameters tensor parallelism cuts.
    """
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    configs = PartConfigs.of(options, build)
    stages = [VLM(options, configs, build.layout.stage(pp_rank, k), build.loss) for k in range(build.layout.virtual)]
    stages = [stage.to(backend.current().device) for stage in stages]
    mark_partitions(stages, table)
    return stages


def units(
    options: VlmOptions, num_tokens: float, num_images: float, seq_length: float, bytes_per_value: int = 2
) -> list[Unit]:
    """The model as a flat list, with what one micro-batch costs in each unit.

    num_tokens: tokens of a micro-batch, visual ones counted; num_images: its pictures; seq_length: tokens that
    attend to each other. A multiply-add counts as two FLOPs; causal attention counts half of the full square.
    """
    batch = _MicroBatch(num_tokens, num_images, seq_length, bytes_per_value)
    flat = [*_vision(options.vision, batch), _projector(options, batch), *_llm(options, batch)]
    return _with_words(flat, options, batch) if options.has_visual_words else flat


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    num_tokens: float
    num_images: float
    seq_length: float
    bytes_per_value: int

    def unit(self, name: str, weights: int, tokens: float, kept: float, attention: float = 0.0, rest: int = 0) -> Unit:
        """weights: values multiplied with each of `tokens`; rest: parameters beside them; kept: values per token."""
        return Unit(name, 2 * weights * tokens + attention, weights + rest, int(kept * tokens * self.bytes_per_value))


def _vision(v: VisionOptions, batch: _MicroBatch) -> list[Unit]:
    patch, h = 3 * v.patch_size**2 * v.hidden_size, v.hidden_size
    patches, positions = v.num_patches * batch.num_images, v.num_positions * batch.num_images
    vectors = v.num_positions + v.has_class_token + v.has_patch_bias + 2 * v.has_pre_norm
    embed = batch.unit("vision.embed", patch, patches, 3 * h, rest=vectors * h)
    layers = [
        batch.unit(
            f"vision.layer.{i}",
            4 * h**2 + 2 * h * v.ffn_size,
            positions,
            8 * h + 2 * v.ffn_size,
            attention=4.0 * positions * v.num_positions * h,
            rest=9 * h + v.ffn_size + 2 * h * (v.has_post_norm and i == v.num_layers - 1),
        )
        for i in range(v.num_layers)
    ]
    return [embed, *layers]


def _projector(options: VlmOptions, batch: _MicroBatch) -> Unit:
    p, num_features = options.projector, options.vision.num_features
    if p.kind == "abstractor":
        return _abstractor(p, num_features, batch)
    if p.num_queries:
        return _resampler(p, num_features, batch)
    weights = p.in_size * p.out_size + (p.num_linears - 1) * p.out_size**2
    kept = p.in_size + 2 * (p.num_linears - 1) * p.out_size
    visual_tokens = options.tokens_per_image * batch.num_images
    return batch.unit("projector", weights, visual_tokens, kept, rest=p.num_linears * p.out_size)


def _llm(options: VlmOptions, batch: _MicroBatch) -> list[Unit]:
    t = options.llm
    vocabulary = t.padded_vocab_size * t.hidden_size
    embedded = int(t.hidden_size * batch.num_tokens * batch.bytes_per_value)
    # The logits are kept in float32, and once more as softmax.
    head_kept = t.hidden_size + 8 / batch.bytes_per_value * t.padded_vocab_size
    head_norm = t.hidden_size * (1 + (t.norm == "LayerNorm"))
    head = Unit(
        "llm.head",
        2 * vocabulary * batch.num_tokens,
        head_norm + t.padded_vocab_size * t.has_head_bias + vocabulary * (not t.has_tied_embeddings),
        int(head_kept * batch.num_tokens * batch.bytes_per_value),
    )
    layers = [_llm_layer(f"llm.layer.{i}", t, batch) for i in range(t.num_layers)]
    if t.is_modality_adaptive:
        layers = [replace(layer, guests=(f"{layer.name}.{VISUAL}",)) for layer in layers]
    layers = [_with_features(u, options, batch) if options.reads_features(u.name) else u for u in layers]
    return [Unit("llm.embed", 0.0, vocabulary, embedded), *layers, head]


def _llm_layer(name: str, t: LlmOptions, batch: _MicroBatch) -> Unit:
    q_size, kv_size, fc1_size = t.num_heads * t.head_dim, t.num_groups * t.head_dim, t.ffn_size * (1 + t.is_gated)
    # Twice the positions that a query sees on average: half of all, fewer within a window.
    reach = min(batch.seq_length, t.window or batch.seq_length)
    seen = reach * (2 - reach / batch.seq_length)
    num_norms = (2 - t.has_parallel_residual) * t.num_ways
    norms = num_norms * t.hidden_size * (1 + (t.norm == "LayerNorm"))
    biases = (q_size + 2 * kv_size) * t.has_qkv_bias + (2 * t.hidden_size + fc1_size) * t.has_bias
    return batch.unit(
        name,
        t.hidden_size * (2 * q_size + 2 * kv_size * t.num_ways + fc1_size + t.ffn_size),
        batch.num_tokens,
        4 * t.hidden_size + 2 * q_size + 2 * kv_size + fc1_size + t.ffn_size,
        attention=2.0 * batch.num_tokens * seen * q_size,
        rest=norms + biases,
    )


def _with_features(layer: Unit, options: VlmOptions, batch: _MicroBatch) -> Unit:
    """The layer, reading visual tokens: every token sees all pictures of its own sequence, which mostly come first."""
    t, visual_tokens = options.llm, options.tokens_per_image * batch.num_images
    assert t.hyper is not None
    q_size, kv_size = t.num_heads * t.head_dim, t.num_groups * t.head_dim
    image_kv, seen_pairs = 2 * kv_size * t.hidden_size, visual_tokens * batch.seq_length
    gate = t.head_dim * (t.head_dim + 1) if t.hyper.kind == "gated" else 0
    kept = int((t.hidden_size + 2 * kv_size) * visual_tokens * batch.bytes_per_value)
    return replace(
        layer,
        flops=layer.flops + 2.0 * image_kv * visual_tokens + 4.0 * seen_pairs * q_size,
        parameters=layer.parameters + image_kv + 2 * kv_size + gate,
        activation_bytes=layer.activation_bytes + kept,
        guests=(f"{layer.name}.{VISUAL}",),
    )


def _with_words(flat: list[Unit], options: VlmOptions, batch: _MicroBatch) -> list[Unit]:
    """vm_head, and the llm's head or embedding beside it, for every visual token. One copy of the weight counts."""
    vocabulary = options.llm.padded_vocab_size * options.llm.hidden_size
    flops = 4.0 * vocabulary * (options.tokens_per_image * batch.num_images)
    home = "llm.embed" if options.has_pseudo_features else "llm.head"
    return [
        replace(u, flops=u.flops + flops, parameters=u.parameters + vocabulary * (u.name == home), guests=("words",))
        if options.reads_words(u.name)
        else u
        for u in flat
    ]


def _abstractor(p: ProjectorOptions, num_features: int, batch: _MicroBatch) -> Unit:
    a, f, queries, keys = p.in_size, p.ffn_size, p.num_queries, p.num_queries + num_features
    layer_flops = 2 * (2 * a * a * (queries + keys) + 3 * a * f * queries) + 4 * queries * keys * a
    layer_parameters = 4 * a * a + 3 * a * f + 11 * a + 4 * f
    kept = p.num_layers * (4 * a * keys + (6 * a + 4 * f) * queries)
    return Unit(
        "projector",
        batch.num_images * (p.num_layers * layer_flops + 2 * queries * a * p.out_size),
        p.num_layers * layer_parameters + queries * a + a * p.out_size + 2 * p.out_size,
        int(kept * batch.num_images * batch.bytes_per_value),
    )


def _resampler(p: ProjectorOptions, num_features: int, batch: _MicroBatch) -> Unit:
    d, f, inner, queries = p.hidden_size, p.ffn_size, p.num_heads * p.head_dim, p.num_queries
    is_perceiver = p.kind == "perceiver"
    width, keys = (d, num_features + queries) if is_perceiver else (p.in_size, num_features)
    outside = p.in_size * d if is_perceiver else d * p.out_size
    layer_flops = 2 * (2 * d * inner + 2 * d * f) * queries + 4 * width * inner * keys + 4 * queries * keys * inner
    layer_parameters = 2 * d * inner + 2 * width * inner + 2 * d * f + 2 * (2 * d + width)
    kept = p.num_layers * ((width + 2 * inner) * keys + (4 * d + 2 * inner + 2 * f) * queries)
    return Unit(
        "projector",
        batch.num_images * (p.num_layers * layer_flops + 2 * outside * (num_features if is_perceiver else queries)),
        p.num_layers * layer_parameters + queries * d + outside + 2 * d + d * is_perceiver,
        int(kept * batch.num_images * batch.bytes_per_value),
    )
