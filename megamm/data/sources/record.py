"""One record of a source, whatever its file, and how the layouts in use become one. Opens no file.

Two layouts are known by their keys: `conversations` with {from, value} turns (LLaVA, ShareGPT) and `messages` with
{role, content} (OpenAI), whose contents are text or parts: text, and pictures as paths, data URLs or bytes.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from megamm.data.faults import SampleFault
from megamm.data.text import Turn
from megamm.data.views import VIDEO_MARKER

Media = str | bytes
"""A path relative to the image directory, or the content of a file."""

MARKER = "<image>"
"""Stands for a picture in a record's turns, whatever the model's own marker."""

ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "model": "gpt",
    "system": "system",
}
"""Spelling in a source -> role. Any other spelling stays as it is, and is a fault when it is prepared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One conversation as the source has it."""

    where: str
    """Place in the source, such as `llava.json item 17`, counted from 1."""
    id: str
    images: list[Media]
    """In order of their markers; empty for text alone."""
    turns: list[Turn]
    """(role, text), a system text put in front of the first question: templates have their own system text."""
    videos: list[Media] = field(default_factory=list)
    """In order of their markers."""


def parse_json(content: bytes) -> Any:
    """A JSON value. NaN and Infinity, which Python writes, are read; where text is expected they are faults.

    Raises SampleFault (bad_record).
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, no JSON, or a number of 5000 digits
        raise SampleFault("bad_record", f"not JSON: {_clip(str(error))}") from error


def record(where: str, item: Any) -> Record:
    """The record of an item in either layout. Raises SampleFault."""
    if not isinstance(item, dict):
        raise SampleFault("bad_record", f"found {_kind(item)}")
    given = [key for key in ("conversations", "messages") if item.get(key) is not None]
    if len(given) != 1:
        raise SampleFault("bad_record", "both `conversations` and `messages`" if given else "neither has turns")
    inline: dict[str, list[Media]] = {MARKER: [], VIDEO_MARKER: []}
    turns = [_turn(turn, given[0], inline) for turn in _turns(item[given[0]], given[0])]
    images, videos = _media(item, "image", "images"), _media(item, "video", "videos")
    if (inline[MARKER] and images) or (inline[VIDEO_MARKER] and videos):
        raise SampleFault("bad_record", "pictures both inside `messages` and beside it")
    identity = item.get("id")
    return Record(
        where=where,
        id=str(identity) if isinstance(identity, str | int) else "",
        images=inline[MARKER] or images,
        turns=_fold_system(turns),
        videos=inline[VIDEO_MARKER] or videos,
    )


def caption(where: str, identity: str, text: str, images: list[Media]) -> Record:
    """The record of a picture and its caption."""
    question = "\n".join([MARKER] * len(images))
    return Record(where=where, id=identity, images=images, turns=[("human", question), ("gpt", _unicode(text))])


def _turns(value: Any, key: str) -> list[dict[str, Any]]:
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        # Parquet files of Hugging Face's `Sequence` hold one list per key instead of one object per turn.
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise SampleFault("bad_record", f"`{key}` is not a list of objects")
    return value


def _turn(turn: dict[str, Any], key: str, inline: dict[str, list[Media]]) -> Turn:
    role = turn["from"] if turn.get("from") is not None else turn.get("role")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if key == "messages" and isinstance(content, list):
        content = "".join(_part(part, inline) for part in content)
    for name, value in (("role (`from` or `role`)", role), ("text (`value` or `content`)", content)):
        if not isinstance(value, str):
            raise SampleFault("bad_record", f"a turn's {name} is {_kind(value)}")
    assert isinstance(role, str) and isinstance(content, str)
    return ROLES.get(role.lower(), _unicode(role)), _unicode(content)


def _part(part: Any, inline: dict[str, list[Media]]) -> str:
    """Text of one part of a content. A part `image` without a source stands for the next of the record's pictures."""
    kind = part.get("type") if isinstance(part, dict) else "text" if isinstance(part, str) else None
    if kind == "text":
        text = part if isinstance(part, str) else part.get("text")
        if isinstance(text, str):
            return text
    elif kind in ("image", "image_url", "video", "video_url"):
        marker = MARKER if kind.startswith("image") else VIDEO_MARKER
        source = next((part[key] for key in (kind, "image", "path", "url", "bytes") if part.get(key)), None)
        if source is not None:
            inline[marker].append(_source(source))
        return marker
    raise SampleFault("bad_record", f"a part of type {_kind(kind) if not isinstance(kind, str) else _clip(repr(kind))}")


def _fold_system(turns: list[Turn]) -> list[Turn]:
    if len(turns) > 1 and turns[0][0] == "system" and turns[1][0] == "human":
        (_, system), (role, question), *rest = turns
        return [(role, f"{system.strip()}\n\n{question}" if system.strip() else question), *rest]
    return turns


def _media(item: dict[str, Any], *keys: str) -> list[Media]:
    found = [item[key] for key in keys if item.get(key) not in (None, "", [])]
    if len(found) > 1:
        raise SampleFault("bad_record", f"both `{keys[0]}` and `{keys[1]}`")
    values = found[0] if found and isinstance(found[0], list) else found
    return [_source(value) for value in values]


def _source(value: Any) -> Media:
    """A path, bytes, a URL, or an object that holds one of them: Hugging Face's {bytes, path}, OpenAI's {url}."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise SampleFault("bad_record", f"a picture is {_kind(value)}")
    _unicode(value)
    scheme = value[:9].partition(":")[0].lower()
    if scheme == "data":
        return _data_url(value)
    if scheme in ("http", "https", "ftp", "s3", "gs", "hf"):
        raise SampleFault("image_url", _clip(value))
    if scheme == "file":
        try:
            return unquote_to_bytes(urlsplit(value).path).decode()
        except ValueError as error:
            raise SampleFault("bad_record", f"{_clip(value)!r}: {error}") from error
    return value


def _data_url(value: str) -> bytes:
    head, comma, body = value.partition(",")
    if not comma:
        raise SampleFault("image_broken", "a data URL without a comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleFault("image_broken", f"a data URL: {error}") from error


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and no tokenizer can read
        raise SampleFault("bad_record", f"not valid Unicode: {error.reason} at character {error.start}") from error
    return text


def _kind(value: Any) -> str:
    """Of a value that should not be here; never the value, which may be long or nest deeply."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _clip(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
