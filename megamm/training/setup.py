"""From a configuration to what a run needs: the model's options, its layout, its sizes. No process group yet."""

import json
from pathlib import Path

from megamm.config.schema import Config
from megamm.data.image import ImageFormat
from megamm.data.indexed import Reader
from megamm.errors import CheckpointError, ConfigError
from megamm.models.build import units
from megamm.models.family import Family
from megamm.models.options import VlmOptions
from megamm.parallel.check import Sizes
from megamm.parallel.placement import Layout, Unit, auto_layout, parse_layout
from megamm.registry import family
from megamm.weights.convert import INFO, CheckpointInfo, find_checkpoint, read_info


def part_sizes(options: VlmOptions) -> dict[str, Sizes]:
    """The sizes that tensor parallelism divides."""
    vision, llm = options.vision, options.llm
    return {
        "vision": Sizes(heads=vision.num_heads, groups=vision.num_heads, ffn=vision.ffn_size),
        "llm": Sizes(heads=llm.num_heads, groups=llm.num_groups, ffn=llm.ffn_size, vocab=llm.padded_vocab_size),
    }
