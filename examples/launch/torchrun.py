"""torchrun without the traceback in which it reports that a rank has failed: the rank itself has said why.

Takes torchrun's options; ends with the exit status of the first rank that failed, or 1 where a signal ended it.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(max(failure.exitcode, 1))
