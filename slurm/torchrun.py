"""torchrun, but it ends with the code of the rank that ended first.

    python slurm/torchrun.py --nproc_per_node 2 xlmega/pretrain.py ...

The arguments are torchrun's. By itself it ends with code 1 when a rank ends with any but 0, and then nobody knows
whether starting again helps. A rank that a signal ended gives 128 and the signal's number, as in a shell.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        print(f"torchrun: {error}", file=sys.stderr, flush=True)
        sys.exit(first.exitcode if first.exitcode >= 0 else 128 - first.exitcode)
