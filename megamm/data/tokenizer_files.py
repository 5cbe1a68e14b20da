"""Which files of a directory are its tokenizer, and their hash. Loads none of them: data/tokenizer.py does, and its
import of transformers takes seconds."""

import hashlib
from pathlib import Path

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
"""Files that hold a vocabulary; the first one found names the tokenizer in a dataset's PREFIX.json."""

SETTINGS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
"""Files that change how a vocabulary is used."""


def tokenizer_hash(directory: Path) -> str | None:
    """sha256 over names and contents of the tokenizer's files in `directory`; None where it holds no vocabulary."""
    if not any((directory / name).is_file() for name in FILES):
        return None
    digest = hashlib.sha256()
    for name in sorted(FILES + SETTINGS):
        if (directory / name).is_file():
            content = (directory / name).read_bytes()
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
