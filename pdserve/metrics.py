"""Every Prometheus metric, declared once.

Names are vLLM's where vLLM has one (`vllm:...`, label `model_name`), else they start with `pdserve_`. A process makes
one of these classes over its own registry; nothing is global. Labels are bound once (`.labels(...)` outside the hot
path), and counters on the hot path are raised once a step, not once a token.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pdserve.loop_metrics import LoopCounter, LoopHistogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
"""vLLM's time-to-first-token buckets, with finer steps around the usual SLO limits (0.2, 0.5, 1, 2 s)."""
ITL_BUCKETS_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
STORE_BUCKETS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2.0, 4.0, 10.0)
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
        self._declare_store(registry)

    def _declare_store(self, registry: CollectorRegistry) -> None:
        """What the worker does with its node's store and with peers'."""
        prefix_tokens = Counter(
            "pdserve_prefix_tokens",
            "Prompt tokens by where their KV came from: hbm, dram (the node's store), disk (that brought it up from "
            "there just then), peer (another's store), computed.",
            ("tier",),
            registry=registry,
        )
        tiers = ("hbm", "dram", "disk", "peer", "computed")
        self.prefix_tokens = {tier: prefix_tokens.labels(tier) for tier in tiers}
        self.store_attached = Gauge("pdserve_store_attached", "1: the node's store can be used.", registry=registry)
        self.store_leases = Gauge("pdserve_store_leases", "Leases held on stores' blocks.", registry=registry)
        self.store_promoted_blocks = Counter(
            "pdserve_store_promoted_blocks", "Blocks that the node's store brought up from disk.", registry=registry
        )
        self.store_bytes = Counter(
            "pdserve_store_bytes",
            "KV bytes between the engine and stores, by tier and direction (read, write).",
            ("tier", "direction"),
            registry=registry,
        )
        self.store_seconds = Histogram(
            "pdserve_store_seconds",
            "Duration by operation: lookup, fetch_dram, fetch_peer, publish.",
            ("operation",),
            registry=registry,
            buckets=STORE_BUCKETS_S,
        )
        self.store_recomputes = Counter(
            "pdserve_store_recomputes",
            "Prompts of which a part was computed though a store was asked, by reason.",
            ("reason",),
            registry=registry,
        )
        self.store_publish_dropped = Counter(
            "pdserve_store_publish_dropped", "Blocks that were not stored, by reason.", ("reason",), registry=registry
        )


class RouterMetrics:
    """What a router counts. `slo_ttft_s` and `slo_itl_s` become bucket limits, so that the share of requests within
    the SLO is exact."""

    def __init__(self, registry: CollectorRegistry, *, slo_ttft_s: float = 2.0, slo_itl_s: float = 0.03) -> None:
        latency = tuple(sorted({*LATENCY_BUCKETS_S, slo_ttft_s}))
        gaps = tuple(sorted({*ITL_BUCKETS_S, slo_itl_s}))

        def by_model(name: str, text: str, buckets: tuple[float, ...]) -> LoopHistogram:
            return LoopHistogram(name, text, ("model_name",), registry, buckets)

        self.requests = LoopCounter(
            "pdserve_requests",
            "Requests that ended, by HTTP-like status and reason.",
            ("model_name", "status", "reason"),
            registry,
        )
        self.inflight = Gauge("pdserve_requests_inflight", "Requests under way.", registry=registry)
        self.prompt_tokens = LoopCounter(
            "pdserve_prompt_tokens", "Prompt tokens of admitted requests.", ("model_name",), registry
        )
        self.cached_tokens = LoopCounter(
            "pdserve_cached_prompt_tokens", "Prompt tokens found in a cache.", ("model_name",), registry
        )
        self.output_tokens = LoopCounter("pdserve_output_tokens", "Tokens sent to clients.", ("model_name",), registry)
        self.ttft = by_model("vllm:time_to_first_token_seconds", "Arrival to first token.", latency)
        self.itl = by_model("vllm:inter_token_latency_seconds", "Mean gap between tokens, by request.", gaps)
        self.e2e = by_model("vllm:e2e_request_latency_seconds", "Arrival to last token.", latency)
        self.prompt_length = by_model("vllm:request_prompt_tokens", "Prompt length.", TOKEN_BUCKETS)
        self.output_length = by_model("vllm:request_generation_tokens", "Output length.", TOKEN_BUCKETS)
        self.leg_seconds = LoopHistogram(
            "pdserve_leg_seconds",
            "Time by leg: tokenise, queue_prefill (until a worker is found), prefill (to the first token), transfer "
            "(until decode has the KV), queue_decode (to the second token), decode.",
            ("model_name", "leg"),
            registry=registry,
            buckets=latency,
        )
        self.workers = Gauge(
            "pdserve_workers", "Workers connected, by role and state.", ("role", "state"), registry=registry
        )
        self.discovery_up = Gauge(
            "pdserve_discovery_up",
            "1 while the API server or Redis answers; 0: the workers known so far stay, new ones are not seen.",
            registry=registry,
        )
        self.worker_lost = Counter(
            "pdserve_worker_lost", "Streams to workers that broke.", ("role",), registry=registry
        )
        self.placements = LoopCounter(
            "pdserve_placements", "Requests placed, by worker and role.", ("worker_id", "role"), registry
        )
        self.waiting = Gauge(
            "pdserve_requests_waiting", "Requests that wait for a worker.", ("model_name",), registry=registry
        )
        self.worker_grace = Counter(
            "pdserve_worker_grace",
            "Requests that found no worker and waited for one that was known: found, not_found, or ended before.",
            ("model_name", "outcome"),
            registry=registry,
        )
        self.retries = Counter(
            "pdserve_retries",
            "Requests placed again, by what failed before.",
            ("model_name", "reason"),
            registry=registry,
        )
        self.alone = Counter(
            "pdserve_placements_alone",
            "Requests that one worker did alone, by why.",
            ("model_name", "reason"),
            registry=registry,
        )
        self.forecast_error = LoopHistogram(
            "pdserve_forecast_ttft_ratio",
            "Observed over predicted time from placement to first token.",
            ("model_name",),
            registry=registry,
            buckets=RATIO_BUCKETS,
        )
        self.stall_spared = LoopCounter(
            "pdserve_disaggregation_spared_seconds",
            "Estimated: stalls of running streams that prompts computed elsewhere did not cause.",
            ("model_name",),
            registry,
        )
        self.transfer_spent = LoopCounter(
            "pdserve_disaggregation_spent_seconds",
            "What hand-overs cost their own requests between first and second token.",
            ("model_name",),
            registry,
        )
        self.disaggregation_gain = Gauge(
            "pdserve_disaggregation_gain_seconds",
            "Predicted gain of a pair over one worker alone, mean of late placements; below 0 it does not pay.",
            ("model_name",),
            registry=registry,
        )
        self.links_open = Gauge(
            "pdserve_links_open",
            "Links between workers that a breaker keeps from use.",
            ("model_name",),
            registry=registry,
        )
        self.link_trips = Counter(
            "pdserve_link_trips", "Times that a breaker opened, by reason.", ("model_name", "reason"), registry=registry
        )
        self.guessed_caches = Gauge(
            "pdserve_prefix_guessed_workers", "Workers that tell nothing of their prefix cache.", registry=registry
        )
        self.prefix_believed_tokens = Counter(
            "pdserve_prefix_believed_tokens", "Prompt tokens believed to be cached where they went.", registry=registry
        )
        self.prefix_found_tokens = Counter("pdserve_prefix_found_tokens", "Of these, found.", registry=registry)
        self.prefix_audit_ratio = Gauge(
            "pdserve_prefix_audit_ratio",
            "Found over believed tokens, late requests.",
            ("worker_id",),
            registry=registry,
        )
        self.prefix_distrusted = Counter(
            "pdserve_prefix_distrusted", "Times that a worker's cache was found out.", ("worker_id",), registry=registry
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
