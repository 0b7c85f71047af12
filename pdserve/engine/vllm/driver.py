"""AsyncLLM with an event loop of its own, behind calls that an engine thread can make.

`submit` and `abort` hand work to the loop and return at once; `take` collects what came out. Nothing else crosses.
A job that was handed over ends with exactly one event that says so, whether it finished, was aborted or was refused.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from pdserve.engine.vllm.pace import PrefillPace
from pdserve.errors import EngineFailed, InvalidRequest, PdserveError


@dataclass(slots=True, eq=False)
class Job:
    """One vLLM request: one choice of one of ours."""

    request_id: str
    prompt: Sequence[int]
    params: SamplingParams
    cache_salt: str | None = None
    priority: int = 0
    cancelled: bool = False
    stream: Any = None
    """vLLM's output collector, once vLLM has the request. Loop thread only."""
    measured: bool = False
    """Its prompt's time is known."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something about a job: a piece of output, or the reason why there is none."""

    job: Job
    output: Any = None
    """vLLM's `RequestOutput`, a delta."""
    error: PdserveError | None = None
    ended: bool = False
    """The last event of the job."""
    dead: bool = False
    """vLLM is gone, not just this job."""
    reached_vllm: bool = True
    """False: vLLM never had it, so its connector will not end the job's transfer."""


@dataclass(slots=True)
class Stats:
    """vLLM's latest statistics; counters are totals since start. Written by the loop, read by anyone: each field by
    itself is current, together they may be a step apart."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class _StatsReader(StatLoggerBase):  # type: ignore[misc]  # vllm has no types
    """vLLM's hook for statistics, once a step."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            self._stats.num_running = scheduler_stats.num_running_reqs
            self._stats.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._stats.kv_usage = scheduler_stats.kv_cache_usage
            self._stats.prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self._stats.prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._stats.num_preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say: the worker logs what it serves."""


@dataclass(slots=True)
class _Started:
    """Result of building AsyncLLM in the loop's thread."""

    ready: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class VllmDriver:
    """One AsyncLLM. The constructor returns when it can serve (20 s and more)."""

    def __init__(self, config: VllmConfig, companions: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()) -> None:
        """`companions` run on the same loop, until it closes. Raises whatever vLLM raises while it starts."""
        self.config = config
        self._companions = companions
        self.stats = Stats()
        self.pace = PrefillPace()
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._started = _Started()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._main, name="vllm-loop", daemon=True)
        self._thread.start()
        self._started.ready.wait()
        if self._started.error is not None:
            self._thread.join()
            raise self._started.error

    def submit(self, job: Job) -> None:
        self._loop.call_soon_threadsafe(self._spawn, job)

    def abort(self, job: Job) -> None:
        """The job ends soon, with its event. Unknown and ended jobs are ignored."""
        self._loop.call_soon_threadsafe(self._abort_now, job)

    def take(self, timeout_s: float) -> list[Event]:
        """Everything that has come; waits up to `timeout_s` for the first."""
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait())
            while True:
                events.append(self._events.get_nowait())
        except Empty:
            return events

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's, and those of the model's generation config: what ends an output in vLLM."""
        found = {self._llm.get_tokenizer().eos_token_id}
        declared = self.config.model_config.try_get_generation_config().get("eos_token_id", ())
        found.update(declared if isinstance(declared, list | tuple) else (declared,))
        return tuple(sorted(token for token in found if token is not None))

    def close(self) -> None:
        """Stop vLLM and its processes. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _main(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            self._llm = AsyncLLM.from_vllm_config(self.config, stat_loggers=[lambda *_: _StatsReader(self.stats)])
        except BaseException as error:  # noqa: BLE001 - raised again in the constructor's thread
            self._started.error = error
            return
        finally:
            self._started.ready.set()
        self._tasks.update(asyncio.create_task(companion()) for companion in self._companions)
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._llm.shutdown()
        del self._llm  # else its destructor runs at interpreter exit, when vLLM's modules are gone

    def _spawn(self, job: Job) -> None:
        task = self._loop.create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job) -> None:
        if job.cancelled:
            self._events.put(Event(job, ended=True, reached_vllm=False))
            return
        try:
            prompt = tokens_input(list(job.prompt), cache_salt=job.cache_salt)
            job.stream = await self._llm.add_request(job.request_id, prompt, job.params, priority=job.priority)
            self._abort_if_cancelled(job)
            await self._relay(job)
        except EngineDeadError as error:
            self._events.put(Event(job, error=EngineFailed(f"vLLM died: {error}"), ended=True, dead=True))
        except (VLLMClientError, ValueError) as error:
            self._events.put(Event(job, error=InvalidRequest(str(error)), ended=True, reached_vllm=False))
        except Exception as error:  # noqa: BLE001 - becomes the end of this request
            failure = EngineFailed(f"vLLM failed on this request: {error}")
            self._events.put(Event(job, error=failure, ended=True, reached_vllm=job.stream is not None))
        finally:
            if job.stream is not None:
                job.stream.close()

    async def _relay(self, job: Job) -> None:
        finished = False
        while not finished:
            output = job.stream.get_nowait() or await job.stream.get()
            finished = output.finished
            if not job.measured:
                self._measure(job, output)
            self._events.put(Event(job, output=output, ended=finished))

    def _measure(self, job: Job, output: Any) -> None:
        """With its first token a request tells when it was scheduled and when that token came."""
        stats = output.metrics
        if stats is not None and output.outputs[0].token_ids:
            job.measured = True
            num_computed = len(job.prompt) - (output.num_cached_tokens or 0)
            self.pace.add(num_computed, stats.scheduled_ts, stats.first_token_ts)

    def _abort_now(self, job: Job) -> None:
        """Before vLLM has the request, the mark is enough: `_run` looks at it."""
        job.cancelled = True
        self._abort_if_cancelled(job)

    def _abort_if_cancelled(self, job: Job) -> None:
        if job.cancelled and job.stream is not None:
            task = self._loop.create_task(self._llm.abort(job.stream.request_id, internal=True))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
