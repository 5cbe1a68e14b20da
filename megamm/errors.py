"""The errors that end a run with one clear message. Nothing else in megamm is caught and printed."""


class MegammError(Exception):
    """Something the user can mend. The message names the field or file and the remedy, and is all that is printed."""


class ConfigError(MegammError):
    """A configuration that cannot run. Carries every problem found, so that the user mends them all at once."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        lines = [f"{len(problems)} problems", *(f"- {problem}" for problem in problems)]
        super().__init__(problems[0] if len(problems) == 1 else "\n".join(lines))


class DataError(MegammError):
    """A dataset, sample or picture that cannot be used as it is."""


class CheckpointError(MegammError):
    """A checkpoint whose tensors or metadata do not fit what is asked of it."""
