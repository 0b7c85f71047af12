"""Every transport as a test parameter; those that can't be had here are skipped, with the reason that users get."""

from functools import cache

import pytest

from kvstore.transports.base import Transport
from kvstore.transports.registry import NAMES, OPTIONAL, make_transport
from kvstore.transports.tcp import TcpOptions
from pdserve.errors import ConfigError

EVERY = [*NAMES, *(pytest.param(name, marks=pytest.mark.transports) for name in OPTIONAL)]


@cache
def missing(name: str) -> str:
    """Why a transport can't be made here; empty: it can."""
    try:
        make_transport(name).close()
    except ConfigError as error:
        return error.message
    return ""


def make(name: str, progress_timeout_s: float = 10.0) -> Transport:
    """Skips the test when the transport can't be had."""
    if reason := missing(name):
        pytest.skip(reason)
    return make_transport(name, tcp=TcpOptions(progress_timeout_s=progress_timeout_s))
