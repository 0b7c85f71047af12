"""Look into a node's KV store, check it, empty it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

from kvstore.types import KEY_BYTES, Tier
from pdserve.config import TlsConfig, parse_override
from pdserve.errors import InvalidRequest
from pdserve.rpc import Channel
from pdserve.wire import store as wire
from pdserve_cli.block_bytes import block_bytes

TIMEOUT_S = 600.0
"""A verify reads everything, the disk tier included."""
FOUND_CORRUPT = 3
"""Exit code of a verify that found, and dropped, wrong blocks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _action(verbs, "ls", _ls, "list blocks: key/fingerprint, tier, slot, tenant, holds").add_argument(
        "--limit", type=int, default=0, help="blocks to list; 0: all"
    )
    _action(verbs, "stat", _stat, "the store at a glance")
    _targets(_action(verbs, "verify", _verify, "compare bytes with digests and drop what is wrong (exit code 3)"))
    _targets(_action(verbs, "drop", _drop, "make blocks invisible at once, on every tier"))
    text = "what a store's block_bytes must be for workers with these config keys"
    size = verbs.add_parser("block-bytes", help=text, description=text)
    size.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="worker config, repeatable")
    size.set_defaults(handler=None)


def _action(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    handler: Callable[[Channel, argparse.Namespace], Awaitable[int]],
    text: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="the store's gRPC address")
    parser.add_argument("--json", action="store_true", help="one JSON value instead of text")
    for part in ("cert", "key", "ca"):
        parser.add_argument(f"--tls-{part}", default="", metavar="PEM", help=f"mutual TLS: {part} file")
    parser.add_argument("--tls-server-name", default="", metavar="NAME", help="name that the store must prove")
    parser.set_defaults(handler=handler)
    return parser


def _targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("blocks", nargs="*", metavar="KEY/FINGERPRINT", help="blocks as `ls` prints them")
    parser.add_argument("--all", action="store_true", help="whatever is there")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "block-bytes":
        print(block_bytes(dict(parse_override(text) for text in arguments.set)))
        return 0
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    tls = TlsConfig(
        cert_file=arguments.tls_cert,
        key_file=arguments.tls_key,
        ca_file=arguments.tls_ca,
        server_name=arguments.tls_server_name,
    )
    channel = Channel(arguments.address, tls=tls.rpc())
    try:
        status: int = await arguments.handler(channel, arguments)
    finally:
        await channel.close()
    return status


async def _ls(channel: Channel, arguments: argparse.Namespace) -> int:
    request = wire.ListQuery(arguments.limit)
    blocks = [b async for part in channel.stream(wire.LIST, request, timeout_s=TIMEOUT_S) for b in part.blocks]
    if arguments.json:
        _print_json([_plain(block) for block in blocks])
        return 0
    for block in blocks:
        holds = f"leases={block.leases}" + (" pinned" if block.pinned else "") if block.tier == Tier.DRAM else ""
        place = f"{Tier(block.tier).name.lower()} {block.slot if block.tier == Tier.DRAM else '-'}"
        print(f"{block.key.hex()}/{block.fingerprint.hex()} {place} {block.tenant or '-'} {holds}".rstrip())
    return 0


def _plain(block: wire.ListedBlock) -> dict[str, object]:
    plain = {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(block).items()}
    return {**plain, "tier": Tier(block.tier).name.lower()}


async def _stat(channel: Channel, arguments: argparse.Namespace) -> int:
    stat = await channel.call(wire.STAT, wire.StatQuery(), timeout_s=TIMEOUT_S)
    plain = asdict(stat)
    if arguments.json:
        _print_json(plain)
        return 0
    tenants = plain.pop("tenants")
    for name, value in plain.items():
        print(f"{name:16} {value}")
    for tenant, blocks in sorted(tenants.items()):
        print(f"tenant {tenant or '-'}: {blocks} blocks")
    return 0


async def _verify(channel: Channel, arguments: argparse.Namespace) -> int:
    checked = on_disk = 0
    corrupt: list[str] = []
    for fingerprint, keys in _chosen(arguments):
        request = wire.Verify(fingerprint, keys, arguments.all)
        verified = await channel.call(wire.VERIFY, request, timeout_s=TIMEOUT_S)
        checked, on_disk = checked + verified.checked, on_disk + verified.corrupt_on_disk
        corrupt += [key.hex() for key in verified.corrupt]
    if arguments.json:
        _print_json({"checked": checked, "corrupt": corrupt, "corrupt_on_disk": on_disk})
    else:
        print(f"{checked} blocks checked, {len(corrupt)} wrong in memory, {on_disk} on disk; wrong ones are dropped")
        print("\n".join(corrupt), end="\n" if corrupt else "")
    return FOUND_CORRUPT if corrupt or on_disk else 0


async def _drop(channel: Channel, arguments: argparse.Namespace) -> int:
    dropped = 0
    for fingerprint, keys in _chosen(arguments):
        request = wire.Drop(fingerprint, keys, arguments.all)
        dropped += (await channel.call(wire.DROP, request, timeout_s=TIMEOUT_S)).blocks
    if arguments.json:
        _print_json({"dropped": dropped})
    else:
        print(f"{dropped} blocks dropped")
    return 0


def _chosen(arguments: argparse.Namespace) -> list[tuple[bytes, tuple[bytes, ...]]]:
    """(fingerprint, keys) of each call to make. Raises `InvalidRequest`."""
    if arguments.all == bool(arguments.blocks):
        raise InvalidRequest("name blocks, or say --all", param="blocks")
    if arguments.all:
        return [(b"", ())]
    by_layout: dict[bytes, list[bytes]] = {}
    for text in arguments.blocks:
        key, fingerprint = _block(text)
        by_layout.setdefault(fingerprint, []).append(key)
    return [(fingerprint, tuple(keys)) for fingerprint, keys in by_layout.items()]


def _block(text: str) -> Sequence[bytes]:
    try:
        parts = [bytes.fromhex(part) for part in text.split("/")]
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is not hexadecimal", param="blocks") from error
    if [len(part) for part in parts] != [KEY_BYTES, KEY_BYTES]:
        raise InvalidRequest(f"{text!r} is not KEY/FINGERPRINT, {2 * KEY_BYTES} digits each", param="blocks")
    return parts


def _print_json(value: object) -> None:
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")
