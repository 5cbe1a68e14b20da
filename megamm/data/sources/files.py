"""Picture and video files named by a record: read from inside one directory, and from nowhere else."""

import os
import stat
from pathlib import Path

from megamm.data.faults import SampleFault

FILE_BYTES, VIDEO_BYTES = 2**28, 2**32
"""A larger picture or video file is a fault, and is not read."""


def read_image(directory: Path, name: str, most_bytes: int = FILE_BYTES) -> bytes:
    """Content of the picture or video `name` under `directory`, which must be resolved. Links are followed, but never
    out of it.

    Raises SampleFault (image_outside, image_missing, image_broken).
    """
    try:
        path = Path(os.path.realpath(directory / name))
        if not path.is_relative_to(directory):
            raise SampleFault("image_outside", name)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would wait for ever
            raise SampleFault("image_missing", f"{name} is no file")
        if status.st_size > most_bytes:
            raise SampleFault("image_broken", f"{name}: {status.st_size} bytes, more than {most_bytes}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise SampleFault("image_missing", f"{name!r}: {error}") from error
