"""Tests start processes from one that uses gRPC, as the command line does: without gRPC's fork handlers, which restart
its threads in a child that is about to exec, and now and then abort it."""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A property must hold however long a busy machine takes over an example, and on the same examples in every run.
settings.register_profile("pdserve", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pdserve")
