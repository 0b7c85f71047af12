"""The engine that every model runner plugs into: schedule, run, postprocess.

`LocalEngine` meets the worker through `pdserve.engine.base` and the model through `runner.py`. It owns the requests
(`sequences.py`), asks the scheduler what to run, appends what was sampled, ends what has ended, and hands finished
prompt blocks to the exports (`handover.py`). The simulator calls `schedule` and `finish` itself, with virtual time
between the two; requests may be submitted, cancelled and resumed in that gap.

A submission with `output_token_ids` goes on where another worker stopped. With n = 1 the context is prompt and outputs
together: computed as one, exported as one, and the next token follows. With n > 1 the choices differ after the
prompt, so there is no common context to hand over: PREFILL and DECODE refuse it (`NotSupported`), FULL computes the
prompt once and then each choice's own outputs. A choice whose outputs are complete already gets its `Finish` at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import chain

from pdserve.ends import end_of
from pdserve.engine.base import ImportTarget, KVMemory, KVMemoryFactory, StepResult
from pdserve.engine.core.batch import Batch
from pdserve.engine.core.blocks import CachePolicy
from pdserve.engine.core.cache_face import CacheFace
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.fills import Fills
from pdserve.engine.core.handover import Exports, Import, check_resume
from pdserve.engine.core.handover_area import Clock, open_area
from pdserve.engine.core.news import CacheNews
from pdserve.engine.core.prefix_cache import PrefixCache
from pdserve.engine.core.runner import ModelRunner, Sampled
from pdserve.engine.core.scheduler import Reservation, Scheduler
from pdserve.engine.core.sequences import Choice, Group, Work, check_request
from pdserve.errors import InvalidRequest, PdserveError
from pdserve.types import EngineLoad, Finish, FinishReason, KVLayout, ModelInfo, Phase, PromptStats, Request, StepOutput


class LocalEngine(CacheFace):
    """A `pdserve.engine.base.HandoverEngine` and `KVCache` over one `ModelRunner`.

    `model.max_model_len` is the runner's, or what the pool holds if that is less: so every request that is taken fits
    when it runs alone, and none waits for ever.
    """

    def __init__(
        self,
        runner: ModelRunner,
        memory_factory: KVMemoryFactory,
        config: CoreConfig,
        *,
        cache_policy: CachePolicy | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`cache_policy` decides what the prefix cache gives up (None: the least recently used), by this clock."""
        self._runner = runner
        self._config = config
        self._block_tokens = runner.layout.block_tokens
        pool_tokens = config.num_blocks * self._block_tokens
        self._model = replace(runner.model, max_model_len=min(runner.model.max_model_len, pool_tokens))
        self._area = open_area(runner, memory_factory, config, cache_policy, clock)
        self._news = CacheNews(self._area)
        self._fills = Fills(self._area, self._news)
        self._cache = PrefixCache(self._area.pool, self._fills, self._news, self._block_tokens, config.prefix_cache)
        self._scheduler = Scheduler(config, self._area.pool, self._cache, self._fills)
        self._exports = Exports(self._area, self._block_tokens)
        self._imports: dict[int, Import] = {}
        self._lent: list[list[int]] = []
        self._groups: dict[int, Group] = {}
        """By each of a request's handles."""
        self._finishes: list[Finish] = []
        """To be told with the next step: of choices that ended before they ran."""
        self._arrivals = 0
        self._in_flight = False
        self._ended_in_flight = False
        """A choice ended since `schedule`, so the batch may hold work that nobody wants."""
        self._closed = False

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def layout(self) -> KVLayout:
        return self._runner.layout

    @property
    def memory(self) -> KVMemory:
        return self._area.memory

    # Requests

    def submit(self, request: Request, handle: int, phase: Phase) -> None:
        check_request(request, phase, self._model, self._block_tokens)
        handles = range(handle, handle + request.params.n)
        if any(taken in self._groups for taken in handles):
            raise InvalidRequest(f"handle {handle} is in use", param="handle")
        self._arrivals += 1
        group = Group(request, handle, phase, self._arrivals)
        self._runner.open(group.carrier)
        self._groups.update(dict.fromkeys(handles, group))
        self._scheduler.stuck = False
        if phase is Phase.DECODE:
            self._expect_import(group)
        else:
            self._enqueue(group)

    def cancel(self, handle: int) -> None:
        group = self._groups.get(handle)
        if group is not None and group.handle == handle:
            self._close_group(group)
        else:
            self._fills.close(handle)

    def cancel_choice(self, handle: int) -> None:
        group = self._groups.get(handle)
        if group is not None and handle - group.handle in group.open:
            self._end_choice(group, handle - group.handle)

    def _enqueue(self, group: Group) -> None:
        for choice in sorted(group.open):
            self._finish_if_complete(group, choice, group.prior_outputs(choice))
        if group.open:
            self._scheduler.add(group.carrier)

    def _finish_if_complete(self, group: Group, choice: int, outputs: Seq[int]) -> None:
        """What was sampled elsewhere may have ended the choice already: only its `Finish` was lost."""
        num_tokens = len(group.request.prompt_token_ids) + len(outputs)
        end = end_of(group.request.params, self._model, outputs[-1], len(outputs), num_tokens) if outputs else None
        if end is not None:
            self._finishes.append(Finish(group.handle + choice, end[0], len(outputs), end[1]))
            self._end_choice(group, choice)

    def _end_choice(self, group: Group, choice: int) -> None:
        """Free what this choice holds; with the last one the request goes."""
        self._ended_in_flight = True
        group.open.discard(choice)
        if not group.open:
            self._close_group(group)
        elif choice in group.forks:
            self._drop_sequence(group.forks.pop(choice))

    def _close_group(self, group: Group) -> None:
        """Free everything that the request holds, and forget it."""
        self._ended_in_flight = True
        self._scheduler.stuck = False
        group.open.clear()
        self._drop_import(group)
        self._drop_sequences(group)
        self._exports.forget(group.handle)
        self._fills.close(group.handle)
        for handle in range(group.handle, group.handle + group.request.params.n):
            self._groups.pop(handle, None)

    def _drop_sequences(self, group: Group) -> None:
        for seq in group.sequences():
            self._drop_sequence(seq)
        group.forks.clear()

    def _drop_sequence(self, seq: Choice) -> None:
        self._scheduler.remove(seq)
        self._runner.drop(seq)

    # A step

    def has_work(self) -> bool:
        could_run = self._scheduler.has_sequences or self._exports.has_pending
        return bool(self._finishes or self._news) or (could_run and not self._scheduler.stuck)

    def step(self) -> StepResult:
        return self.finish(self.schedule())

    def schedule(self) -> Batch:
        """What the next step computes. Raises `RuntimeError` unless `finish` was called for the one before."""
        if self._in_flight:
            raise RuntimeError("finish the batch that was scheduled before the next one is")
        self._in_flight, self._ended_in_flight = True, False
        batch = self._scheduler.schedule()
        if batch.copy_sources:
            self._runner.copy_blocks(batch.copy_sources, batch.copy_targets)
        for item in batch.items:
            for choice in item.choices:
                if choice is not item.seq:
                    self._open_fork(choice)
        return batch

    def finish(self, batch: Batch) -> StepResult:
        """Run the batch, but for what ended since it was scheduled."""
        self._in_flight = False
        result = StepResult()
        items = batch.wanted_items() if self._ended_in_flight else batch.items
        if items:
            self._postprocess(items, self._runner.run(items), result.output)
        result.output.finishes, self._finishes = self._finishes, []
        result.exports = self._exports.flush()
        result.num_prompt_tokens = batch.num_prompt_tokens
        self._news.flush(result)
        return result

    def _postprocess(self, items: list[Work], sampled: list[Sampled], output: StepOutput) -> None:
        results = iter(sampled)
        for item in items:
            self._scheduler.advance(item)
            group = item.seq.group
            in_context = not group.context_done
            if in_context:
                self._advance_context(group, output)
            for choice in item.choices:
                self._append(choice, next(results), output)
            if in_context and group.context_done:
                self._leave_context(group)

    def _append(self, choice: Choice, sampled: Sampled, output: StepOutput) -> None:
        if sampled.error is not None:
            self._finish_choice(choice, FinishReason.ERROR, error=sampled.error)
            return
        num_outputs = choice.num_output_tokens
        output.add(choice.handle, num_outputs, sampled.token_id)
        if sampled.logprobs is not None:
            output.logprobs.append(sampled.logprobs)
        tokens = choice.token_ids
        tokens.append(sampled.token_id)
        end = end_of(choice.request.params, self._model, sampled.token_id, num_outputs + 1, len(tokens))
        if end is not None:
            self._finish_choice(choice, *end)

    def _finish_choice(
        self, choice: Choice, reason: FinishReason, stop_token_id: int | None = None, error: PdserveError | None = None
    ) -> None:
        self._finishes.append(Finish(choice.handle, reason, choice.num_output_tokens, stop_token_id, error))
        if choice.group.phase is Phase.PREFILL:
            choice.group.open.discard(choice.choice)
            self._ended_in_flight = True
        else:
            self._end_choice(choice.group, choice.choice)

    # Context and choices

    def _advance_context(self, group: Group, output: StepOutput) -> None:
        """Part of a context was computed: export what is whole, and tell when it is complete."""
        carrier = group.carrier
        group.context_done = not carrier.num_uncomputed_tokens
        if group.phase is Phase.PREFILL:
            self._export(group)
        if group.context_done:
            self._fills.close(group.handle)
            num_prompt_tokens = len(group.request.prompt_token_ids)
            stats = PromptStats(group.handle, num_prompt_tokens, group.num_cached_tokens, group.num_fetched_tokens)
            output.prompts.append(stats)

    def _export(self, group: Group) -> None:
        carrier = group.carrier
        end = carrier.num_computed_tokens
        if not group.context_done:
            end -= end % self._block_tokens
        if end > group.num_exported_tokens:
            start = group.num_exported_tokens
            self._exports.offer(group.handle, carrier.block_table, start, end, group.context_done)
            group.num_exported_tokens = end

    def _leave_context(self, group: Group) -> None:
        """The context is complete and its choices have their first token: prefill ends here, others go on."""
        if group.phase is Phase.PREFILL:
            self._drop_sequences(group)
        elif group.open and group.request.params.n > 1:
            self._start_forks(group)

    def _start_forks(self, group: Group, outputs: Seq[Seq[int]] | None = None) -> None:
        """Every open choice goes on in blocks that it shares with the others until it writes to them."""
        for choice in sorted(group.open):
            if choice not in group.forks:
                self._open_fork(group.fork(choice, outputs[choice] if outputs else ()))
        for fork in list(group.forks.values()):
            self._share_context(group.carrier, fork)
            self._scheduler.add(fork)
        self._drop_sequence(group.carrier)

    def _open_fork(self, fork: Choice) -> None:
        try:
            self._runner.open(fork)
        except PdserveError as error:
            self._finish_choice(fork, FinishReason.ERROR, error=error)

    def _share_context(self, carrier: Choice, fork: Choice) -> None:
        self._area.pool.acquire(carrier.block_table)
        fork.block_table = list(carrier.block_table)
        fork.keys = list(carrier.keys)
        fork.num_computed_tokens = carrier.num_computed_tokens
        fork.num_published = carrier.num_published
        if fork.handle != carrier.handle:
            self._cache.tell(fork, 0)

    # Hand-over

    def export_release(self, handle: int, chunk_index: int | None = None) -> None:
        self._exports.release(handle, chunk_index)
        self._scheduler.stuck = False
        group = self._groups.get(handle)
        if group is None or group.phase is not Phase.PREFILL:
            return
        if group.context_done and not self._exports.holds(handle):
            self._close_group(group)

    def import_blocks(self, handle: int, first_token: int, num_tokens: int) -> ImportTarget | None:
        """See `KVHandover`. Raises `HandoverError` if the chunk is not whole blocks of this context or is larger than
        the staging area. In a staged engine the leading cached entries of `blocks` say nothing: only count them."""
        incoming = self._imports[handle]
        carrier = self._groups[handle].carrier
        if not carrier.block_table:
            if not self._scheduler.open_reserved(carrier, incoming.reservation):
                return None
            incoming.begin(carrier.block_table, carrier.num_published)
            self._scheduler.stuck = False
        return incoming.open(first_token, num_tokens)

    def import_commit(self, handle: int, first_token: int, num_tokens: int) -> None:
        """See `KVHandover`. Raises `KeyError` for a handle that imports nothing (cancelled, or resumed already), and
        `HandoverError` for a chunk that `import_blocks` did not open."""
        incoming = self._imports[handle]
        incoming.commit(first_token, num_tokens)
        carrier = self._groups[handle].carrier
        carrier.num_computed_tokens = incoming.num_ready_tokens
        self._cache.publish(carrier)
        self._scheduler.stuck = False

    def resume(self, handle: int, output_token_ids: Seq[Seq[int]], finished: Seq[bool]) -> None:
        """See `KVHandover`. The outputs are those sampled since the submission: they follow the request's own
        `output_token_ids`. Raises `KeyError` as `import_commit` does, and `HandoverError` while a part of the context
        is missing."""
        incoming, group = self._imports[handle], self._groups[handle]
        check_resume(group, incoming, output_token_ids, finished, self._model.vocab_size)
        incoming.abandon()
        del self._imports[handle]
        group.context_done = True
        self._scheduler.stuck = False
        for choice in sorted(group.open):
            if finished[choice]:
                self._end_choice(group, choice)
            else:
                self._finish_if_complete(group, choice, (*group.prior_outputs(choice), *output_token_ids[choice]))
        if group.open:
            self._go_on(group, output_token_ids)

    def _go_on(self, group: Group, outputs: Seq[Seq[int]]) -> None:
        if group.request.params.n > 1:
            self._start_forks(group, outputs)
            return
        self._runner.drop(group.carrier)
        group.carrier.token_ids += outputs[0]
        self._open_fork(group.carrier)
        if group.open:
            self._scheduler.add(group.carrier)

    def _expect_import(self, group: Group) -> None:
        carrier = group.carrier
        num_tokens = len(carrier.token_ids)
        reservation = Reservation(carrier.order, self._scheduler.num_blocks_for(num_tokens))
        self._imports[group.handle] = Import(self._area, reservation, num_tokens, self._block_tokens)
        self._scheduler.reserve(reservation)

    def _drop_import(self, group: Group) -> None:
        incoming = self._imports.pop(group.handle, None)
        if incoming is not None:
            incoming.abandon()
            if not group.carrier.block_table:
                self._scheduler.withdraw(incoming.reservation)

    # State

    def load(self) -> EngineLoad:
        scheduler, pool = self._scheduler, self._area.pool
        return EngineLoad(
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting) + len(scheduler.reserving),
            num_free_blocks=pool.num_available,
            num_total_blocks=pool.num_blocks,
            num_exported_blocks=self._exports.num_blocks,
            num_prefill_tokens_waiting=scheduler.num_prefill_tokens_waiting,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=self._cache.num_queried_tokens,
            prefix_cache_hits=self._cache.num_hit_tokens,
        )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._runner.close()

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a block is lost, held twice or found under a wrong key. Costs O(pool)."""
        groups = {id(group): group for group in self._groups.values()}.values()
        tables = (seq.block_table for group in groups for seq in group.sequences())
        imported = chain.from_iterable(incoming.area_blocks() for incoming in self._imports.values())
        self._area.check_integrity(
            pool=chain(tables, self._exports.pool_blocks(), self._fills.pool_blocks()),
            exported=chain(self._exports.area_blocks(), self._lent),
            imported=chain(imported, self._fills.area_blocks()),
        )
        self._scheduler.check_integrity(groups)
