"""`python -m decode_worker`: a worker that starts in the decode role (see worker_core)."""

import sys

from pdserve.types import Role
from worker_core.main import run

if __name__ == "__main__":
    sys.exit(run(Role.DECODE))
