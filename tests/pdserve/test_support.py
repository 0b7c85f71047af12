"""What was run where: the table is whole, the page is made from it, and start-up warns by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.transports.registry import NAMES, OPTIONAL
from pdserve.config import MooncakeConfig
from pdserve.support import HOLDERS, SUPPORT, TRANSPORTS, State, markdown, never_run

ROOT = Path(__file__).parents[2]


def test_every_combination_has_a_state_and_a_reason() -> None:
    assert set(SUPPORT) == {(engine, device, transport) for engine, device in HOLDERS for transport in TRANSPORTS}
    assert all(found.how for found in SUPPORT.values())


def test_every_transport_of_the_registry_is_in_the_table() -> None:
    assert {name.partition(" ")[0] for name in TRANSPORTS} == {*NAMES, *OPTIONAL}


def test_tests_that_the_table_names_are_there() -> None:
    named = {word.strip("`,") for found in SUPPORT.values() for word in found.how.split() if word.startswith("`tests/")}
    assert named
    assert all((ROOT / name).exists() for name in named)


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "support.md").read_text() == markdown(), "run `make docs`"


def test_what_was_run_gives_no_warning_and_what_was_not_gives_one_each() -> None:
    tcp = MooncakeConfig()
    assert never_run("sim", "cpu", ["shm", "tcp", "mooncake", "nixl", "gloo", "nccl"], tcp) == []
    (line,) = never_run("sim", "cpu", ["tcp", "mooncake"], MooncakeConfig(protocol="rdma"))
    assert "sim on cpu over mooncake (rdma) was never run" in line
    assert len(never_run("torch", "cuda:1", ["shm", "tcp"], tcp)) == 2
    assert len(never_run("an-engine-to-come", "cpu", ["shm"], tcp)) == 1


@pytest.mark.parametrize("key", [key for key, found in SUPPORT.items() if key[1] == "cuda"])
def test_no_combination_with_a_gpu_claims_to_have_run_without_a_gpu_test(key: tuple[str, str, str]) -> None:
    assert SUPPORT[key].state is State.NEVER
