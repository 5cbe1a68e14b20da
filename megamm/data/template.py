"""Conversation formats, as data: five strings each, and flags. A new format is a new row of TEMPLATES, never new code.

Strings, names and what carries loss: `conversation.py` and `train.py` of LLaVA, TinyLLaVA, Imp and VW-LMM, mPLUG-Owl2;
mPLUG-Owl3's released processor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamm.data.faults import SampleFault
from megamm.errors import DataError

if TYPE_CHECKING:  # the import of transformers takes a second, and the loader needs no tokenizer
    from megamm.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """`first` question `reply` [`lead` answer `end`] `later` question `reply` [`lead` answer `end`]; [] has loss."""

    first: str
    """In front of the first question, the system text included."""
    later: str
    """In front of every later question."""
    reply: str
    """Between question and answer; a prompt for generation ends with it."""
    lead: str
    """What the answer's first token may swallow: a space, where the format has one there."""
    end: str
    """Behind the answer. Without white space around it, `num_end_tokens` tokens of the vocabulary."""
    num_end_tokens: int = 1
    keeps_markers: bool = False
    """Whether markers stay where a question has them, any number, and none is in an answer. Otherwise those of a turn
    become one in front, as LLaVA does."""
    splits_answers: bool = False
    """Whether `lead` answer `end` is tokenised by itself, so that no token spans the answer's beginning."""
    caption_only: bool = False
    """Of the question only the marker is kept, and there is exactly one round with one picture."""

    def render(self, rounds: list[tuple[str, str]], marker: str) -> tuple[str, list[tuple[int, int]]]:
        """Text of the (question, answer) rounds and the character ranges in it that carry loss.

        Raises SampleFault (bad_roles, marker_count) for rounds that a caption format cannot hold.
        """
        if self.caption_only:
            if len(rounds) != 1:
                raise SampleFault("bad_roles", f"this template takes one caption, found {len(rounds)} rounds")
            if rounds[0][0].count(marker) != 1:
                raise SampleFault("marker_count", "this template takes exactly one picture, in the question")
            rounds = [(marker, rounds[0][1])]
        text, ranges = "", []
        for i, (question, answer) in enumerate(rounds):
            text += (self.later if i else self.first) + question + self.reply
            start = len(text)
            text += self.lead + answer + self.end
            ranges.append((start, len(text)))
        return text, ranges

    def jinja(self, marker: str) -> str:
        """This format for transformers' `apply_chat_template`: messages whose contents are lists of image and text
        items; each image becomes `marker` and a line break in front of the text."""
        first, later, reply, lead, end = map(json.dumps, (self.first, self.later, self.reply, self.lead, self.end))
        return (
            "{%- for message in messages -%}"
            "{%- if message.role == 'user' -%}"
            f"{{{{ {first} if loop.first else {later} }}}}"
            "{%- for item in message.content if item.type == 'image' -%}{{ '" + marker + "\\n' }}{%- endfor -%}"
            "{%- for item in message.content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}"
            f"{{{{ {reply} }}}}"
            "{%- else -%}"
            f"{{{{ {lead} }}}}"
            "{%- for item in message.content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}"
            f"{{{{ {end} }}}}"
            "{%- endif -%}"
            "{%- endfor -%}"
        )

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise DataError where `end` is more tokens than it should be: the model would then learn to spell it and
        never stop."""
        end = self.end.strip()
        ids = tokenizer.encode(end, bos=False)
        if end and len(ids) != self.num_end_tokens:
            raise DataError(
                f"tokenizer: {end!r}, which ends every answer of this template, is {len(ids)} tokens in "
                f"{tokenizer.name}; choose the template made for this tokenizer, or add {end!r} to its special tokens"
            )


_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN = _USER.replace("user", "human")
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _vicuna(system: str, end: str) -> Template:
    return Template(first=f"{system} USER: ", later="USER: ", reply=" ASSISTANT:", lead=" ", end=end)


_V1 = _vicuna(_USER, "</s>")
_PHI = _vicuna(_USER, "<|endoftext|>")
_PLAIN = Template(first="", later="", reply="", lead="", end="\n", caption_only=True)

TEMPLATES: dict[str, Template] = {
    "v1": _V1,
    "vicuna_v1": _V1,
    "llava_v1": _vicuna(_HUMAN, "</s>"),
    "plain": _PLAIN,
    "mplug_owl2": Template(first="USER: ", later="USER: ", reply=" ASSISTANT:", lead=" ", end="</s>"),
    "llava_llama_2": Template(
        first=f"[INST] <<SYS>>\n{_LLAMA_2}\n<</SYS>>\n\n", later="<s>[INST] ", reply=" [/INST]", lead=" ", end=" </s>"
    ),
    "mistral_instruct": Template(first="[INST] ", later="[INST] ", reply=" [/INST]", lead=" ", end=" </s>"),
    "mistral": Template(first="[INST] ", later="[INST] ", reply=" [/INST]", lead="", end="</s>"),
    "phi": _PHI,
    "phi2": _V1,  # Imp gives Phi-2 an end token spelt </s>
    "qwen2": Template(
        first=f"<|im_start|>system\n{_USER}<|im_end|>\n<|im_start|>user\n",
        later="\n<|im_start|>user\n",
        reply="<|im_end|>\n<|im_start|>assistant\n",
        lead="",
        end="<|im_end|>",
    ),
    "phi3": Template(
        first=f"<|system|>\n{_USER}<|end|>\n<|user|>\n",
        later="\n<|user|>\n",
        reply="<|end|>\n<|assistant|>\n",
        lead="",
        end="<|end|>",
    ),
    # TinyLLaVA_Factory's names; its `phi` is the one above.
    "pretrain": _PLAIN,
    "llama": _V1,
    "gemma": _vicuna(_USER, "<eos>"),
    "qwen2_base": _PHI,
    "qwen2_instruct": _vicuna(_USER, "<|im_end|>"),
    # mPLUG-Owl3's processor: an empty system turn, line breaks in front of turns, two end tokens behind each answer.
    "mplug_owl3": Template(
        first="<|im_start|>system\n<|im_end|>\n<|im_start|>user\n",
        later="\n<|im_start|>user\n",
        reply="<|im_end|>\n<|im_start|>assistant\n",
        lead="",
        end="<|im_end|><|endoftext|>",
        num_end_tokens=2,
        keeps_markers=True,
        splits_answers=True,
    ),
    # Nobody published how its pretraining writes a caption: its `plain` style drops all markup.
    "mplug_owl3_plain": Template(
        first="", later="", reply="", lead="", end="<|endoftext|>", splits_answers=True, caption_only=True
    ),
}
"""Name -> format. `v1` says *user* and `llava_v1` says *human*: both are published, and they are not the same."""


def template(name: str) -> Template:
    """The format of that name. Raises DataError with the names there are."""
    if name not in TEMPLATES:
        raise DataError(f"template: unknown name {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
