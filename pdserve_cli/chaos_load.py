"""The load of `pdserve chaos`: clients in conversations, who hold every answer against one engine's.

A client gives up on nothing: an error that says it may be retried is retried until the answer comes. What an answer
gave before an error must be the beginning of the right one.
"""

from __future__ import annotations

import asyncio
import http.client
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.errors import PdserveError
from pdserve_cli.client import Answer, StreamCut, stream
from pdserve_cli.parity_cell import request
from pdserve_cli.parity_types import OUTPUTS, Case, Run

HANG_S = 60.0
"""Without a byte for so long, an answer hangs: three times the router's own bounds in a chaos cluster."""
PATIENCE_S = 240.0
"""From a request's first try to its answer, whatever dies meanwhile."""
_PAUSE_S = (0.02, 0.2)
"""Between two tries."""
_LEAVES = 0.1
"""Share of requests whose client goes away in the middle of the answer."""
_TALKS = (("greedy", "second turn"), ("seeded",), ("second turn",), ("greedy",))


@dataclass(slots=True)
class Outages:
    """What the killer does to the router: only then may a connection break without a typed error."""

    count: int = 0
    down: bool = False


@dataclass(slots=True)
class Tally:
    """What the clients met. `wrong` and `hung` must stay empty."""

    answers: int = 0
    left: int = 0
    """Answers whose client went away; what it got was right, too."""
    cached_tokens: int = 0
    partial_tokens: int = 0
    """Tokens of answers that an error cut short; they were right, too."""
    errors: Counter[str] = field(default_factory=Counter)
    """Typed and retryable, by reason; `router_gone` counts broken connections to a router that was killed."""
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)


class Load:
    """`run` until `stop` is set."""

    def __init__(self, url: str, model: str, cases: Sequence[Case], alone: Sequence[Run], seed: int) -> None:
        self.tally = Tally()
        self.outages = Outages()
        self.stop = asyncio.Event()
        self._url, self._model = url, model
        self._cases, self._alone = cases, alone
        self._seed = seed

    async def run(self, clients: int) -> None:
        """Until `stop` is set and every client has its last answer."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(random.Random(f"{self._seed}/{number}")))

    async def _client(self, rng: random.Random) -> None:
        while not self.stop.is_set():
            index = rng.randrange(len(self._cases))
            for round_ in rng.choice(_TALKS):
                if rng.random() < _LEAVES:
                    await self._try(index, round_, leave_after=rng.randrange(1, OUTPUTS))
                await self.answered(index, round_, rng)

    async def everything(self) -> None:
        """Each case once, greedily, one after the other."""
        for index in range(len(self._cases)):
            await self.answered(index, "greedy", random.Random(index))

    async def answered(self, index: int, round_: str, rng: random.Random) -> None:
        """Try until there is an answer, right or wrong."""
        deadline = time.monotonic() + PATIENCE_S
        while not await self._try(index, round_):
            if time.monotonic() > deadline:
                self.tally.hung.append(f"case {index}, {round_}: no answer within {PATIENCE_S:.0f} s of tries")
                return
            await asyncio.sleep(rng.uniform(*_PAUSE_S))

    async def _try(self, index: int, round_: str, leave_after: int | None = None) -> bool:
        """Whether it is settled: False asks for another try."""
        run, partial = self._alone[index], Answer()
        body = request(self._model, self._cases[index], run, round_)
        before, was_down = self.outages.count, self.outages.down
        where = f"case {index}, {round_}"
        try:
            await asyncio.to_thread(stream, self._url, "/v1/completions", body, HANG_S, partial, leave_after)
        except TimeoutError:
            self.tally.hung.append(f"{where}: nothing for {HANG_S:.0f} s after {len(partial.token_ids)} tokens")
            return True
        except (StreamCut, OSError, http.client.HTTPException) as error:
            return self._cut(where, error, gone=was_down or before != self.outages.count)
        except PdserveError as error:
            return self._refused(where, error, partial, run.outputs(round_))
        if leave_after is not None:
            self.tally.left += 1
            return self._given(where, partial, run.outputs(round_)[: len(partial.token_ids)])
        return self._given(where, partial, run.outputs(round_))

    def _cut(self, where: str, error: Exception, *, gone: bool) -> bool:
        if not gone:
            self.tally.wrong.append(f"{where}: the connection broke while the router lived: {error!r}")
            return True
        self.tally.errors["router_gone"] += 1
        return False

    def _refused(self, where: str, error: PdserveError, partial: Answer, expected: tuple[int, ...]) -> bool:
        if not error.retryable:
            self.tally.wrong.append(f"{where}: {error.reason} is not retryable: {error.message}")
            return True
        if tuple(partial.token_ids) != expected[: len(partial.token_ids)]:
            self.tally.wrong.append(f"{where}: {partial.token_ids} before {error.reason} instead of {list(expected)}")
            return True
        self.tally.errors[error.reason] += 1
        self.tally.partial_tokens += len(partial.token_ids)
        return False

    def _given(self, where: str, answer: Answer, expected: tuple[int, ...]) -> bool:
        self.tally.answers += 1
        self.tally.cached_tokens += (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        if tuple(answer.token_ids) != expected:
            self.tally.wrong.append(f"{where}: {answer.token_ids} instead of {list(expected)}")
        return True
