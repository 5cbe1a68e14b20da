import pytest

from megamm.data.prompts import STYLES, with_prompt

SHORT, LETTER = STYLES["short_answer"], STYLES["multiple_choice"]
CHOICES = "What is it?\nA. a cat\nB. a dog"


def asked(question, answer, style):
    return with_prompt([("human", question), ("gpt", answer)], style)[0][1]


@pytest.mark.parametrize(
    ("question", "answer", "style", "expected"),
    [
        ("Is it red?", "No", "none", "Is it red?"),
        ("Is it red?", "No", "short_answer", f"Is it red?\n{SHORT}"),
        ("Is it red? ", "a red car", "short_answer", f"Is it red?\n{SHORT}"),
        (f"Is it red?\n{SHORT}", "No", "short_answer", f"Is it red?\n{SHORT}"),
        ("Describe it.", "It is a red car.", "short_answer", "Describe it."),
        ("Describe it.", "a red car in front of a house", "short_answer", "Describe it."),
        (CHOICES, "A", "short_answer", CHOICES),
        (CHOICES, "A", "multiple_choice", f"{CHOICES}\n{LETTER}"),
        (CHOICES, "B.", "multiple_choice", f"{CHOICES}\n{LETTER}"),
        (CHOICES, "a cat", "multiple_choice", CHOICES),
        ("A. B. Smith?", "A", "multiple_choice", "A. B. Smith?"),
        ("Q\n(A) a\n(B) b", "A", "multiple_choice_owl", f"Q\n(A) a\n(B) b\n{LETTER.replace(chr(39), chr(8217))}"),
    ],
)
def test_prompt_stands_behind_questions_of_its_kind(question, answer, style, expected):
    assert asked(question, answer, style) == expected


def test_every_round_is_looked_at():
    turns = [("human", "Red?"), ("gpt", "No"), ("human", "Why?"), ("gpt", "Because it was painted green last year.")]
    assert [text for _, text in with_prompt(turns, "short_answer")] == [f"Red?\n{SHORT}", "No", "Why?", turns[3][1]]
