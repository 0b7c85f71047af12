"""Hypothesis drives both ledgers through crashes, cancels, lost, doubled, late and reordered messages."""

from handover_model import World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

PREFILL, DECODE = ["p0", "p1"], ["d0"]
INDEX = st.integers(0, 1 << 16)


class Handover(RuleBasedStateMachine):
    """Anything may happen at any time, also between two pieces of a read."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(
        prefill=st.sampled_from(PREFILL),
        num_tokens=st.integers(1, 20),
        chunk_blocks=st.integers(1, 3),
        num_cached=st.integers(0, 3),
    )
    def submit(self, prefill: str, num_tokens: int, chunk_blocks: int, num_cached: int) -> None:
        self.world.submit(prefill, "d0", num_tokens, chunk_blocks * 4, min(num_cached, num_tokens // 4))

    def work(self) -> None:
        """All that is under way goes one step on, but for the pulls."""
        for _ in range(len(self.world.wire)):
            self.world.deliver()
        for worker in self.world.prefill.values():
            for handle in list(worker.engine.jobs):
                worker.step(handle)
        self.world.decode["d0"].try_reserves()

    @rule(rounds=st.integers(1, 4))
    def all_work(self, rounds: int) -> None:
        for _ in range(rounds):
            self.work()

    @rule(prefill=st.sampled_from(PREFILL), which=INDEX)
    def one_chunk(self, prefill: str, which: int) -> None:
        worker = self.world.prefill[prefill]
        handles = list(worker.engine.jobs)
        if handles:
            worker.step(handles[which % len(handles)])

    @rule(rounds=st.integers(1, 3))
    def all_work_and_pull(self, rounds: int) -> None:
        decode = self.world.decode["d0"]
        for _ in range(rounds):
            self.work()
            for pull_id in list(decode.pulls):
                decode.run_pull(pull_id)

    @precondition(lambda self: self.world.wire)
    @rule(which=INDEX, fate=st.sampled_from(["deliver", "drop", "double"]))
    def bad_network(self, which: int, fate: str) -> None:
        index = which % len(self.world.wire)
        if fate == "double":
            self.world.wire.append(self.world.wire[index])
        if fate == "drop":
            self.world.wire.pop(index)
        else:
            self.world.deliver(index)

    @precondition(lambda self: self.world.decode["d0"].pulls)
    @rule(
        which=INDEX,
        at=st.integers(0, 4),
        what=st.sampled_from(["reuse", "crash prefill", "crash decode", "cancel decode", "time", "retry"]),
    )
    def disturbed_pull(self, which: int, at: int, what: str) -> None:
        """Something happens before the `at`-th piece of the read."""
        decode = self.world.decode["d0"]
        pulls = list(decode.pulls)
        pull_id = pulls[which % len(pulls)]
        action = decode.pulls[pull_id].action
        exporter = self.world.prefill[action.ticket.worker_id]
        pieces = 0

        def between() -> None:
            nonlocal pieces
            pieces += 1
            if pieces != at + 1:
                return
            if what == "reuse":
                self.reuse_everything(exporter.name)
            elif what == "crash prefill":
                self.world.start_prefill(exporter.name)
            elif what == "crash decode":
                self.world.start_decode("d0")
            elif what == "cancel decode":
                decode.do(decode.ledger.cancel(action.handle))
            elif what == "time":
                self.world.advance(35.0)
            else:
                self.retry_prefill(which, "p1")

        decode.run_pull(pull_id, between)

    def reuse_everything(self, name: str) -> None:
        """Cancel all of a prefill worker's requests, give every block to another owner, and free it again."""
        worker = self.world.prefill[name]
        for handle in list(worker.engine.jobs):
            worker.cancel(handle)
        pool = worker.engine.pool
        blocks = pool.allocate(-1, len(pool.free))
        assert blocks is not None
        pool.release(-1, blocks)

    def retry_prefill(self, which: int, prefill: str) -> None:
        handles = [h for h in self.world.decode["d0"].engine.jobs if h not in self.world.resumed]
        if handles:
            self.world.submit_prefill(prefill, "d0", handles[which % len(handles)], 8)

    def cancel(self, which: int, side: str) -> None:
        handles = list(self.world.prompts)
        if not handles:
            return
        handle = handles[which % len(handles)]
        decode = self.world.decode["d0"]
        if side != "decode":
            self.world.cancel_prefill_of(handle)
        if side != "prefill" and handle not in self.world.resumed:
            decode.do(decode.ledger.cancel(handle))

    @rule(
        which=INDEX,
        prefill=st.sampled_from(PREFILL),
        what=st.sampled_from(
            ["reuse", "retry", "cancel prefill", "cancel decode", "cancel both", "crash prefill", "crash decode"]
        ),
    )
    def trouble(self, which: int, prefill: str, what: str) -> None:
        match what.split():
            case ["reuse"]:
                self.reuse_everything(prefill)
            case ["retry"]:
                self.retry_prefill(which, prefill)
            case ["cancel", side]:
                self.cancel(which, side)
            case ["crash", "prefill"]:
                self.world.start_prefill(prefill)
            case _:
                self.world.start_decode("d0")

    @rule(seconds=st.sampled_from([0.1, 5.0, 11.0, 31.0, 101.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)
        for handle in self.world.resumed:
            self.world.decode["d0"].engine.cancel(handle)  # they decoded to their end

    @invariant()
    def pools_are_sound(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.check()
        self.world.check_nothing_is_left()
        self.world.close()


TestHandover = Handover.TestCase
TestHandover.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
