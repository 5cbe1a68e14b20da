"""From options and a layout to the stages of this rank, and the flat unit list that layouts are made of."""

from dataclasses import replace

from megatron.core import parallel_state

from megamm import backend
from megamm.config.frozen import VISUAL
from megamm.models.options import ProjectorOptions, VlmOptions
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
    v, p, t = options.vision, options.projector, options.llm
    positions = v.num_positions * num_images
    q_size, kv_size = t.num_heads * t.head_dim, t.num_groups * t.head_dim

    def unit(name: str, weights: int, tokens: float, kept: float, attention: float = 0.0, rest: int = 0) -> Unit:
        """weights: values multiplied with every token; rest: parameters beside them; kept: values per token."""
        return Unit(name, 2 * weights * tokens + attention, weights + rest, int(kept * tokens * bytes_per_value))

    patch = 3 * v.patch_size**2 * v.hidden_size
    embed_rest = v.num_positions * v.hidden_size + v.hidden_size * (
        v.has_class_token + v.has_patch_bias + 2 * v.has_pre_norm
    )
    vision_layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.ffn_size
    visual_tokens = options.tokens_per_image * num_images
    out = [unit("vision.embed", patch, v.num_patches * num_images, 3 * v.hidden_size, rest=embed_rest)]
    out += [
        unit(
            f"vision.layer.{i}",
            vision_layer,
            positions,
            8 * v.hidden_size + 2 * v.ffn_size,
            attention=4.0 * positions * v.num_positions * v.hidden_size,
            rest=9 * v.hidden_size + v.ffn_size + 2 * v.hidden_size * (v.has_post_norm and i == v.num_layers - 1),
        )
        for i in range(v.num_layers)
    ]
    if p.kind == "abstractor":
        out.append(_abstractor(p, v.num_features, num_images, bytes_per_value))
    elif p.num_queries:
        out.append(_resampler(p, v.num_features, num_images, bytes_per_value))
    else:
        weights = p.in_size * p.out_size + (p.num_linears - 1) * p.out_size**2
        kept = p.in_size + 2 * (p.num_linears - 1) * p.out_size
        out.append(unit("projector", weights, visual_tokens, kept, rest=p.num_linears * p.out_size))
    vocabulary = t.padded_vocab_size * t.hidden_size
    out.append(Unit("llm.embed", 0.0, vocabulary, int(t.hidden_size * num_tokens * bytes_per_value)))
    attention_weights = t.hidden_size * (2 * q_size + 2 * kv_size * t.num_ways)
    # Twice the positions that a query sees on average: half of all, fewer within a window.
    reach = min(seq_length, t.window or seq_length)
    seen = reach * (2 - reach / seq_length)
    fc1_size = t.ffn_size * (1 + t.is_gated)
    num_norms = (2 - t.has_parallel_residual) * t.num_ways
    rest = num_norms * t.hidden_size * (1 + (t.norm == "LayerNorm")) + (q_size + 2 * kv_size) * t.has_qkv_bias
    rest += (2 * t.hidden_size + fc1_size) * t.has_bias
    out += [
        unit(
            f"llm.layer.{i}",
            attention_weights + t.hidden_size * (fc1_size + t.ffn_size),
            num_tokens,
            4 * t.hidden_size + 2 * q_size + 2 * kv_size + fc1_size + t.ffn_size,
            attention=2.0 * num_tokens * seen * q_size,
            rest=rest,
        )
        for i in range(t.num_layers)
    ]
    if t.is_modality_adaptive:
        out = [replace(u, guests=(f"{u.name}.{VISUAL}",)) if u.name.startswith("llm.layer.") else u for u in out]
    if t.hyper is not None:
        # Every token sees all pictures of its own sequence, which mostly come first.
        image_kv, seen_pairs = 2 * kv_size * t.hidden_size, visual_tokens * seq_length
        gate = t.head_dim * (t.head_dim + 1) if t.hyper.kind == "gated" else 0
        for i, plain in enumerate(out):
            if options.reads_features(plain.name):
                out[i] = replace(
                    plain,
                    flops=plain.flops + 2.0 * image_kv * visual_tokens + 4.0 * seen_pairs * q_size,
                    parameters=plain.parameters + image_kv + 2 * kv_size + gate,
                    activation_bytes=plain.activation_bytes
                    + int((t.hidden_size + 2 * kv_size) * visual_tokens * bytes_per_value),
                    guests=(f"{plain.name}.{VISUAL}",),
                )
    # The logits are kept in float32, and once more as softmax.
    head_kept = t.hidden_size + 8 / bytes_per_value * t.padded_vocab_size
    head_norm = t.hidden_size * (1 + (t.norm == "LayerNorm"))
    own = head_norm + t.padded_vocab_size * t.has_head_bias + vocabulary * (not t.has_tied_embeddings)
    out.append(Unit("llm.head", 2 * vocabulary * num_tokens, own, int(head_kept * num_tokens * bytes_per_value)))
    if not options.has_visual_words:
        return out
    # vm_head, and the llm's head or embedding beside it, for every visual token. One copy of the weight counts.
    home = "llm.embed" if options.has_pseudo_features else "llm.head"
    flops = 4.0 * vocabulary * visual_tokens
    return [
        replace(u, flops=u.flops + flops, parameters=u.parameters + vocabulary * (u.name == home), guests=("words",))
        if options.reads_words(u.name)
        else u
        for u in out
    ]


def _abstractor(p: ProjectorOptions, num_features: int, num_images: float, bytes_per_value: int) -> Unit:
    a, f, queries, keys = p.in_size, p.ffn_size, p.num_queries, p.num_queries + num_features
    layer_flops = 2 * (2 * a * a * (queries + keys) + 3 * a * f * queries) + 4 * queries * keys * a
    layer_parameters = 4 * a * a + 3 * a * f + 11 * a + 4 * f
    kept = p.num_layers * (4 * a * keys + (6 * a + 4 * f) * queries)
    return Unit(
        "projector",
        num_images * (p.num_layers * layer_flops + 2 * queries * a * p.out_size),
        p.num_layers * layer_parameters + queries * a + a * p.out_size + 2 * p.out_size,
        int(kept * num_images * bytes_per_value),
    )


def _resampler(p: ProjectorOptions, num_features: int, num_images: float, bytes_per_value: int) -> Unit:
    d, f, inner, queries = p.hidden_size, p.ffn_size, p.num_heads * p.head_dim, p.num_queries
    is_perceiver = p.kind == "perceiver"
    width, keys = (d, num_features + queries) if is_perceiver else (p.in_size, num_features)
    outside = p.in_size * d if is_perceiver else d * p.out_size
    layer_flops = 2 * (2 * d * inner + 2 * d * f) * queries + 4 * width * inner * keys + 4 * queries * keys * inner
    layer_parameters = 2 * d * inner + 2 * width * inner + 2 * d * f + 2 * (2 * d + width)
    kept = p.num_layers * ((width + 2 * inner) * keys + (4 * d + 2 * inner + 2 * f) * queries)
    return Unit(
        "projector",
        num_images * (p.num_layers * layer_flops + 2 * outside * (num_features if is_perceiver else queries)),
        p.num_layers * layer_parameters + queries * d + outside + 2 * d + d * is_perceiver,
        int(kept * num_images * bytes_per_value),
    )
