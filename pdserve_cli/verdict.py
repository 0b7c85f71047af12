"""What the verbs that judge a cluster (`parity`, `chaos`) share: how they run, say what they do, and end."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

_THREADS = 64
"""Of blocking clients: asyncio's own default, a handful, would cap the batches."""
_KEY_WIDTH = 20


class Report(Protocol):
    """A dataclass of plain values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def passed(self) -> bool: ...


def say(line: str) -> None:
    """To stderr: stdout holds the report only."""
    print(line, file=sys.stderr, flush=True)


def judged(work: Coroutine[Any, Any, Report], as_json: bool) -> int:
    """Runs `work` with room for its blocking clients and prints its report. Exit status 0 when it passed, else 1."""
    report = asyncio.run(_with_threads(work))
    plain = asdict(report)
    print(json.dumps(plain) if as_json else "\n".join(f"{key:<{_KEY_WIDTH}} {value}" for key, value in plain.items()))
    return 0 if report.passed else 1


async def _with_threads(work: Coroutine[Any, Any, Report]) -> Report:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))
    return await work
