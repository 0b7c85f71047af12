"""Real worker processes, as `pdserve up` and Kubernetes start them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class WorkerProcess:
    process: asyncio.subprocess.Process
    ready: dict[str, Any]

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 60)

    async def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Status and body of an HTTP request to its status port."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ready["http_port"])
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), body.decode()


async def spawn(role: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"{role}_worker",
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@asynccontextmanager
async def worker_process(role: str, **overrides: object) -> AsyncIterator[WorkerProcess]:
    """A sim worker that is ready; killed in the end if it still runs."""
    sets = {"engine": "sim", "num_blocks": 512, "chunk_tokens": 64, **overrides}
    arguments = [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    process = await spawn(role, *arguments)
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        if not line:
            assert process.stderr is not None
            raise AssertionError((await process.stderr.read()).decode())
        yield WorkerProcess(process, json.loads(line))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
