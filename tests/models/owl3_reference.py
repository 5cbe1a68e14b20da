"""mPLUG-Owl3 written down once more, plainly: one sample at a time, dense masks, no megatron. What the golden cases do
not have is compared with this, after it was itself compared with them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    weights: dict[str, Tensor], config: dict, ids: list[int], starts: list[int], pixels: Tensor, generation: str
) -> Tensor:
    """[T, V] of one sample; `starts` is where the placeholder of each picture begins."""
    h, n, g = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    d, length = h // n, len(ids)
    is_gated = generation == "240728"
    images = _project(weights, _tower(weights, config["vision_config"], pixels)) if len(starts) else None
    delay = 1 if is_gated else 0
    x = weights["language_model.model.embed_tokens.weight"][torch.tensor(ids)]
    text_positions = torch.arange(length)
    for i in range(config["num_hidden_layers"]):
        at = f"language_model.model.layers.{i}."

        def linear(x: Tensor, name: str, at: str = at) -> Tensor:
            return F.linear(x, weights[f"{at}{name}.weight"], weights.get(f"{at}{name}.bias"))

        def norm(x: Tensor, name: str) -> Tensor:
            return weights[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])

        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (linear(y, f"self_attn.{name}_proj").view(length, -1, d).transpose(0, 1) for name in "qkv")
        q, k = (_rotate(z, text_positions, config["rope_theta"]) for z in (q, k))
        k, v = (z.repeat_interleave(n // g, dim=0) for z in (k, v))
        causal = text_positions[None, :] <= text_positions[:, None]
        if i + 1 not in config["hyper_layers"] or images is None:
            context = _attend(q, k, v, causal)
        else:
            kv = linear(norm(images, at + "input_layernorm.weight"), "self_attn.v_kv_proj")
            patches = kv.size(1)
            kv = kv.view(-1, patches, g, 2, d)
            first = torch.tensor(starts) + delay
            positions = first.repeat_interleave(patches)
            ki, vi = (kv[:, :, :, j].flatten(0, 1).transpose(0, 1) for j in range(2))
            ki = _rotate(ki, positions, config["rope_theta"])
            ki, vi = (z.repeat_interleave(n // g, dim=0) for z in (ki, vi))
            sees = positions[None, :] <= text_positions[:, None]
            if is_gated:
                own = _attend(q, k, v, causal)
                context = own.clone()
                rows = sees.any(dim=1)
                seen = _attend(q[:, rows], ki, vi, sees[rows])
                gate = torch.sigmoid(linear(own[:, rows], "self_attn.gate_proj.0"))
                context[:, rows] = own[:, rows] * (1 - gate) + seen * gate
            else:
                keys, values = torch.cat([ki, k], dim=1), torch.cat([vi, v], dim=1)
                context = _attend(q, keys, values, torch.cat([sees, causal], dim=1))
        x = x + linear(context.transpose(0, 1).flatten(1), "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm.weight")
        x = x + linear(F.silu(linear(y, "mlp.gate_proj")) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    x = norm(x, "language_model.model.norm.weight")
    head = weights.get("language_model.lm_head.weight", weights["language_model.model.embed_tokens.weight"])
    return x @ head.T


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(1, 2)) / q.size(-1) ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def _rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    d = x.size(-1)
    angles = positions[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    angles = torch.cat([angles, angles], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _project(weights: dict[str, Tensor], features: Tensor) -> Tensor:
    if "vision2text_model.weight" in weights:
        return F.linear(features, weights["vision2text_model.weight"], weights["vision2text_model.bias"])
    hidden = F.gelu(F.linear(features, weights["vision2text_model.0.weight"], weights["vision2text_model.0.bias"]))
    return F.linear(hidden, weights["vision2text_model.2.weight"], weights["vision2text_model.2.bias"])


def _tower(weights: dict[str, Tensor], config: dict, pixels: Tensor) -> Tensor:
    h, n = config["hidden_size"], config["num_attention_heads"]
    of = "vision_model.embeddings."
    patch = weights[of + "patch_embedding.weight"], weights[of + "patch_embedding.bias"]
    x = F.conv2d(pixels, *patch, stride=config["patch_size"]).flatten(2).transpose(1, 2)
    x = x + weights[of + "position_embedding.weight"]
    for i in range(config["num_hidden_layers"] - 1):
        at = f"vision_model.encoder.layers.{i}."

        def linear(x: Tensor, name: str, at: str = at) -> Tensor:
            return F.linear(x, weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"])

        def norm(x: Tensor, name: str, at: str = at) -> Tensor:
            return F.layer_norm(x, (h,), weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"], 1e-6)

        y = norm(x, "layer_norm1")
        q, k, v = (linear(y, f"self_attn.{z}_proj").unflatten(-1, (n, -1)).transpose(1, 2) for z in "qkv")
        y = (q @ k.transpose(2, 3) / (h // n) ** 0.5).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), "self_attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, "layer_norm2"), "mlp.fc1"), approximate="tanh"), "mlp.fc2")
    return x
