"""What can be wrong with one sample. A fault is skipped, counted by its reason and listed; it alone ends no run."""

from megamm.errors import DataError

REASONS: dict[str, str] = {
    "bad_record": "not a LLaVA record: an object with `conversations`, a list of {from, value}, and perhaps `image`",
    "bad_roles": "turns do not alternate between human and gpt",
    "no_answer": "a question without an answer, or with an empty one",
    "marker_count": "another number of markers than pictures, after every turn's markers were made one",
    "image_outside": "the picture's path leads out of the image directory",
    "image_missing": "no such picture file",
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
