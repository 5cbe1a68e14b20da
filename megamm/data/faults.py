"""What can be wrong with one sample. A fault is skipped, counted by its reason and listed; it alone ends no run."""

from dataclasses import dataclass

from megamm.errors import DataError

REASONS: dict[str, str] = {
    "bad_record": "not a conversation: an object with `conversations`, a list of {from, value}, or with `messages`, a "
    "list of {role, content}, and perhaps pictures",
    "record_too_long": "a record of more bytes than are ever read at once",
    "bad_roles": "turns do not alternate between human and gpt",
    "no_answer": "a question without an answer, or with an empty one",
    "marker_count": "another number of <image> markers than pictures, as written and after every turn's markers were "
    "made one",
    "image_outside": "the picture's path leads out of the image directory",
    "image_missing": "no such picture file",
    "image_url": "a picture behind a URL, and nothing is ever downloaded",
    "image_broken": "the picture is empty, truncated, too large or of no known format",
    "video": "a video, and these models take none",
}
"""Every reason, as it is counted in PREFIX.json and listed in PREFIX.skipped.jsonl, with what it means."""

REMEDIES: dict[str, str] = {
    "bad_record": "mend the record or take it out",
    "record_too_long": "store its pictures as files and give their paths, or take it out",
    "bad_roles": "let questions and answers alternate, or take the sample out",
    "no_answer": "write the answer, or take the sample out",
    "marker_count": "write one <image> where each picture belongs",
    "image_outside": "move the picture into --image-dir and give its path from there",
    "image_missing": "fetch the picture, or mend its path (it begins at --image-dir)",
    "image_url": "download the picture into --image-dir and give its path",
    "image_broken": "fetch the picture again, or convert it to JPEG or PNG",
    "video": "choose a family that takes videos, or take the sample out",
}
"""What the user can do, for every reason."""


class SampleFault(DataError):
    """One sample that cannot be used. `reason` is a key of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{REASONS[reason]} ({detail})")

    def __reduce__(self) -> tuple[type["SampleFault"], tuple[str, str]]:
        return SampleFault, (self.reason, self.detail)  # the default passes the joined message, which is one argument


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample that cannot be used, and why."""

    where: str
    """Place in the source, such as `llava.json item 17`, counted from 1."""
    fault: SampleFault
