"""Every command of a user's page is one that its script takes."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[2]


def commands(page):
    """Name of the script and words behind it, of every indented command that runs one of data_tools."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    (.*data_tools/\w+\.py .*)$", text, flags=re.MULTILINE):
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.startswith("data_tools/"))
        yield Path(words[at]).stem, words[at + 1 :]


@pytest.mark.parametrize(("page", "scripts"), [("docs/data.md", 6), ("README.md", 5)])
def test_commands_parse(page, scripts, load_script):
    found = list(commands(page))
    assert len(found) == scripts
    for name, words in found:
        tyro.cli(load_script(name).Options, args=words)
