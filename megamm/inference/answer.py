"""A Hugging Face directory, questions and pictures in; greedy answers out. For models that no stock library runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megamm import backend
from megamm.batch import Sample
from megamm.config.schema import Data, Parallel
from megamm.data.image import decode, to_pixels
from megamm.data.template import template
from megamm.data.text import expand, tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.inference.greedy import greedy
from megamm.models.build import build_stages, units
from megamm.models.parameters import fill
from megamm.models.spec import Build
from megamm.parallel import groups
from megamm.parallel.placement import choose_layout
from megamm.registry import family
from megamm.training.setup import image_format
from megamm.weights.convert import open_hf


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, with one marker per picture in it."""

    text: str
    images: Sequence[bytes] = ()
    """Compressed pictures, in the order of the markers."""


class Answerer:
    """A model of `family` in this process, from a Hugging Face directory in any dialect that megamm imports."""

    def __init__(self, hf_dir: str | Path, family_name: str, template_name: str | None = None):
        """template_name: default the family's for sft. Raises CheckpointError and DataError for what does not fit."""
        self._family = family(family_name)
        checkpoint = open_hf(hf_dir, None, [self._family])
        self._options = options = checkpoint.options
        self._tokenizer = load_tokenizer(hf_dir)
        self._template = template(template_name or self._family.template)
        self._format = image_format(options, Data(path=""))
        placeholder = self._family.placeholder
        self._placeholder = None if placeholder is None else self._tokenizer.encode(placeholder, bos=False)
        backend.start("auto")
        groups.start_distributed()
        layout = choose_layout(Parallel(), units(options, num_tokens=1, num_images=1, seq_length=1))
        groups.start(Parallel(), layout)
        self._stages = build_stages(options, Build(layout=layout), checkpoint.table)
        fill(self._stages, checkpoint.table, lambda entry: checkpoint.load(entry.name))
        for stage in self._stages:
            stage.eval()

    def __call__(self, questions: Sequence[Question], max_new_tokens: int, batch_size: int) -> Iterator[str]:
        """The answer to each question, which is a conversation of its own; ends where the template's end begins."""
        end_id = self._tokenizer.encode(self._template.end.strip(), bos=False)[0]
        for first in range(0, len(questions), batch_size):
            answers = greedy(
                self._stages,
                [self._prompt(question) for question in questions[first : first + batch_size]],
                max_new_tokens,
                tokens_per_image=self._options.tokens_per_image,
                image_size=self._options.vision.image_size,
                eos_id=end_id,
            )
            yield from (self._tokenizer.decode(ids).strip() for ids in answers)

    def _prompt(self, question: Question) -> Sample:
        turns = [("human", question.text), ("gpt", "?")]  # everything in front of an answer is the prompt
        ids, spans = tokenise(turns, len(question.images), self._template, self._tokenizer, self._family.marker)
        no_spans = np.empty((0, 2), dtype=np.int32)
        max_tokens = self._options.llm.max_positions
        tokens = self._options.tokens_per_image
        ids, labels, starts = expand(ids[: spans[0, 0]], no_spans, tokens, max_tokens, self._placeholder)
        pixels = [to_pixels(decode(image), self._format) for image in question.images]
        size = self._format.size
        return Sample(
            ids_S=torch.from_numpy(ids),
            labels_S=torch.from_numpy(labels),
            pixels_I3HW=torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8),
            num_images=len(starts),
            starts_I=torch.from_numpy(starts),
        )
