"""Text <-> ids, with the place of every token in the text. The only file of the data side that imports transformers."""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megamm.data.tokenizer_files import FILES, tokenizer_hash
from megamm.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A tokenizer as stock transformers loads it from a directory: training and stock inference see the same ids."""

    name: str
    """File that holds the vocabulary, such as `tokenizer.model`."""
    hash: str
    """Of its files, by data/tokenizer_files.py."""
    bos_id: int | None
    """None where the vocabulary has no such token."""
    eos_id: int
    pad_id: int
    """The unknown token where there is no padding token, as LLaVA has it; else the end token."""
    adds_bos: bool
    """Whether a text begins with `bos_id`, by the tokenizer's own rule."""
    vocab_size: int
    """Largest id + 1, added tokens included; the model's table may have more rows."""
    _backend: Any = field(repr=False)
    """tokenizers.Tokenizer: several times faster than the transformers wrapper around it, and the same ids."""

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Ids of `text`, special tokens written in it included. `bos`: with `bos_id` in front, where `adds_bos`."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else ids

    def encode_ranges(self, text: str, ranges: Sequence[tuple[int, int]]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Ids int32 [T] without `bos_id`, and for each range of characters (first, last + 1) that of the tokens that
        share a character with it, empty where none does. Ranges may reach beyond the text."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, place = encoding.ids, encoding.token_to_chars
        # Places are searched for, a few for each range: to hand out that of every token takes longer than encoding.
        tokens = range(len(ids))
        found = [
            (
                bisect_right(tokens, start, key=lambda token: place(token)[1]),
                bisect_left(tokens, end, key=lambda token: place(token)[0]),
            )
            for start, end in ranges
        ]
        return np.fromiter(ids, np.int32, len(ids)), found

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens written out."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Tokenizer of a local directory: SentencePiece (`tokenizer.model`) or `tokenizer.json`. Runs no remote code.

    Raises DataError where files or special tokens are missing, or where transformers has only a slow tokenizer for it.
    """
    directory = Path(directory)
    present = [name for name in FILES if (directory / name).is_file()]
    if not present:
        raise DataError(f"{directory}: holds no tokenizer; give a directory with one of {', '.join(FILES)}")
    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory}: transformers cannot load this tokenizer ({error}); mend its files") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{directory}: {type(loaded).__name__} has no fast form, which says where in the text a token stands; "
            "save it as tokenizer.json first"
        )
    backend.no_truncation()  # a tokenizer.json may hold both, and would silently cut or pad every text
    backend.no_padding()
    if loaded.eos_token_id is None:
        raise DataError(f"{directory}: names no end token; set eos_token in tokenizer_config.json")
    digest = tokenizer_hash(directory)
    assert digest is not None  # one of FILES is there
    spare = (loaded.pad_token_id, loaded.unk_token_id, loaded.eos_token_id)
    return Tokenizer(
        name=present[0],
        hash=digest,
        bos_id=loaded.bos_token_id,
        eos_id=loaded.eos_token_id,
        pad_id=next(token for token in spare if token is not None),
        adds_bos=loaded.bos_token_id is not None and backend.encode("").ids[:1] == [loaded.bos_token_id],
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        _backend=backend,
    )


def add_token(directory: str | Path, token: str) -> int:
    """Give the tokenizer of a local directory a special token, the first id behind its own, and return its id; one that
    it has already stays as it is. Rewrites the tokenizer's files."""
    directory = Path(directory)
    tokenizer = load_tokenizer(directory)
    if (found := tokenizer.encode(token, bos=False)) and len(found) == 1:
        return found[0]
    loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    settings = directory / "tokenizer_config.json"
    legacy = {k: v for k, v in json.loads(settings.read_text()).items() if k == "legacy"} if settings.exists() else {}
    loaded.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
    loaded.save_pretrained(directory)
    # transformers 5.23 does not write `legacy` back, and then takes it for false: other ids behind a special token.
    if legacy:
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **legacy}, indent=2) + "\n")
    return load_tokenizer(directory).encode(token, bos=False)[0]
