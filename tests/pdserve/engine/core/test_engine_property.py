"""Two engines with tiny pools under everything that may happen to requests, in any order: never a wrong token, never a
block lost, never a byte changed under an unchanged generation."""

from dataclasses import dataclass, field
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pdserve.types import Phase

BASE = [(5 * i + 2) % 47 for i in range(40)]
lengths = st.sampled_from([1, 3, 4, 7, 8, 12, 17, 24, 29])
picks = st.integers(0, 10**6)


@dataclass
class Track:
    """A request as a router sees it."""

    handle: int
    request: object
    prefill: int | None
    """Its handle at the prefill engine."""
    decode: object = None
    """The engine that goes on with it (or runs it in full)."""
    pulled: int = 0
    resumed: bool = False
    given_up: set = field(default_factory=set)
    """Choices that were cancelled."""
    before: dict = field(default_factory=dict)
    """Tokens by choice from before a migration."""
    over: bool = False


class Machine(RuleBasedStateMachine):
    make_bench = make_request = run_alone = None
    host = True

    def __init__(self):
        super().__init__()
        self.p = self.make_bench(14, max_model_len=48, host=self.host, staging_blocks=4, max_num_seqs=3, chunk_tokens=8)
        self.d = self.make_bench(14, max_model_len=48, host=self.host, staging_blocks=4, max_num_seqs=3, chunk_tokens=8)
        self.tracks = []
        self.in_flight = {}
        self.stale = []
        self.next_handle = 0

    # What may happen

    @rule(
        length=lengths,
        variant=st.integers(0, 2),
        n=st.sampled_from([1, 1, 2, 3]),
        tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        split=st.booleans(),
        stop=st.booleans(),
    )
    def arrive(self, length, variant, n, tokens, priority, split, stop):
        prompt = [*BASE[:length], variant]
        fields = {"n": n, "temperature": 1.0, "max_tokens": tokens, "priority": priority}
        if stop:
            fields |= {"stop_token_ids": (3, 11, 19, 23, 31, 44), "min_tokens": tokens // 2}
        self.start(self.make_request(prompt, **fields), split, self.d)

    def start(self, request, split, engine, **state):
        handle, self.next_handle = self.next_handle, self.next_handle + 10
        track = Track(handle, request, handle if split else None, engine, resumed=not split, **state)
        engine.engine.submit(request, handle, Phase.DECODE if split else Phase.FULL)
        if split:
            self.p.engine.submit(request, handle, Phase.PREFILL)
        self.tracks.append(track)

    @rule(
        length=st.sampled_from([8, 12, 17, 24, 29]),
        tokens=st.integers(1, 12),
        num_blocks=st.integers(1, 7),
        first=st.integers(0, 4),
        before=st.booleans(),
        n=st.sampled_from([1, 1, 2]),
        split=st.booleans(),
    )
    def arrive_with_a_fill(self, length, tokens, num_blocks, first, before, n, split):
        """A part of the prompt is fetched, before the request runs or while it does."""
        prompt = [*BASE[:length], 5]
        bench = self.p if split else self.d
        num_blocks = min(num_blocks, (len(prompt) - 1) // 4)
        first = min(first, num_blocks - 1)
        if not bench.open_fill(self.next_handle, prompt, num_blocks, first):
            return
        if before:
            self.end_fill(bench, self.next_handle, num_blocks)
        self.start(self.make_request(prompt, n=n, temperature=1.0, max_tokens=tokens), split, self.d)

    def filling(self):
        return [(bench, handle) for bench in (self.p, self.d) for handle in bench.fills]

    def end_fill(self, bench, handle, num_blocks):
        bench.end_fill(handle, num_blocks)

    @precondition(lambda self: self.filling())
    @rule(pick=picks, num_blocks=st.integers(0, 7))
    def fetched(self, pick, num_blocks):
        bench, handle = self.filling()[pick % len(self.filling())]
        bench.end_fill(handle, num_blocks)

    @precondition(lambda self: self.filling())
    @rule(pick=picks)
    def fetch_failed(self, pick):
        bench, handle = self.filling()[pick % len(self.filling())]
        bench.drop_fill(handle)

    @rule(length=st.sampled_from([8, 17, 29]), which=st.booleans(), cancel=st.booleans())
    def fetch_for_nobody(self, length, which, cancel):
        """The request ended before it was submitted."""
        bench, handle = (self.p if which else self.d), self.next_handle
        self.next_handle += 10
        if bench.open_fill(handle, [*BASE[:length], 6], length // 4):
            if cancel:
                bench.engine.cancel(handle)
                bench.end_fill(handle, length // 4)
            else:
                bench.end_fill(handle, length // 4)
                bench.engine.cancel(handle)

    @rule(length=st.sampled_from([8, 17, 29]), variant=st.integers(0, 2), which=st.booleans())
    def lend(self, length, variant, which):
        """A copy for the store reads the right bytes."""
        bench, prompt = (self.p if which else self.d), [*BASE[:length], variant]
        lent = bench.engine.cache_lend(bench.keys_of(prompt))
        if lent is None:
            return
        kv = bench.kv_of(prompt)
        for i, block in enumerate(lent):
            assert bench.engine.memory.blocks[block].tobytes() == kv[64 * i : 64 * i + 64]
        bench.engine.check_integrity()
        bench.engine.cache_return(lent)

    @rule(length=lengths, tokens=st.integers(1, 12))
    def arrive_at_prefill_worker(self, length, tokens):
        self.start(self.make_request([*BASE[:length], 9], temperature=1.0, max_tokens=tokens), False, self.p)

    @rule(which=st.booleans(), times=st.integers(1, 6))
    def step(self, which, times):
        bench = self.p if which else self.d
        self.finish_flight(bench)
        for _ in range(times):
            if bench.engine.has_work():
                bench.step()

    @rule(which=st.booleans())
    def begin_step(self, which):
        bench = self.p if which else self.d
        if bench not in self.in_flight and bench.engine.has_work():
            self.in_flight[bench] = bench.engine.schedule()

    @rule(which=st.booleans())
    def end_step(self, which):
        self.finish_flight(self.p if which else self.d)

    @precondition(lambda self: self.importing())
    @rule(pick=picks, release=st.booleans(), times=st.integers(1, 4))
    def transfer(self, pick, release, times):
        track = self.importing()[pick % len(self.importing())]
        for _ in range(times):
            self.pull_one(track, release)
        self.resume_if_whole(track)

    @precondition(lambda self: self.importing())
    @rule(pick=picks)
    def open_only(self, pick):
        track = self.importing()[pick % len(self.importing())]
        for chunk in self.chunks(track)[track.pulled : track.pulled + 1]:
            track.decode.engine.import_blocks(track.handle, chunk.first_token, chunk.num_tokens)

    @precondition(lambda self: self.live())
    @rule(pick=picks)
    def cancel(self, pick):
        track = self.live()[pick % len(self.live())]
        self.drop_prefill(track)
        track.decode.engine.cancel(track.handle)
        track.over = True

    @precondition(lambda self: self.live())
    @rule(pick=picks, choice=st.integers(0, 2))
    def cancel_choice(self, pick, choice):
        track = self.live()[pick % len(self.live())]
        if choice < track.request.params.n:
            track.given_up.add(choice)
            track.decode.engine.cancel_choice(track.handle + choice)
            if track.prefill is not None:
                self.snapshot(track)
                self.p.engine.cancel_choice(track.prefill + choice)
            if len(track.given_up) == track.request.params.n:
                self.drop_prefill(track)
                track.over = True

    @precondition(lambda self: self.importing())
    @rule(pick=picks)
    def lose_prefill_and_retry(self, pick):
        track = self.importing()[pick % len(self.importing())]
        self.drop_prefill(track)
        track.prefill, self.next_handle = self.next_handle, self.next_handle + 10
        track.pulled = 0
        self.p.engine.submit(track.request, track.prefill, Phase.PREFILL)
        for choice in track.given_up:
            self.p.engine.cancel_choice(track.prefill + choice)

    @precondition(lambda self: self.live())
    @rule(pick=picks, split=st.booleans())
    def migrate(self, pick, split):
        track = self.live()[pick % len(self.live())]
        tokens = {choice: self.tokens(track, choice) for choice in range(track.request.params.n)}
        ended = [choice for choice in tokens if choice in track.given_up or self.ended(track, choice)]
        if ended:
            return
        self.drop_prefill(track)
        track.decode.engine.cancel(track.handle)
        track.over = True
        fields = {
            name: getattr(track.request.params, name)
            for name in ("n", "temperature", "max_tokens", "stop_token_ids", "min_tokens")
        }
        request = self.make_request(track.request.prompt_token_ids, outputs=list(tokens.values()), **fields)
        split = split and (request.params.n == 1 or not any(tokens.values()))
        self.start(request, split, self.d, before=tokens)

    # What must always hold

    @invariant()
    def books_are_right(self):
        self.p.engine.check_integrity()
        self.d.engine.check_integrity()

    @invariant()
    def unchanged_generation_means_unchanged_bytes(self):
        memory = self.p.engine.memory
        for block, generation, content in self.stale:
            if memory.generations[block] == generation:
                assert memory.blocks[block].tobytes() == content

    @invariant()
    def tokens_are_right_so_far(self):
        for track in self.tracks:
            expected = self.expected(track)
            for choice in range(track.request.params.n):
                got = self.tokens(track, choice)
                assert got == expected[choice][: len(got)], (track.handle, choice)

    def teardown(self):
        for bench, handle in self.filling():
            bench.drop_fill(handle)
        for _ in range(400):
            self.settle()
            if not self.live() and not self.p.engine.has_work() and not self.d.engine.has_work():
                break
            for bench in (self.p, self.d):
                self.finish_flight(bench)
                if bench.engine.has_work():
                    bench.step()
            for track in self.importing():
                for chunk in self.chunks(track)[: track.pulled]:
                    self.p.engine.export_release(track.prefill, chunk.chunk_index)
                self.pull_one(track, True)
                self.resume_if_whole(track)
        else:
            raise AssertionError("not everything came to an end")
        self.tokens_are_right_so_far()
        for track in self.tracks:
            for choice in set() if track.over else set(range(track.request.params.n)) - track.given_up:
                assert self.tokens(track, choice) == self.expected(track)[choice]
            if track.prefill is not None:
                self.p.engine.export_release(track.prefill)
        self.p.assert_empty()
        self.d.assert_empty()

    # How the router and the workers do it

    def live(self):
        return [track for track in self.tracks if not track.over and not self.complete(track)]

    def importing(self):
        return [track for track in self.live() if not track.resumed]

    def complete(self, track):
        return all(choice in track.given_up or self.ended(track, choice) for choice in range(track.request.params.n))

    def ended(self, track, choice):
        at_prefill = track.prefill is not None and track.prefill + choice in self.p.said.finishes
        return at_prefill or track.handle + choice in track.decode.said.finishes

    def tokens(self, track, choice):
        at_prefill = [] if track.prefill is None else self.p.said.tokens.get(track.prefill + choice, [])
        at_decode = track.decode.said.tokens.get(track.handle + choice, [])
        if track.decode is self.p and track.prefill is None:
            at_prefill = []
        return [*track.before.get(choice, []), *at_prefill, *at_decode]

    def expected(self, track):
        return self.run_alone(track.request.prompt_token_ids, track.request.params)

    def chunks(self, track):
        return [chunk for chunk in self.p.said.exports if chunk.handle == track.prefill]

    def settle(self):
        """Where every choice ended at prefill, decode has nothing to wait for, and nobody will pull."""
        for track in self.tracks:
            if not track.over and not track.resumed and self.complete(track):
                track.decode.engine.cancel(track.handle)
                self.p.engine.export_release(track.prefill)
                track.resumed = True

    def finish_flight(self, bench):
        batch = self.in_flight.pop(bench, None)
        if batch is not None:
            bench.take(bench.engine.finish(batch))

    def pull_one(self, track, release):
        for chunk in self.chunks(track)[track.pulled : track.pulled + 1]:
            if track.decode.pull(self.p, track.handle, chunk):
                track.pulled += 1
                if release:
                    self.p.engine.export_release(track.prefill, chunk.chunk_index)

    def resume_if_whole(self, track):
        chunks = self.chunks(track)
        if track.resumed or not chunks or not chunks[-1].final or track.pulled < len(chunks):
            return
        n = track.request.params.n
        tokens = [self.p.said.tokens.get(track.prefill + choice, []) for choice in range(n)]
        finished = [choice in track.given_up or track.prefill + choice in self.p.said.finishes for choice in range(n)]
        track.decode.engine.resume(track.handle, tokens, finished)
        self.p.engine.export_release(track.prefill)
        track.resumed = True

    def snapshot(self, track):
        """Remember what a slow reader might still read."""
        memory = self.p.engine.memory
        for chunk in self.chunks(track):
            for block, generation in zip(chunk.blocks, chunk.generations, strict=True):
                if memory.generations[block] == generation:
                    self.stale.append((block, generation, memory.blocks[block].tobytes()))

    def drop_prefill(self, track):
        if track.prefill is not None:
            self.snapshot(track)
            self.p.engine.cancel(track.prefill)


@pytest.mark.parametrize("host", [True, False], ids=["host", "device"])
def test_whatever_happens_tokens_are_right_and_no_block_is_lost(bench, request_of, alone, host):
    @lru_cache(maxsize=4096)
    def run_alone(prompt, params):
        from dataclasses import replace

        return alone(replace(request_of(prompt), params=params))

    machine = type(
        "BoundMachine",
        (Machine,),
        {
            "make_bench": staticmethod(bench),
            "make_request": staticmethod(request_of),
            "run_alone": staticmethod(run_alone),
            "host": host,
        },
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
