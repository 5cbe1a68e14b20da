"""What a run says: the standard logging module, from rank 0 only unless a line is for all ranks.

One line per step is the business of megamm/training/meter.py.
"""

import logging
import os
import sys

EVERY_RANK = {"every_rank": True}
"""`logger.warning(text, extra=EVERY_RANK)` is written by every rank, with the rank in front."""


class _RankFilter(logging.Filter):
    """Lets lines of rank 0 and lines for every rank pass. torchrun and `parallel.launch` set RANK."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = os.environ.get("RANK", "0")
        every_rank = getattr(record, "every_rank", False)
        record.rank = f"rank {rank}: " if every_rank else ""
        return every_rank or rank == "0"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`. Writes to standard error, standard output stays for results."""
    root = logging.getLogger("megamm")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.addFilter(_RankFilter())
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(rank)s%(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name)
