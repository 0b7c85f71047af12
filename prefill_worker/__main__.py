"""`python -m prefill_worker`: a worker that starts in the prefill role (see worker_core)."""

import sys

from pdserve.types import Role
from worker_core.main import run

if __name__ == "__main__":
    sys.exit(run(Role.PREFILL))
