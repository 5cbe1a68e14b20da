"""What can be wrong with one sample. A fault is skipped, counted by its reason and listed; it alone ends no run."""

from dataclasses import dataclass

from megamm.errors import DataError

REASONS: dict[str, str] = {
    "bad_record": "not a conversation: an object with `conversations`, a list of {from, value}, or with `messages`, a "
    "list of {role, content}, and perhaps pictures",
    "record_too_long": "a record of more bytes than are ever read at once",
    "bad_roles": "turns do not alternate between human and gpt",
    "no_answer": "a question without an answer, or with an empty one",
    "marker_count": "another number of <image> or <video> markers than pictures or videos, as written and after every "
    "turn's markers were made one where the template does so",
    "image_outside": "the path of the picture or video leads out of the image directory",
    "image_missing": "no such picture or video file",
    "image_url": "a picture or video behind a URL, and nothing is ever downloaded",
    "too_many_views": "more pictures, tiles and frames than allowed",
    "video_broken": "no frame of the video can be decoded",
    "image_broken": "the picture is empty, truncated, too large or of no known format",
    "video": "a video, which this template has no form for",
}
"""Every reason, as it is counted in PREFIX.json and listed in PREFIX.skipped.jsonl, with what it means."""

REMEDIES: dict[str, str] = {
    "bad_record": "mend the record or take it out",
    "record_too_long": "store its pictures as files and give their paths, or take it out",
    "bad_roles": "let questions and answers alternate, or take the sample out",
    "no_answer": "write the answer, or take the sample out",
    "marker_count": "write one <image> where each picture belongs, one <video> for each video",
    "image_outside": "move the picture into --image-dir and give its path from there",
    "image_missing": "fetch the picture, or mend its path (it begins at --image-dir)",
    "image_url": "download the picture into --image-dir and give its path",
    "too_many_views": "raise --max-views, lower --max-frames, or split the sample",
    "video_broken": "fetch the video again, or convert it to mp4",
    "image_broken": "fetch the picture again, or convert it to JPEG or PNG",
    "video": "choose a family and template that take videos, or take the sample out",
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
