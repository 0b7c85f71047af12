"""The harness itself, where no cluster is needed."""

import asyncio
import socket
import sys

from pdserve_cli.cluster import Cluster, ClusterSpec, Member


async def test_the_metrics_of_a_member_that_is_down_are_none(tmp_path):
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        ready = {"http_port": nobody_listens.getsockname()[1]}
        member = Member("decode-0", "decode", process, tmp_path / "log", (), {}, ready)
        cluster = Cluster(ClusterSpec())
        assert await cluster.metrics(member) == {}
        assert await cluster.metric(member, "vllm:num_requests_running") == 0
