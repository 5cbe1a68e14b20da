"""An export as stock software wants it: in transformers' own spelling with the processor and chat template beside it.

The weights are weights/convert.py's business, in every spelling; here is only what the spelling `hf` of the LLaVA line
needs around them. Source: transformers' LlavaProcessor, LlavaImageProcessor.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from megamm.config.load import load_recipe
from megamm.data.template import template
from megamm.data.tokenizer_files import tokenizer_hash
from megamm.models import native
from megamm.models.options import VlmOptions
from megamm.registry import family
from megamm.weights.convert import export_hf
from megamm.weights.directory import HF_FILES, CheckpointInfo, find_checkpoint, read_info
from megamm.weights.hf import CONFIG, read_json, write_json

PROCESSOR, IMAGE_PROCESSOR, CHAT = "processor_config.json", "preprocessor_config.json", "chat_template.jinja"
RECIPE = "recipe.json"


def export(
    checkpoint_dir: str | Path, output: str | Path, dialect: str | None = None, template_name: str | None = None
) -> str:
    """Export a megamm checkpoint; returns its dialect. Errors as `weights.convert.export_hf`.

    An `hf` export of a LLaVA-like model that comes with a tokenizer, and not with a processor of its own, gets one, a
    chat template of that name (default: the family's) and, where the tokenizer has none, a token for the image: the
    first id behind its own. Where the vocabulary ends before it, it grows by rows that are the mean of the others.
    """
    found = find_checkpoint(checkpoint_dir)
    info = read_info(found)
    own = family(info.family)
    files = found / HF_FILES
    options, dialect = own.read(info.hf_config, info.tower_config), dialect or info.dialect
    is_ready = (files / PROCESSOR).exists() or tokenizer_hash(files) is None
    if dialect != "hf" or is_ready or not native.is_native(own.write(options, dialect)[0]):
        return export_hf(found, own, output, dialect)
    from megamm.data.tokenizer import add_token, load_tokenizer  # imports transformers, which takes seconds

    form = template(template_name or own.template)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / HF_FILES
        shutil.copytree(files, tokens)
        image_id = add_token(tokens, own.marker)
        more = max(0, load_tokenizer(tokens).vocab_size - options.llm.vocab_size)

        def finish(directory: Path) -> None:
            """Complete what `export_hf` wrote, before it gets its name."""
            shutil.copytree(tokens, directory, dirs_exist_ok=True)
            config = read_json(directory / CONFIG)
            config["image_token_id" if "image_token_id" in config else "image_token_index"] = image_id
            config["text_config"]["vocab_size"] = options.llm.vocab_size + more
            write_json(directory / CONFIG, config)
            for name, content in processor(options, own.marker, _pads(found, info)).items():
                write_json(directory / name, content)
            (directory / CHAT).write_text(form.jinja(own.marker), encoding="utf-8")

        return export_hf(found, own, output, dialect, more_vocab=more, finish=finish)


def processor(options: VlmOptions, marker: str, pads: bool) -> dict[str, dict[str, Any]]:
    """File name -> content of the processor that prepares pictures as training did. `pads`: to a square first."""
    vision, image = options.vision, options.image
    square = {"height": vision.image_size, "width": vision.image_size}
    crops = image.resize == "shortest_edge_crop"
    return {
        IMAGE_PROCESSOR: {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_pad": pads,
            "do_resize": True,
            "size": {"shortest_edge": vision.image_size} if crops else square,
            "resample": 3,  # bicubic
            "do_center_crop": crops,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(image.mean),
            "image_std": list(image.std),
        },
        PROCESSOR: {
            "processor_class": "LlavaProcessor",
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "full" if vision.keep_first_token else "default",
            "num_additional_image_tokens": int(vision.has_class_token),
            "image_token": marker,
        },
    }


def _pads(found: Path, info: CheckpointInfo) -> bool:
    """Whether pictures were padded to a square: as the run did, or before any as the release says."""
    if (found / RECIPE).exists():
        return load_recipe(found / RECIPE).data.aspect == "pad"
    return info.hf_config.get("image_aspect_ratio") == "pad"
