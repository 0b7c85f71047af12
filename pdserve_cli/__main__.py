"""The `pdserve` command: one verb a module. stdout holds results only, all else goes to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pdserve.errors import PdserveError
from pdserve_cli import bench, chaos, explain, kv, parity, up

_VERBS = {
    "up": (up, "start a whole cluster on this machine"),
    "parity": (parity, "compare the cluster's tokens with one engine's and with transformers'"),
    "chaos": (chaos, "kill every process again and again, and hold each answer against the right one"),
    "explain": (explain, "tell why a request went where it went, and what came of it"),
    "bench": (bench, "measure one part"),
    "kv": (kv, "look into a node's KV store: ls, stat, verify, drop"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="pdserve", description="Serve LLMs with prefill and decode on separate pools.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (module, text) in _VERBS.items():
        verb = verbs.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    # gRPC's fork handlers restart its threads in a child that is about to exec; now and then that child aborts.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except PdserveError as error:
        print(f"pdserve: {error.reason}: {error.message}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
