"""A sim worker with a fault that no config has: `python faulty_worker.py ROLE FAULT ...`.

`forgetful`: it never tells that a block has left its prefix cache, so whoever follows it believes too much.
`slow:WORKER:MS`: binding to that prefill worker's KV takes so long, as over a bad network path.
"""

import asyncio
import sys

from pdserve.types import Role
from worker_core import main, peers


def forgetful():
    build = main.build_engine

    def build_forgetful(config, memory):
        engine = build(config, memory)
        step = engine.step

        def step_and_forget():
            result = step()
            result.evicted = []
            return result

        engine.step = step_and_forget
        return engine

    main.build_engine = build_forgetful


def slow(source, delay_ms):
    connect = peers.Peers.connect

    async def connect_slowly(self, ticket, bound):
        if ticket.worker_id == source:
            await asyncio.sleep(int(delay_ms) / 1000)
        return await connect(self, ticket, bound)

    peers.Peers.connect = connect_slowly


if __name__ == "__main__":
    _, role, fault, *arguments = sys.argv
    name, *values = fault.split(":")
    {"forgetful": forgetful, "slow": slow}[name](*values)
    sys.exit(main.run(Role(role), arguments))
