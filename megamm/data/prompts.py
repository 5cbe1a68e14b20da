"""Formatting prompts: what the authors put behind a question to say how its answer must look."""

import re

from megamm.data.text import Turn
from megamm.errors import DataError

_LETTER = "Answer with the option{}s letter from the given choices directly."

STYLES: dict[str, str] = {
    "none": "",
    "short_answer": "Answer the question using a single word or phrase.",
    "multiple_choice": _LETTER.format("'"),
    "multiple_choice_owl": _LETTER.format("\N{RIGHT SINGLE QUOTATION MARK}"),
}
"""Name -> prompt, on a line of its own behind the question. LLaVA-1.5 (arXiv 2310.03744) and all that follow it;
mPLUG-Owl2 and mPLUG-Owl3 spell the apostrophe as a quotation mark."""

SHORT_ANSWER_WORDS = 5
"""An answer of at most as many words, on one line and without a full stop, is a word or a phrase."""

_CHOICE = re.compile(r"^\s*\(?([A-Z])[.):]\s*\S", re.MULTILINE)
_CHOSEN = re.compile(r"\(?[A-Z][.)]?")


def check_style(name: str) -> None:
    """Raise DataError for an unknown name."""
    if name not in STYLES:
        raise DataError(f"--prompt-style: unknown {name!r}; choose one of {', '.join(STYLES)}")


def with_prompt(turns: list[Turn], style: str) -> list[Turn]:
    """Turns with the prompt behind every question of its kind that does not end with it yet: for `short_answer` those
    whose answer is a word or phrase, for `multiple_choice` those with lines `A. ...`, `B. ...` and a letter as answer.
    """
    prompt = STYLES[style]
    if not prompt:
        return turns
    fits = _is_short if style == "short_answer" else _is_choice
    prompted = list(turns)
    for i, ((role, question), (_, answer)) in enumerate(zip(turns, turns[1:], strict=False)):
        if role == "human" and fits(question, answer) and not question.rstrip().endswith(prompt):
            prompted[i] = (role, f"{question.rstrip()}\n{prompt}")
    return prompted


def _is_short(question: str, answer: str) -> bool:
    answer = answer.strip()
    is_phrase = 0 < len(answer.split()) <= SHORT_ANSWER_WORDS and "\n" not in answer and not answer.endswith(".")
    return is_phrase and not _is_choice(question, answer)


def _is_choice(question: str, answer: str) -> bool:
    return {"A", "B"} <= set(_CHOICE.findall(question)) and bool(_CHOSEN.fullmatch(answer.strip()))
