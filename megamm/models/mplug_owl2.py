"""mPLUG-Owl2: a ViT of its own, visual abstractor, Llama whose layers treat visual tokens in a way of their own.

Published in the spelling of the authors' code only. Its Qwen flavour, Owl2.1 (model_type mplug_owl2_1), is another
model. Source: arXiv 2311.04257 and the authors' mplug_owl2/model.
"""

from dataclasses import replace
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import Family, overlay
from megamm.models.llm import llama
from megamm.models.native import CARRIED
from megamm.models.options import LlmOptions, ProjectorOptions, VisionOptions, VlmOptions
from megamm.models.parts import Parts, vision_config
from megamm.models.projector import abstractor
from megamm.models.vision import clip, owl_vit
from megamm.weights.keymap import Dims, Keep, KeyMap, Row

MODEL_TYPE = "mplug_owl2"
ABSTRACTOR_DEFAULTS: dict[str, Any] = {
    # What the authors' MplugOwlVisualAbstractorConfig assumes for a field that config.json leaves out.
    "num_learnable_queries": 64,
    "hidden_size": 1024,
    "encoder_hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
    "layer_norm_eps": 1e-6,
    "grid_size": 32,
    "use_cls_token": True,
    "add_v2t_pos_emb": False,
}
_ABSTRACTOR_TYPE = "mplug_owl_visual_abstract"


def read(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> VlmOptions:
    """config.json -> options. Nobody publishes a tower apart; of that of a start only the size of pictures must fit."""
    if (found := config.get("model_type")) != MODEL_TYPE:
        note = ": Owl2.1, the Qwen flavour, is not supported" if found == "mplug_owl2_1" else ""
        raise CheckpointError(f"config.json: model_type {found!r} is not {MODEL_TYPE!r}{note}")
    if not {"visual_model", "visual_abstractor"} <= (visual := config.get("visual_config", {})).keys():
        raise CheckpointError("config.json: visual_config lacks visual_model or visual_abstractor")
    vision = owl_vit.from_hf(visual["visual_model"], feature_layer=-1, keep_first_token=True)
    llm = llama.from_hf(config)
    if (llm.num_groups, llm.num_heads * llm.head_dim) != (llm.num_heads, llm.hidden_size):
        raise CheckpointError(
            f"config.json: mPLUG-Owl2 has as many key/value heads as heads, together as wide as the model, not "
            f"{llm.num_groups} of {llm.num_heads}, {llm.head_dim} wide, in {llm.hidden_size}"
        )
    if tower_config is not None and (size := vision_config(tower_config).get("image_size")) != vision.image_size:
        raise CheckpointError(
            f"the tower is made for pictures of {size} pixels, the model of config.json for {vision.image_size}; "
            "give a tower of that size, or import with --image-size"
        )
    return VlmOptions(
        family="mplug_owl2",
        vision=vision,
        projector=_abstractor_from_hf(visual["visual_abstractor"], vision, llm),
        llm=replace(llm, is_modality_adaptive=True),
        image=owl_vit.IMAGE,
        image_token_id=None,
        tokens_per_image=visual["visual_abstractor"].get("num_learnable_queries", 64) + 1,
        hf=config,
    )


def _abstractor_from_hf(config: dict[str, Any], vision: VisionOptions, llm: LlmOptions) -> ProjectorOptions:
    fields = {**ABSTRACTOR_DEFAULTS, **config}
    legal = {
        "hidden_size": vision.hidden_size,
        "encoder_hidden_size": vision.hidden_size,
        "grid_size": vision.image_size // vision.patch_size,
        "use_cls_token": True,
        "add_v2t_pos_emb": False,
    }
    for name, only in legal.items():
        if fields[name] != only:
            raise CheckpointError(
                f"config.json: visual_abstractor: {name} is {fields[name]!r}, and with this visual_model it must be "
                f"{only!r}"
            )
    return ProjectorOptions(
        kind="abstractor",
        in_size=vision.hidden_size,
        out_size=llm.hidden_size,
        num_queries=fields["num_learnable_queries"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        ffn_size=fields["intermediate_size"],
        inner_norm_eps=fields["layer_norm_eps"],
    )


def write(options: VlmOptions, dialect: str) -> tuple[dict[str, Any], None]:
    """Options -> config.json, written over the one they came from."""
    source, p = options.hf, options.projector
    visual = source.get("visual_config", {})
    known = {
        "model_type": _ABSTRACTOR_TYPE,
        "num_learnable_queries": p.num_queries,
        "hidden_size": p.in_size,
        "encoder_hidden_size": p.in_size,
        "num_hidden_layers": p.num_layers,
        "num_attention_heads": p.num_heads,
        "intermediate_size": p.ffn_size,
        "layer_norm_eps": p.inner_norm_eps,
        "grid_size": options.vision.image_size // options.vision.patch_size,
        "use_cls_token": True,
        "add_v2t_pos_emb": False,
    }
    defaults = {**ABSTRACTOR_DEFAULTS, "model_type": _ABSTRACTOR_TYPE}
    out = llama.to_hf(options.llm, source) | {"model_type": MODEL_TYPE}
    out["visual_config"] = {
        **visual,
        "visual_model": owl_vit.to_hf(options.vision, visual.get("visual_model", {})),
        "visual_abstractor": overlay(visual.get("visual_abstractor", {}), known, defaults),
    }
    return out if source else out | {"architectures": ["MPLUGOwl2LlamaForCausalLM"]}, None


def compose(llm_hf: dict[str, Any], tower_hf: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model made of a plain Llama and a plain CLIP tower, its abstractor in the published proportions.
    Pictures have the size that the tower was made for."""
    parts = Parts(llms=(llama,), visions=(clip,))
    llm = parts.llm_options(llm_hf, "the llm's config.json")
    tower = parts.vision_options(tower_hf, -1, keep_first_token=True)
    vision = replace(tower, norm_eps=owl_vit.DEFAULTS["layer_norm_eps"], has_post_norm=True)
    visual = {
        "hidden_size": vision.hidden_size,
        "encoder_hidden_size": vision.hidden_size,
        "grid_size": vision.image_size // vision.patch_size,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": 11 * vision.hidden_size // 4,
    }
    options = VlmOptions(
        family="mplug_owl2",
        vision=vision,
        projector=_abstractor_from_hf(visual, vision, llm),
        llm=llm,
        image=owl_vit.IMAGE,
        image_token_id=None,
        tokens_per_image=ABSTRACTOR_DEFAULTS["num_learnable_queries"] + 1,
    )
    return write(options, "original")[0] | {key: llm_hf[key] for key in CARRIED if key in llm_hf}


def resized(config: dict[str, Any], image_size: int) -> dict[str, Any]:
    """config.json for pictures of another size. CheckpointError: the tower's patches do not fill it."""
    vision, visual = read(config).vision, config["visual_config"]
    if image_size < vision.patch_size or image_size % vision.patch_size:
        raise CheckpointError(
            f"--image-size {image_size} is no multiple of {vision.patch_size}, the side of the tower's patches"
        )
    model = visual["visual_model"] | {"image_size": image_size}
    grid = {"grid_size": image_size // vision.patch_size}
    return config | {
        "visual_config": visual | {"visual_model": model, "visual_abstractor": visual["visual_abstractor"] | grid}
    }


def keys(options: VlmOptions) -> KeyMap:
    """The table of the published files; the position tables and `inv_freq`, which a state_dict has, may be there."""
    return (
        owl_vit.keys(options.vision).renamed(ours="vision.", hf={"": "model.vision_model."})
        + abstractor.keys(options.projector).renamed(ours="projector.", hf={"": "model.visual_abstractor."})
        + _llm_keys(options.llm, ".multiway.0").renamed(ours="llm.")
    )


def start_keys(options: VlmOptions) -> KeyMap:
    """The table of a plain CLIP tower and a plain Llama, whose norms, keys and values are those of the text way."""
    return (
        owl_vit.start_keys(options.vision).renamed(ours="vision.", hf={"": "vision_tower.vision_model."})
        + abstractor.keys(options.projector).renamed(ours="projector.", hf={"": "model.visual_abstractor."})
        + _llm_keys(options.llm, "").renamed(ours="llm.")
    )


def duplicated(options: VlmOptions) -> dict[str, str]:
    """At a start the visual way begins as a copy of the text way. Canonical names, the visual way's first."""
    names = ("input_layernorm.{}.weight", "self_attention.linear_kv.{}.weight", "pre_mlp_layernorm.{}.weight")
    layers = (f"llm.decoder.layers.{i}." for i in range(options.llm.num_layers))
    return {layer + name.format(1): layer + name.format(0) for layer in layers for name in names}


def _llm_keys(options: LlmOptions, text: str) -> KeyMap:
    """`text`: what stands behind the name of a module that there are two of, in the one that text goes through."""
    vocab, h, f = options.padded_vocab_size, options.hidden_size, options.ffn_size
    layer, ours = "model.layers.{i}.", "decoder.layers.{i}."
    attention, our_attention = f"{layer}self_attn.", f"{ours}self_attention."
    rows: list[Row | Keep] = [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (vocab, h), tp="vocab"),
        Row(f"{our_attention}linear_q.weight", (f"{attention}q_proj.weight",), (h, h), tp="col"),
        Row(f"{our_attention}linear_proj.weight", (f"{attention}o_proj.weight",), (h, h), tp="row"),
        Row(
            f"{ours}mlp.linear_fc1.weight",
            (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
            (2 * f, h),
            pack="cat2",
            tp="col2",
        ),
        Row(f"{ours}mlp.linear_fc2.weight", (f"{layer}mlp.down_proj.weight",), (h, f), tp="row"),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), (h,)),
        Keep(f"{attention}rotary_emb.inv_freq"),
    ]
    for way, end in enumerate((f"{text}.weight", ".multiway.1.weight")):
        rows += [
            Row(f"{ours}input_layernorm.{way}.weight", (f"{layer}input_layernorm{end}",), (h,)),
            Row(
                f"{our_attention}linear_kv.{way}.weight",
                (f"{attention}k_proj{end}", f"{attention}v_proj{end}"),
                (2 * h, h),
                pack="kv",
                tp="col",
            ),
            Row(f"{ours}pre_mlp_layernorm.{way}.weight", (f"{layer}post_attention_layernorm{end}",), (h,)),
        ]
    if not options.has_tied_embeddings:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), (vocab, h), tp="vocab"))
    return KeyMap(
        rows,
        Dims(
            layers=options.num_layers,
            heads=options.num_heads,
            groups=options.num_groups,
            vocab=options.vocab_size,
            vocab_padded=vocab,
        ),
    )


FAMILY = Family(
    name="mplug_owl2",
    read=read,
    write=write,
    compose=compose,
    keys={"original": keys},
    start_keys=start_keys,
    duplicated=duplicated,
    resized=resized,
    export_dialect="original",
    template="v1",
    marker="<|image|>",
)
