"""What stock transformers needs beside a model in its own LLaVA spelling: processor, chat template, and a token that
stands for a visual token. Written into an export; nothing here runs a model."""

import json
from pathlib import Path
from typing import Any

from megamm.data.template import Template
from megamm.data.tokenizer import reserve_image_token
from megamm.data.tokenizer_files import tokenizer_hash
from megamm.models.options import ImageOptions, VlmOptions
from megamm.weights.hf import CONFIG, read_config, write_json

PROCESSOR = "processor_config.json"
TOKEN = "<image>"


def write_processor(directory: Path, options: VlmOptions, form: Template) -> str | None:
    """Complete a directory that holds an export in transformers' spelling, tokenizer files included.

    Pictures are padded to a square or not as the release's config.json says (`image_aspect_ratio`). Returns why nothing
    was written: the files are there, or there is no tokenizer to prompt with. DataError: a tokenizer that cannot
    be loaded, or that has no token to spare.
    """
    if (directory / PROCESSOR).exists():
        return "the processor of the imported checkpoint is there"
    if tokenizer_hash(directory) is None:
        return "no processor and chat template: the checkpoint has no tokenizer"
    token, token_id = reserve_image_token(directory, TOKEN, options.llm.vocab_size)
    config = read_config(directory)
    config.pop("image_token_id", None)
    write_json(directory / CONFIG, config | {"image_token_index": token_id})
    aspect = options.hf.get("image_aspect_ratio") or "square"
    image = image_processor(options.image, options.vision.image_size, aspect)
    write_json(directory / "preprocessor_config.json", image | {"processor_class": "LlavaProcessor"})
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": token,
        "patch_size": options.vision.patch_size,
        "num_additional_image_tokens": int(options.vision.has_class_token),
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    write_json(directory / PROCESSOR, processor)
    (directory / "chat_template.jinja").write_text(chat_template(form, token), encoding="utf-8")
    return None


def image_processor(image: ImageOptions, size: int, aspect: str) -> dict[str, Any]:
    """preprocessor_config.json of transformers' LlavaImageProcessor, which pads as LLaVA's expand2square does."""
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": aspect == "pad",
        "do_resize": True,
        "size": square if image.resize == "squash" else {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": image.resize != "squash",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def chat_template(form: Template, token: str) -> str:
    """Jinja for messages whose contents are lists of image and text items, the images first."""
    first, later, reply, lead, end, mark = map(
        json.dumps, (form.first, form.later, form.reply, form.lead, form.end, token + "\n")
    )
    return (
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}"
        f"{{{{ {first} if loop.first else {later} }}}}"
        f"{{%- for item in message.content if item.type == 'image' -%}}{{{{ {mark} }}}}{{%- endfor -%}}"
        "{%- for item in message.content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}"
        f"{{{{ {reply} }}}}"
        "{%- else -%}"
        f"{{{{ {lead} }}}}"
        "{%- for item in message.content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}"
        f"{{{{ {end} }}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
