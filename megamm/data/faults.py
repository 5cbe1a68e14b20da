"""What can be wrong with one sample. A fault is skipped, counted by its reason and listed; it alone ends no run."""

from megamm.errors import DataError

REASONS: dict[str, str] = {
    "bad_record": "not a LLaVA record: an object with `conversations`, a list of {from, value}, and perhaps `image`",
    "bad_roles": "turns do not alternate between human and gpt",
    "no_answer": "a question without an answer, or with an empty one",
    "marker_count": "another number of <image> or <video> markers than pictures or videos, after every turn's markers "
    "were made one where the template does so",
    "image_outside": "the path of the picture or video leads out of the image directory",
    "image_missing": "no such picture or video file",
    "too_many_views": "more pictures, tiles and frames than allowed",
    "video_broken": "no frame of the video can be decoded",
    "image_broken": "the picture is empty, truncated, too large or of no known format",
}
"""Every reason, as it is counted in PREFIX.json and listed in PREFIX.skipped.jsonl, with what it means."""


class SampleFault(DataError):
    """One sample that cannot be used. `reason` is a key of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{REASONS[reason]} ({detail})")

    def __reduce__(self) -> tuple[type["SampleFault"], tuple[str, str]]:
        return SampleFault, (self.reason, self.detail)  # the default passes the joined message, which is one argument
