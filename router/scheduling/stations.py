"""A connected worker as policies see it: what this router has put there, and when it will be free.

Everything is counted the moment it is placed; what a worker reports only adds others' work (`Candidate.foreign`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from pdserve.types import WorkerInfo
from router.scheduling.base import Ask, Outstanding, WorkerT
from router.scheduling.forecasts import Pace, Predictor

EXPECTED_OUTPUT_TOKENS = 256
"""Context that a choice is counted with beside its prompt, when `max_tokens` allows that much: clients seldom say how
much they will really get, so a larger bound tells placement nothing."""
OVERDUE_SHARE = 0.1
"""Of the time by which a prefill is over its prediction, that it is still given: soon, but a worker that hangs looks
worse and worse."""
SAME_STEP_S = 0.0005
"""A prompt that is through so soon after another was computed in the same step: it tells nothing of the pace."""
MIN_WAIT_S = 0.001
"""A worker with a prompt under way is never taken for free."""


@dataclass(slots=True, eq=False)
class Job:
    """A prompt that is bound to a worker and not computed yet."""

    ask: Ask
    bound_s: float
    work_s: float
    """Predicted, fetching included, before the worker's pace; what it adds to the step that it shares."""
    num_new_tokens: int


class Station(Generic[WorkerT]):
    """Satisfies `Candidate`, so filters and scorers read it as they read a worker."""

    def __init__(self, worker: WorkerT, predictor: Predictor, half_life_s: float) -> None:
        self.worker = worker
        self.predictor = predictor
        self.prefill_pace = Pace()
        self.decode_pace = Pace()
        self.own = Outstanding()
        self.recent_tokens = 0.0
        """Prompt tokens given to it to compute, halved every `half_life_s`: what the load bound compares."""
        self._half_life_s = half_life_s
        self._recent_at = 0.0
        self._jobs: dict[Ask, Job] = {}
        self._work_s = 0.0
        self._since = 0.0
        """When the oldest job began."""
        self._behind_tokens = 0
        """To compute, of jobs that were bound later than that: their step has not begun."""

    @property
    def info(self) -> WorkerInfo:
        return self.worker.info

    @property
    def draining(self) -> bool:
        return self.worker.draining

    @property
    def foreign(self) -> Outstanding:
        return self.worker.foreign

    # ---- prefill ----

    @property
    def num_prefills(self) -> int:
        return len(self._jobs)

    def wait_s(self, now: float) -> float:
        """Seconds until it has computed all prompts that are bound to it, this router's and others'."""
        wait = 0.0
        if self._jobs:
            head = next(iter(self._jobs.values()))
            pace = self.prefill_pace.factor
            left = head.work_s * pace - (now - self._since)
            rest = max(self._work_s - head.work_s, 0.0) * pace
            wait = max((left if left > 0 else -OVERDUE_SHARE * left) + rest, MIN_WAIT_S)
        foreign = self.foreign.num_prefill_tokens
        return wait + self.predictor.prefill_s(foreign, 0) * self.prefill_pace.factor if foreign else wait

    def shares_step(self, num_new_tokens: int, now: float, lead_s: float) -> bool:
        """Whether a short prompt that is bound now fills up a step that is too small yet: the one that begins now, or
        the one behind that, if it begins soon or after a small one."""
        if not self._fills_step(num_new_tokens, now):
            return False
        running = self.own.num_prefill_tokens - self._behind_tokens
        return now <= self._since or running < 2 * self.predictor.shared_tokens or self._running_s(now) <= lead_s

    def _fills_step(self, num_new_tokens: int, now: float) -> bool:
        limit = self.predictor.shared_tokens
        return num_new_tokens <= limit and self._step_tokens(now) < limit

    def _step_tokens(self, now: float) -> int:
        """Of the step that a prompt bound now will be in."""
        behind = self._behind_tokens
        return behind if now > self._since else self.own.num_prefill_tokens - behind

    def _running_s(self, now: float) -> float:
        work_s = sum([job.work_s for job in self._jobs.values() if job.bound_s <= self._since])
        return work_s * self.prefill_pace.factor - (now - self._since)

    def begin_prefill(self, ask: Ask, now: float, work_s: float, num_new_tokens: int) -> None:
        if not self._jobs:
            self._since = now
        work_s -= self._shared_s(now, num_new_tokens)
        self._jobs[ask] = Job(ask, now, work_s, num_new_tokens)
        self._work_s += work_s
        if now > self._since:
            self._behind_tokens += num_new_tokens
        self.own.num_prefill_tokens += num_new_tokens
        self._fade(now)
        self.recent_tokens += num_new_tokens

    def _shared_s(self, now: float, num_new_tokens: int) -> float:
        """What computing so many tokens costs less in a step with others than in one of their own."""
        others, step_s = self._step_tokens(now), self.predictor.step_s
        if not others or not self._fills_step(num_new_tokens, now):
            return 0.0
        return max(0.0, step_s(others) + step_s(num_new_tokens) - step_s(others + num_new_tokens))

    def end_prefill(self, ask: Ask, now: float, observed_work_s: float | None = None) -> None:
        """Computed, or given up. `observed_work_s`: what the model says for what was really computed, if it was."""
        job = self._jobs.get(ask)
        if job is None:
            return
        is_head = next(iter(self._jobs)) is ask
        if observed_work_s is not None and is_head and now - self._since >= SAME_STEP_S:
            with_others = observed_work_s + self._shared_work_s(job)
            self.prefill_pace.observe(with_others, now - max(job.bound_s, self._since))
        del self._jobs[ask]
        if job.bound_s > self._since:
            self._behind_tokens -= job.num_new_tokens
        self._work_s = self._work_s - job.work_s if self._jobs else 0.0
        self.own.num_prefill_tokens -= job.num_new_tokens
        if is_head:
            self._since, self._behind_tokens = now, 0

    def _shared_work_s(self, head: Job) -> float:
        """Of the jobs that run in one step with the oldest."""
        if self.own.num_prefill_tokens - self._behind_tokens >= 2 * self.predictor.shared_tokens:
            return 0.0
        return sum([job.work_s for job in self._jobs.values() if job is not head and job.bound_s <= self._since])

    def recent(self, now: float) -> float:
        self._fade(now)
        return self.recent_tokens

    def _fade(self, now: float) -> None:
        if now > self._recent_at:
            self.recent_tokens *= 0.5 ** ((now - self._recent_at) / self._half_life_s)
            self._recent_at = now

    # ---- decode ----

    @property
    def num_seqs(self) -> int:
        return self.own.num_seqs + self.foreign.num_seqs

    @property
    def num_context_tokens(self) -> int:
        return self.own.num_context_tokens + self.foreign.num_context_tokens

    @property
    def free_tokens(self) -> int:
        """Of its KV pool; below 0 when more is placed than fits."""
        return self.info.num_blocks * self.info.block_tokens - self.num_context_tokens

    def itl_s(self, more_seqs: int, more_tokens: int) -> float:
        """Between two tokens once so much has joined."""
        raw = self.predictor.itl_s(self.num_seqs + more_seqs, self.num_context_tokens + more_tokens)
        return raw * self.decode_pace.factor

    def begin_decode(self, ask: Ask) -> None:
        self.own.num_seqs += ask.num_choices
        self.own.num_context_tokens += context_tokens(ask)

    def end_decode(self, ask: Ask) -> None:
        self.own.num_seqs -= ask.num_choices
        self.own.num_context_tokens -= context_tokens(ask)


def context_tokens(ask: Ask) -> int:
    """KV that decode will hold for it."""
    return ask.num_prompt_tokens + ask.num_choices * min(ask.max_tokens, EXPECTED_OUTPUT_TOKENS)
