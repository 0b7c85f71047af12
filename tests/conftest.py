"""Tests start processes from one that uses gRPC, as the command line does: without gRPC's fork handlers, which restart
its threads in a child that is about to exec, and now and then abort it."""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
