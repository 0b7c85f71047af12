"""`python -m kvstore`: the KV store of one node (see `kvstore.node`)."""

import sys

from kvstore.node.main import run

if __name__ == "__main__":
    sys.exit(run())
