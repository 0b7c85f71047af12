"""Configuration: one frozen value per process, from a YAML file and dotted overrides; unknown keys are errors.

Every field says its unit, its default and why that is the default; `python -m pdserve.config` prints them all as the
tables of docs/configuration.md. Nothing reads the environment or a file later than `load`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from pdserve.errors import ConfigError
from pdserve.rpc import Tls

ConfigT = TypeVar("ConfigT", bound="Config")


def _doc(text: str, unit: str = "", **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, extra={"unit": unit}, **limits)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every config: frozen, keyword-only, strict."""


class TlsConfig(Config, frozen=True):
    """Certificates for gRPC between processes (mutual) or for the HTTP face."""

    cert_file: Annotated[str, _doc("PEM certificate chain. Read again when it changes.")] = ""
    key_file: Annotated[str, _doc("PEM private key.")] = ""
    ca_file: Annotated[
        str, _doc("PEM authority that peers must come from; empty on the HTTP face: no client cert.")
    ] = ""
    server_name: Annotated[str, _doc("Name a server must prove; empty: the dialled host.")] = ""

    def rpc(self) -> Tls | None:
        """None when no certificate is configured. Raises `ConfigError` when only a part of it is."""
        given = [bool(self.cert_file), bool(self.key_file), bool(self.ca_file)]
        if not any(given):
            return None
        if not all(given):
            raise ConfigError("tls needs cert_file, key_file and ca_file together", key="tls")
        return Tls(self.cert_file, self.key_file, self.ca_file, self.server_name)


class MooncakeConfig(Config, frozen=True):
    """The transport `mooncake`."""

    protocol: Annotated[str, _doc("tcp | rdma. tcp: works anywhere, but our own tcp is faster.")] = "tcp"
    device: Annotated[str, _doc("RDMA devices, comma-separated; empty: all of the machine.")] = ""


class TracingConfig(Config, frozen=True):
    """Traces by OpenTelemetry; needs `pdserve[otel]`."""

    endpoint: Annotated[str, _doc("host:port or URL of an OTLP gRPC receiver; empty: no traces, at no cost.")] = ""
    tls: Annotated[bool, _doc("Speak TLS with it, by the system's authorities.")] = False
    sample_ratio: Annotated[
        float, _doc("Of requests whose caller did not decide; a caller's traceparent does.", "ratio", ge=0, le=1)
    ] = 1.0


class SimConfig(Config, frozen=True):
    """The engine without weights."""

    timing: Annotated[str, _doc("Timing preset of pdserve.engine.timing, or fixed: the two below.")] = "instant"
    prefill_ms: Annotated[float, _doc("With timing fixed: a step that has prompt tokens.", "ms", ge=0)] = 0.0
    decode_ms: Annotated[float, _doc("With timing fixed: a step of decodes alone.", "ms", ge=0)] = 0.0
    speedup: Annotated[float, _doc("Divides every duration.", "ratio", gt=0)] = 1.0
    vocab_size: Annotated[int, _doc("Tokens drawn from; the embedded tokenizer's.", "tokens", ge=16)] = 49152
    max_model_len: Annotated[int, _doc("Prompt and output together.", "tokens", ge=16)] = 131072


class RegistryConfig(Config, frozen=True):
    """The list of workers in Redis: workers write themselves there, routers with `discovery: redis` follow it."""

    url: Annotated[str, _doc("redis://HOST:PORT/DB or rediss://...; empty: none.")] = ""
    prefix: Annotated[str, _doc("Names the list: fleets that share a Redis need one each.")] = "pdserve"
    ttl_s: Annotated[
        float, _doc("A worker that went silent for so long is forgotten; it renews three times in it.", "s", gt=0)
    ] = 15.0
    timeout_s: Annotated[float, _doc("Of one command.", "s", gt=0)] = 2.0


class KubernetesConfig(Config, frozen=True):
    """Workers as the EndpointSlices of their headless Services."""

    namespace: Annotated[str, _doc("Of the Services; empty: this pod's own, or the kubeconfig's.")] = ""
    selector: Annotated[
        str, _doc("Labels of the Services, which Kubernetes copies to their slices; several models may share them.")
    ] = "pdserve.io/workers"
    port_name: Annotated[str, _doc("Name of the Services' port that workers listen on.")] = "grpc"
    kubeconfig: Annotated[str, _doc("Path; empty: the pod's service account.")] = ""
    context: Annotated[str, _doc("Of the kubeconfig; empty: its current one.")] = ""
    watch_s: Annotated[
        float, _doc("A watch is made anew after this. A hung API server is noticed within it.", "s", ge=1)
    ] = 30.0
    resync_s: Annotated[float, _doc("Everything is listed anew after this, whatever was missed.", "s", gt=0)] = 300.0
    timeout_s: Annotated[float, _doc("Of one call, watches aside.", "s", gt=0)] = 10.0


class WorkerConfig(Config, frozen=True):
    """A prefill or decode worker."""

    worker_id: Annotated[str, _doc("Name in metrics, records and placement; empty: role and address.")] = ""
    listen: Annotated[str, _doc("gRPC address; port 0 takes a free one. Loopback: nothing is exposed unasked.")] = (
        "127.0.0.1:0"
    )
    advertise: Annotated[str, _doc("host:port that peers dial; empty: the bound address.")] = ""
    http_listen: Annotated[str, _doc("Address of /healthz, /readyz and /metrics.")] = "127.0.0.1:0"
    allow_plaintext: Annotated[
        bool, _doc("Serve without TLS beyond loopback. Off: a KV port in the clear must be a decision.")
    ] = False
    tls: TlsConfig = TlsConfig()
    engine: Annotated[str, _doc("torch | vllm | sim.")] = "torch"
    model: Annotated[str, _doc("embedded, a folder, a .gguf file or a hub id.")] = "embedded"
    model_name: Annotated[str, _doc("Name that clients use; empty: the model's own.")] = ""
    dtype: Annotated[str, _doc("bf16 | fp32. bf16: half the memory, twice the speed on AVX512-bf16 and GPUs.")] = "bf16"
    device: Annotated[str, _doc("cpu | cuda | cuda:N, for the torch engine.")] = "cpu"
    threads: Annotated[
        int, _doc("torch threads. One: with two on shared cores a step took 370 ms instead of 48.", "threads", ge=1)
    ] = 1
    deterministic: Annotated[
        bool,
        _doc(
            "Run every request batch-invariant, not only those that ask for it. Shares KV only with its like (torch)."
        ),
    ] = False
    block_tokens: Annotated[int, _doc("KV block size; equal in a whole pool. vLLM's default.", "tokens", ge=1)] = 16
    num_blocks: Annotated[int, _doc("KV blocks. 0: what kv_memory_bytes holds.", "blocks", ge=0)] = 0
    kv_memory_bytes: Annotated[
        int, _doc("KV pool when num_blocks is 0. 512 MiB: 22,000 tokens of the embedded model.", "bytes", ge=1 << 16)
    ] = 512 << 20
    max_num_seqs: Annotated[int, _doc("Sequences in a batch.", "sequences", ge=1)] = 64
    max_num_batched_tokens: Annotated[
        int, _doc("Token budget of a step; bounds how long decodes wait behind prompts.", "tokens", ge=1)
    ] = 2048
    chunk_tokens: Annotated[
        int, _doc("Most tokens of one prompt in a step. Each finished chunk is exported at once.", "tokens", ge=1)
    ] = 512
    max_model_len: Annotated[int, _doc("Caps the model's own limit; 0: the model's.", "tokens", ge=0)] = 0
    prefix_cache: Annotated[bool, _doc("Keep finished blocks findable by key until their room is needed.")] = True
    cache_policy: Annotated[
        Literal["lru", "hazard", "s3fifo"],
        _doc(
            "Which cached blocks of the engine's own pool (sim, torch) are given up first. hazard learns who comes "
            "back: replaying the Mooncake conversation trace it hits 1.6 times as often as lru at 1M tokens a worker. "
            "For each block that fills it looks at the request's whole chain: with short blocks lru is the default."
        ),
    ] = "lru"
    transports: Annotated[
        tuple[str, ...],
        _doc(
            "shm | tcp | mooncake | nixl | gloo | nccl, in order of preference; shm is used only between workers of "
            "one host. The last four need `make transports`; docs/support.md says what was ever run."
        ),
    ] = ("shm", "tcp")
    mooncake: MooncakeConfig = MooncakeConfig()
    transport_host: Annotated[str, _doc("Address the tcp transport listens on; empty: the host of `listen`.")] = ""
    digest_every: Annotated[
        int, _doc("On shm, check the digest of every n-th block (tcp: of all). 1: all.", "blocks", ge=1)
    ] = 16
    ticket_lease_s: Annotated[
        float, _doc("A ticket nobody renews is void after this; its blocks are freed. vLLM's default.", "s", gt=0)
    ] = 30.0
    bind_timeout_s: Annotated[float, _doc("Bound of one control call to the other worker.", "s", gt=0)] = 5.0
    transfer_timeout_s: Annotated[float, _doc("A pull without progress for this long fails.", "s", gt=0)] = 10.0
    relay_timeout_s: Annotated[
        float, _doc("Decode waits this long for the next manifest or first token.", "s", gt=0)
    ] = 60.0
    pull_credit_bytes: Annotated[
        int, _doc("KV in flight towards this worker at once; beyond it pulls wait their turn.", "bytes", ge=1 << 16)
    ] = 256 << 20
    pull_threads: Annotated[int, _doc("Threads that move bulk bytes.", "threads", ge=1)] = 2
    session_buffer_steps: Annotated[
        int, _doc("Steps a slow router may fall behind before its stream is closed.", "messages", ge=1)
    ] = 256
    drain_timeout_s: Annotated[
        float, _doc("After SIGTERM: what runs may finish for so long. Kubernetes' grace must exceed it.", "s", ge=0)
    ] = 25.0
    log_level: Annotated[str, _doc("debug | info | warning | error.")] = "info"
    tracing: TracingConfig = TracingConfig()
    labels: Annotated[dict[str, str], _doc("Topology: node, rack, rdma_group.")] = msgspec.field(default_factory=dict)
    sim: SimConfig = SimConfig()
    vllm: Annotated[dict[str, Any], _doc("Engine arguments, verbatim to vLLM (but for those pdserve owns).")] = (
        msgspec.field(default_factory=dict)
    )
    store: Annotated[str, _doc("host:port of this node's KV store; empty: none.")] = ""
    store_advertise: Annotated[str, _doc("The same as routers and other nodes dial it; empty: `store`.")] = ""
    store_fetch: Annotated[
        str, _doc("auto | always | never: bring prompts' blocks from stores where that is faster than to compute.")
    ] = "auto"
    store_timeout_s: Annotated[
        float, _doc("A store that takes longer to look a prompt up is done without. Disk takes tens of ms.", "s", gt=0)
    ] = 2.0
    store_digest_every: Annotated[
        int, _doc("Check the digest of every n-th block that is fetched (tcp: of all). 1: all.", "blocks", ge=1)
    ] = 1
    store_backlog_blocks: Annotated[
        int, _doc("Blocks that may wait to be stored; beyond it the oldest are dropped.", "blocks", ge=1)
    ] = 8192
    registry: RegistryConfig = RegistryConfig()
    kv_load_failure: Annotated[str, _doc("vllm: recompute | fail, when KV cannot be loaded.")] = "fail"


class DiskConfig(Config, frozen=True):
    """The KV store's disk tier."""

    path: Annotated[str, _doc("Folder of segment files, this store's alone; empty: no disk tier.")] = ""
    capacity_bytes: Annotated[int, _doc("All its files together.", "bytes", ge=1 << 20)] = 16 << 30
    direct: Annotated[bool, _doc("O_DIRECT: past the page cache, for a tier much larger than memory.")] = False
    fsync: Annotated[bool, _doc("Sync each full segment: it then survives a power cut, too.")] = False
    threads: Annotated[int, _doc("That read and write.", "threads", ge=1)] = 4


class KvstoreConfig(Config, frozen=True):
    """A node's KV store."""

    node_id: Annotated[str, _doc("Name in the index; empty: kvstore and the host name, as there is one a node.")] = ""
    listen: Annotated[str, _doc("gRPC address; port 0 takes a free one.")] = "127.0.0.1:0"
    advertise: Annotated[str, _doc("host:port that clients dial; empty: the bound address.")] = ""
    http_listen: Annotated[str, _doc("Address of /healthz, /readyz and /metrics.")] = "127.0.0.1:0"
    allow_plaintext: Annotated[
        bool, _doc("Serve without TLS beyond loopback. The pool's handle is given to loopback alone even then.")
    ] = False
    tls: TlsConfig = TlsConfig()
    block_bytes: Annotated[
        int, _doc("Bytes of one KV block: block_bytes of the workers' layout. Required.", "bytes", ge=0)
    ] = 0
    num_blocks: Annotated[int, _doc("Blocks of the DRAM pool. 0: what memory_bytes holds.", "blocks", ge=0)] = 0
    memory_bytes: Annotated[
        int, _doc("DRAM pool when num_blocks is 0, in /dev/shm, allocated at start.", "bytes", ge=1 << 16)
    ] = 1 << 30
    eviction: Annotated[str, _doc("hazard | lru | s3fifo.")] = "hazard"
    high_watermark: Annotated[float, _doc("Share of blocks in use at which eviction starts.", "ratio", gt=0, le=1)] = (
        0.95
    )
    low_watermark: Annotated[float, _doc("Share at which it stops.", "ratio", gt=0, le=1)] = 0.90
    lease_s: Annotated[float, _doc("A reader that does not renew for so long has died.", "s", gt=0)] = 10.0
    max_lease_s: Annotated[float, _doc("A lease's end, however often it is renewed.", "s", gt=0)] = 300.0
    reservation_s: Annotated[float, _doc("From a reservation to its commit.", "s", gt=0)] = 30.0
    abandoned_s: Annotated[
        float, _doc("Slots of a lapsed reservation rest so long when its writer can't be seen to be dead.", "s", ge=0)
    ] = 300.0
    quota_bytes: Annotated[int, _doc("DRAM that a tenant may hold; 0: no limit.", "bytes", ge=0)] = 0
    quotas: Annotated[
        dict[str, int], _doc("For single tenants, by the hex root of their keys (`pdserve kv stat`).", "bytes")
    ] = msgspec.field(default_factory=dict)
    digest_every: Annotated[
        int, _doc("Check the digest of every n-th block at its commit. 1: all.", "blocks", ge=1)
    ] = 16
    scrub_blocks: Annotated[
        int, _doc("Compared with their digests each second while nobody calls; 0: off.", "blocks", ge=0)
    ] = 64
    transports: Annotated[
        tuple[str, ...], _doc("By which the pool can be reached: shm | tcp | mooncake | nixl | gloo | nccl.")
    ] = ("shm", "tcp")
    mooncake: MooncakeConfig = MooncakeConfig()
    transport_host: Annotated[str, _doc("Address the tcp transport listens on; empty: the host of `listen`.")] = ""
    transfer_timeout_s: Annotated[float, _doc("A transfer without progress for this long fails.", "s", gt=0)] = 10.0
    disk: DiskConfig = DiskConfig()
    drain_timeout_s: Annotated[float, _doc("After SIGTERM: readers and writers may finish for so long.", "s", ge=0)] = (
        10.0
    )
    tracing: TracingConfig = TracingConfig()
    log_level: Annotated[str, _doc("debug | info | warning | error.")] = "info"


class ModelConfig(Config, frozen=True):
    """One of several models that a router serves; its key in `models` is the name that workers serve it by."""

    model: Annotated[str, _doc("Tokenizer and template: embedded, a folder, a .gguf file or a hub id.")] = "embedded"
    aliases: Annotated[tuple[str, ...], _doc("Further names for it.")] = ()
    timing: Annotated[str, _doc("As the router's `timing`, for this model; empty: that one.")] = ""


class SloConfig(Config, frozen=True):
    """What clients are promised. Histograms have a bucket that ends there."""

    ttft_ms: Annotated[float, _doc("Arrival to first token.", "ms", gt=0)] = 2000.0
    itl_ms: Annotated[float, _doc("Mean gap between tokens.", "ms", gt=0)] = 30.0
    enforce: Annotated[
        bool, _doc("Refuse (429) what would wait longer for a worker than ttft_ms, by the queue's present pace.")
    ] = False


class BreakerConfig(Config, frozen=True):
    """When a link between a prefill and a decode worker is left alone for a while."""

    failures: Annotated[int, _doc("Bad hand-overs in a row.", "requests", ge=1)] = 3
    slow_ms: Annotated[
        float,
        _doc("A hand-over is bad that takes so much longer than computing the prompt at decode would.", "ms", gt=0),
    ] = 250.0
    rest_s: Annotated[
        float, _doc("Before one request tries it again; doubles up to a minute while trials fail.", "s", gt=0)
    ] = 5.0


class RouterConfig(Config, frozen=True):
    """The router."""

    router_id: Annotated[str, _doc("Name in metrics and records; empty: made at start.")] = ""
    http_listen: Annotated[str, _doc("OpenAI HTTP address.")] = "127.0.0.1:8000"
    grpc_listen: Annotated[str, _doc("gRPC address of InferenceService and Open Inference Protocol.")] = (
        "127.0.0.1:8001"
    )
    allow_plaintext: Annotated[bool, _doc("Serve gRPC without TLS beyond loopback.")] = False
    tls: TlsConfig = TlsConfig()
    http_tls: TlsConfig = TlsConfig()
    worker_tls: TlsConfig = TlsConfig()
    discovery: Annotated[str, _doc("static | kubernetes | redis: who tells where the workers are.")] = "static"
    workers: Annotated[tuple[str, ...], _doc("host:port of every worker (static discovery).")] = ()
    kubernetes: KubernetesConfig = KubernetesConfig()
    registry: RegistryConfig = RegistryConfig()
    model: Annotated[str, _doc("Tokenizer and template: embedded, a folder, a .gguf file or a hub id.")] = "embedded"
    model_name: Annotated[str, _doc("Name that clients use; empty: the model's own.")] = ""
    aliases: Annotated[dict[str, str], _doc("Further names, each of a served model.")] = msgspec.field(
        default_factory=dict
    )
    models: Annotated[
        dict[str, ModelConfig], _doc("Several models, by name; then `model` and `model_name` stand for none.")
    ] = msgspec.field(default_factory=dict)
    policy: Annotated[
        str,
        _doc("conductor | round_robin | least_loaded | power_of_two | prefix_only | session: how workers are chosen."),
    ] = "conductor"
    disaggregate: Annotated[
        str, _doc("auto | always | never: whether prompts go to the prefill pool; auto: where that is faster.")
    ] = "auto"
    timing: Annotated[
        str,
        _doc(
            "Timing preset of pdserve.engine.timing that predictions start from; what is observed corrects it. Empty: "
            "smollm2-135m-cpu for the embedded model, llama-3.1-8b-h100-tp1 for others."
        ),
    ] = ""
    slo: SloConfig = SloConfig()
    breaker: BreakerConfig = BreakerConfig()
    index_max_blocks: Annotated[
        int, _doc("Blocks that the prefix index knows; some 150 bytes each. 2M: 32M tokens.", "blocks", ge=1024)
    ] = 2_000_000
    block_tokens: Annotated[int, _doc("Of block keys; must equal the workers'.", "tokens", ge=1)] = 16
    server_secret: Annotated[str, _doc("Keys the tenant salt. Empty: random per start, so no cache outlives it.")] = ""
    max_inflight: Annotated[int, _doc("Requests at once; one more gets 429.", "requests", ge=1)] = 4096
    max_waiting: Annotated[
        int, _doc("Of these, such as wait at the router for a worker; one more gets 429.", "requests", ge=1)
    ] = 2048
    max_retries: Annotated[
        int, _doc("Placements after the first, when a worker is lost or a hand-over fails.", "requests", ge=0)
    ] = 2
    max_body_bytes: Annotated[int, _doc("HTTP body and gRPC message.", "bytes", ge=1024)] = 8 << 20
    client_buffer_bytes: Annotated[
        int, _doc("Unsent output a client may pile up before its request is cancelled.", "bytes", ge=1024)
    ] = 1 << 20
    header_timeout_s: Annotated[float, _doc("For a request's head to arrive (slow loris).", "s", gt=0)] = 10.0
    body_timeout_s: Annotated[float, _doc("Between two pieces of a body.", "s", gt=0)] = 30.0
    keepalive_timeout_s: Annotated[float, _doc("An idle connection is closed after this.", "s", gt=0)] = 75.0
    queue_timeout_s: Annotated[float, _doc("A request may wait so long at the router for a worker.", "s", gt=0)] = 60.0
    worker_grace_s: Annotated[
        float,
        _doc(
            "A request that finds no worker of a role waits so long for one that is known and may come soon: not "
            "connected yet, restarting, or draining and to be replaced. 0: it is refused at once.",
            "s",
            ge=0,
        ),
    ] = 5.0
    prefill_timeout_s: Annotated[
        float, _doc("Without progress at prefill for this long the request fails there.", "s", gt=0)
    ] = 120.0
    transfer_timeout_s: Annotated[
        float, _doc("From the first token to the second: hand-over and decode's queue.", "s", gt=0)
    ] = 60.0
    decode_timeout_s: Annotated[float, _doc("Between two decoded tokens.", "s", gt=0)] = 60.0
    heartbeat_s: Annotated[
        float, _doc("A worker that says nothing for so long is asked for a sign of life.", "s", ge=0.2)
    ] = 1.0
    heartbeats_missed: Annotated[
        int,
        _doc(
            "After so many intervals in a row without a word (a frozen process, a machine that is cut off) the worker "
            "counts as lost, and its requests go elsewhere. 5: a process on a crowded machine may pause for seconds.",
            "intervals",
            ge=2,
        ),
    ] = 5
    connect_backoff_s: Annotated[float, _doc("Longest wait between two tries to reach a worker.", "s", gt=0)] = 2.0
    drain_timeout_s: Annotated[float, _doc("After SIGTERM: what runs may finish for so long.", "s", ge=0)] = 25.0
    tracing: TracingConfig = TracingConfig()
    records: Annotated[int, _doc("Requests remembered for `explain`.", "requests", ge=0)] = 10_000
    log_level: Annotated[str, _doc("debug | info | warning | error.")] = "info"


_CHOICES: dict[str, frozenset[str]] = {
    "engine": frozenset({"torch", "vllm", "sim"}),
    "dtype": frozenset({"bf16", "fp32"}),
    "store_fetch": frozenset({"auto", "always", "never"}),
    "disaggregate": frozenset({"auto", "always", "never"}),
    "discovery": frozenset({"static", "kubernetes", "redis"}),
    "eviction": frozenset({"hazard", "lru", "s3fifo"}),
    "kv_load_failure": frozenset({"recompute", "fail"}),
    "log_level": frozenset({"debug", "info", "warning", "error"}),
}
_PATH = re.compile(r" - at `\$\.?(.*?)`")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")


def load(cls: type[ConfigT], path: str | None = None, overrides: Mapping[str, object] | None = None) -> ConfigT:
    """The config from a YAML file (if any) with dotted overrides (`sim.speedup`: 10) laid over it.

    Raises `ConfigError` whose `key` is the dotted path of what is wrong.
    """
    tree = _read(path) if path else {}
    for dotted, value in (overrides or {}).items():
        _set(tree, dotted, value)
    return from_mapping(cls, tree)


def from_mapping(cls: type[ConfigT], tree: Mapping[str, object]) -> ConfigT:
    """The same from a mapping, as `load` reads it from YAML."""
    try:
        config = msgspec.convert(tree, cls)
    except msgspec.ValidationError as error:
        raise _explain(error) from error
    for name, allowed in _CHOICES.items():
        value = getattr(config, name, None)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(sorted(allowed))}", key=name)
    return config


def parse_override(text: str) -> tuple[str, object]:
    """`key.path=value` with the value read as YAML, so numbers, booleans and lists can be given; `key.path=@FILE`
    takes a file's content as a string, so that a secret stands in no command line."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise ConfigError(f"{text!r} is not key=value", key=key or text)
    if value.startswith("@"):
        return key, _read_text(value[1:], key).rstrip("\n")
    return key, yaml.safe_load(value) if value else ""


def split_address(address: str, key: str) -> tuple[str, int]:
    """Raises `ConfigError` unless it is host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is not host:port", key=key)
    return host, int(port)


def to_mapping(config: Config) -> dict[str, Any]:
    """Plain data that `from_mapping` takes back."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain


def _read(path: str) -> dict[str, object]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", key="config") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", key="config") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping", key="config")
    return tree


def _read_text(path: str, key: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", key=key) from error


def _set(tree: dict[str, Any], dotted: str, value: object) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        below = tree.setdefault(name, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{dotted}: {name} is no section", key=dotted)
        tree = below
    tree[leaf] = value


def _explain(error: msgspec.ValidationError) -> ConfigError:
    text = str(error)
    at = _PATH.search(text)
    path = at.group(1) if at else ""
    unknown = _UNKNOWN.search(text)
    if unknown:
        key = f"{path}.{unknown.group(1)}" if path else unknown.group(1)
        return ConfigError(f"unknown key {key}", key=key)
    return ConfigError(f"{path}: {_PATH.sub('', text)}", key=path)


def fields(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, str, object, str, str]]:
    """(key, type, default, unit, meaning) of every field, sections flattened."""
    hints = get_type_hints(cls, include_extras=True)
    for field in msgspec.structs.fields(cls):
        hint = hints[field.name]
        key = prefix + field.name
        if isinstance(hint, type) and issubclass(hint, Config):
            yield from fields(hint, key + ".")
            continue
        kind, meta = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, msgspec.Meta())
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        yield (
            key,
            getattr(kind, "__name__", str(kind)),
            default,
            (meta.extra or {}).get("unit", ""),
            (meta.description or ""),
        )


def markdown() -> str:
    """docs/configuration.md."""
    lines = ["# Configuration", "", "Generated by `make docs` from `pdserve/config.py`; unknown keys are errors.", ""]
    for title, cls in (
        ("Router", RouterConfig),
        ("Worker (prefill and decode)", WorkerConfig),
        ("KV store", KvstoreConfig),
    ):
        lines += [f"## {title}", "", "| key | default | unit | meaning |", "|---|---|---|---|"]
        for key, _, default, unit, text in fields(cls):
            lines.append(f"| `{key}` | `{default!r}` | {unit} | {text.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
