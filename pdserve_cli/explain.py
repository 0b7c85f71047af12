"""Tell why a request went where it went: candidates, scores and reasons of each placement, what was predicted and what
came of it. A router remembers its last `records` requests; neither prompt nor output is kept."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from pdserve.errors import ServiceError, from_fields

TIMEOUT_S = 10.0
Fields = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="as in the answer's x-request-id header")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the router's HTTP address (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the record as it is")


def run(arguments: argparse.Namespace) -> int:
    record = fetch(arguments.url, arguments.request_id)
    print(json.dumps(record, indent=2) if arguments.json else "\n".join(lines(record)))
    return 0


def fetch(url: str, request_id: str) -> Fields:
    """Raises `NotFound` when the router knows nothing of it, `ServiceError` when it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/v1/requests/{quote(request_id, safe='')}", timeout=TIMEOUT_S) as response:
            record: Fields = json.load(response)
            return record
    except urllib.error.HTTPError as error:
        told = json.loads(error.read() or b"{}").get("error", {})
        raise from_fields({"reason": str(told.get("code")), "message": str(told.get("message"))}) from error
    except OSError as error:
        raise ServiceError(f"the router at {url} does not answer: {error}") from error


def lines(record: Fields) -> Iterator[str]:
    """The record as a text that reads from top to bottom."""
    ended = (
        f"{record['outcome']}{_at(record['leg'])} after {_s(record['ended_s'])}" if record["outcome"] else "under way"
    )
    yield f"{record['request_id']}: {ended}"
    yield f"  model {record['model']} (revision {record['revision']}), policy {record['policy']}"
    yield (
        f"  {record['num_prompt_tokens']} prompt tokens ({record['num_cached_tokens']} cached, of these "
        f"{record['num_fetched_tokens']} fetched from a store), {record['num_output_tokens']} output tokens, "
        f"{record['num_choices']} choice(s): {', '.join(record['finish_reasons']) or 'none ended'}"
    )
    seed = "drawn here" if record["seed_was_drawn"] else "the client's"
    yield f"  seed {record['seed']} ({seed}), tokenised in {_s(record['tokenised_s'])}"
    if not record["attempts"]:
        yield "  it was never placed" if record["outcome"] else "  it waits for a worker"
    for number, attempt in enumerate(record["attempts"], 1):
        yield from _attempt(number, attempt)


def _attempt(number: int, attempt: Fields) -> Iterator[str]:
    yield ""
    yield f"placement {number}: {_route(attempt)}, {attempt['outcome'] or 'under way'}"
    if attempt["num_prior_tokens"]:
        yield f"  went on behind {attempt['num_prior_tokens']} tokens that the client had"
    if attempt["waited_s"] >= 0.0005:
        yield f"  waited {_s(attempt['waited_s'])} at the router for a worker"
    for pick in attempt["picks"]:
        yield from _pick(pick)
    if attempt["prefix_store"]:
        yield f"  prefix to be fetched from the store at {attempt['prefix_store']}"
    if attempt["prefix_source"]:
        yield f"  the worker's cache was known by {attempt['prefix_source']}"
    yield from _legs(attempt)


def _route(attempt: Fields) -> str:
    if attempt["prefill_worker"] and attempt["decode_worker"]:
        return f"prefill on {attempt['prefill_worker']}, decode on {attempt['decode_worker']}"
    return f"all on {attempt['decode_worker'] or attempt['prefill_worker']}"


def _pick(pick: Fields) -> Iterator[str]:
    yield f"  {pick['role']}: {pick['worker']} of {pick['passed']} that could, {pick['workers']} connected"
    if pick["scores"]:
        yield "    " + ", ".join(f"{name} {_score(name, value)}" for name, value in pick["scores"].items())
    others = [f"{name} {value:.3f}" for name, value in pick["candidates"].items()]
    if others:
        yield f"    candidates: {', '.join(others)}"
    if pick["notes"]:
        yield f"    because: {', '.join(pick['notes'])}"


def _score(name: str, value: float) -> str:
    return _s(value) if name.endswith("_s") else f"{value:g}"


def _legs(attempt: Fields) -> Iterator[str]:
    """Predicted beside observed."""
    forecast, observed = attempt["forecast"], attempt["observed"]
    rows = [
        ("cached tokens", forecast["num_cached_tokens"], attempt["num_cached_tokens"]),
        ("fetched tokens", forecast["num_fetched_tokens"], attempt["num_fetched_tokens"]),
        ("to first token", _s(forecast["ttft_s"]), _s(observed["ttft_s"])),
    ]
    if attempt["prefill_worker"] and attempt["decode_worker"]:
        rows.append(("transfer", _s(forecast["transfer_s"]), _s(observed["transfer_s"])))
        rows.append(("queue at decode", "-", _s(observed["queue_decode_s"])))
    rows.append(("between tokens", _s(forecast["itl_s"]), _s(observed["itl_s"])))
    yield f"    {'':<16}{'predicted':>12}{'observed':>12}"
    for name, predicted, came in rows:
        yield f"    {name:<16}{_text(predicted):>12}{_text(came):>12}"


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _s(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _at(leg: str) -> str:
    return f" in the {leg} leg" if leg else ""
