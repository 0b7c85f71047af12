"""Every Prometheus metric, declared once.

Names are vLLM's where vLLM has one (`vllm:...`, label `model_name`), else they start with `pdserve_`. A process makes
one of these classes over its own registry; nothing is global. Labels are bound once (`.labels(...)` outside the hot
path), and counters on the hot path are raised once a step, not once a token.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
"""vLLM's time-to-first-token buckets, with finer steps around the usual SLO limits (0.2, 0.5, 1, 2 s)."""
ITL_BUCKETS_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
STORE_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def render(registry: CollectorRegistry) -> bytes:
    """The exposition text of `registry`, for /metrics."""
    return generate_latest(registry)


class WorkerMetrics:
    """What a prefill or decode worker counts."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ("model_name",), registry=registry).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ("model_name",), registry=registry).labels(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ("model_name",), registry=registry, buckets=buckets).labels(model_name)

        self.num_requests_running = gauge("vllm:num_requests_running", "Sequences in the running batch.")
        self.num_requests_waiting = gauge("vllm:num_requests_waiting", "Requests waiting for room.")
        self.kv_cache_usage = gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self.num_preemptions = gauge("vllm:num_preemptions", "Sequences preempted since start.")
        self.prefix_cache_queries = gauge("vllm:prefix_cache_queries", "Prompt tokens looked up since start.")
        self.prefix_cache_hits = gauge("vllm:prefix_cache_hits", "Prompt tokens found since start.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens whose prefill has finished.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens sampled.")
        self.requests_finished = Counter(
            "vllm:request_success",
            "Choices that ended here, by reason.",
            ("model_name", "finished_reason"),
            registry=registry,
        )
        self.model_name = model_name
        self.step_seconds = histogram("pdserve_engine_step_seconds", "Duration of an engine step.", ITL_BUCKETS_S)
        self.num_exported_blocks = gauge("pdserve_exported_blocks", "KV blocks held for decode workers to pull.")
        self.kv_bytes_pulled = Counter(
            "pdserve_kv_pulled_bytes", "KV bytes pulled from prefill workers.", ("transport",), registry=registry
        )
        self.kv_pull_seconds = Histogram(
            "pdserve_kv_pull_seconds",
            "Duration of one chunk's pull, checks included.",
            ("transport",),
            registry=registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self.handover_failures = Counter(
            "pdserve_handover_failures", "Hand-overs that failed closed, by reason.", ("reason",), registry=registry
        )
        self.tickets_expired = Counter(
            "pdserve_tickets_expired", "Tickets whose lease ran out before release.", registry=registry
        )
        self.sessions = Gauge("pdserve_router_sessions", "Routers connected.", registry=registry)


class RouterMetrics:
    """What a router counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def by_model(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ("model_name",), registry=registry, buckets=buckets)

        self.requests = Counter(
            "pdserve_requests",
            "Requests that ended, by HTTP-like status and reason.",
            ("model_name", "status", "reason"),
            registry=registry,
        )
        self.inflight = Gauge("pdserve_requests_inflight", "Requests under way.", registry=registry)
        self.prompt_tokens = Counter(
            "pdserve_prompt_tokens", "Prompt tokens of admitted requests.", ("model_name",), registry=registry
        )
        self.cached_tokens = Counter(
            "pdserve_cached_prompt_tokens", "Prompt tokens found in a cache.", ("model_name",), registry=registry
        )
        self.output_tokens = Counter(
            "pdserve_output_tokens", "Tokens sent to clients.", ("model_name",), registry=registry
        )
        self.ttft = by_model("vllm:time_to_first_token_seconds", "Arrival to first token.", LATENCY_BUCKETS_S)
        self.itl = by_model("vllm:inter_token_latency_seconds", "Mean gap between tokens, by request.", ITL_BUCKETS_S)
        self.e2e = by_model("vllm:e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS_S)
        self.prompt_length = by_model("vllm:request_prompt_tokens", "Prompt length.", TOKEN_BUCKETS)
        self.output_length = by_model("vllm:request_generation_tokens", "Output length.", TOKEN_BUCKETS)
        self.leg_seconds = Histogram(
            "pdserve_leg_seconds",
            "Time by leg: tokenise, prefill (submission to first token), transfer (first token to second), decode.",
            ("model_name", "leg"),
            registry=registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self.workers = Gauge(
            "pdserve_workers", "Workers connected, by role and state.", ("role", "state"), registry=registry
        )
        self.worker_lost = Counter(
            "pdserve_worker_lost", "Streams to workers that broke.", ("role",), registry=registry
        )
        self.placements = Counter(
            "pdserve_placements", "Requests placed, by worker and role.", ("worker_id", "role"), registry=registry
        )


class KvstoreMetrics:
    """What a node's KV store counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"pdserve_kvstore_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"pdserve_kvstore_{name}", text, labels, registry=registry)

        self.lookup_blocks = counter("lookup_blocks", "Blocks asked for.")
        self.hit_blocks = counter("hit_blocks", "Blocks found, by tier.", "tier")
        self.bytes = counter(
            "bytes", "Bytes stored (write) and promoted or leased (read), by tier.", "tier", "direction"
        )
        self.evictions = counter("evictions", "Blocks that left a tier, by reason.", "tier", "reason")
        self.integrity_failures = counter("integrity_failures", "Blocks whose bytes were wrong, by tier.", "tier")
        self.demotion_failures = counter("demotion_failures", "Blocks that the disk could not take.")
        self.quota_refusals = counter("quota_refusals", "Reservations refused for a tenant's quota.")
        self.lapsed = counter("lapsed", "Holds that ended by time, by kind.", "kind")
        self.blocks = gauge("blocks", "Blocks of the DRAM pool, by state.", "state")
        self.leases = gauge("leases", "Leases of readers.")
        self.reservations = gauge("reservations", "Reservations of writers, lapsed ones included.")
        self.largest_free_run = gauge("largest_free_run_blocks", "Longest run of free blocks.")
        self.attached = gauge("attached", "Clients attached.")
        self.disk_blocks = gauge("disk_blocks", "Blocks on disk.")
        self.disk_state = gauge("disk_state", "0: on, 1: read-only, 2: off.")
        self.seconds = Histogram(
            "pdserve_kvstore_seconds",
            "Duration of an operation, by kind.",
            ("operation",),
            registry=registry,
            buckets=STORE_BUCKETS_S,
        )
