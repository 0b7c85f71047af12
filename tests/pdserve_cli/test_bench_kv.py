"""`pdserve bench kv`: its arithmetic, the shape of its report, and its parts that need no peer."""

import argparse
import json
from pathlib import Path

import pytest

from pdserve_cli import bench_kv
from pdserve_cli.bench_kv import ratios
from pdserve_cli.bench_kv_disk import SIZES as DISK_SIZES
from pdserve_cli.bench_kv_disk import disk_ways
from pdserve_cli.bench_ways import Way, interleave, ratio


def timed(*seconds: float, nbytes: int = 10**9) -> Way:
    return Way(nbytes, lambda: None, seconds=list(seconds), cpu=[s / 2 for s in seconds])


def test_a_ways_figures_are_the_median_speed_and_the_mean_cpu() -> None:
    way = timed(1.0, 2.0, 9.0)
    assert way.gb_per_s == 0.5
    assert way.cpu_s_per_gb == 2.0


def test_a_ratio_is_taken_round_by_round_against_the_fastest_other() -> None:
    ours = timed(1.0, 10.0, 1.0)
    others = [timed(0.9, 9.0, 0.9), timed(5.0, 5.0, 5.0)]
    assert ratio(ours, others) == 0.9, "a slow round is slow for both"


def test_every_way_runs_once_a_round_and_fast_ones_more_often() -> None:
    runs = {"a": 0, "b": 0}

    def run(name: str) -> None:
        runs[name] += 1

    ways = {name: Way(1, lambda name=name: run(name)) for name in runs}
    interleave(ways, 4)
    for name, way in ways.items():
        assert len(way.seconds) == len(way.cpu) == 4
        assert runs[name] == 1 + 4 * way.repeat
        assert way.repeat > 1


def test_ratios_name_what_was_compared_and_leave_out_what_was_not_run() -> None:
    cases = {
        "handover": {"tcp": timed(1.0), "sockets": timed(1.0), "sockets_tuned": timed(0.5), "shm": timed(1.0)},
        "put_get_1mb": {"put": timed(1.0), "redis_put": timed(2.0)},
        "disk_read.1MB": {"tier": timed(1.0), "preadv_1": timed(2.0), "preadv_4": timed(0.8)},
    }
    assert ratios(cases) == {
        "handover.tcp_over_sockets": 0.5,
        "put_get_1mb.put_over_redis_put": 2.0,
        "disk_read.1MB.tier_over_preadv": 0.8,
    }


def test_the_disk_part_reads_what_it_wrote_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kv, "disk_ways", lambda sizes, folder: disk_ways(("1MB",), tmp_path))
    parser = argparse.ArgumentParser()
    bench_kv.add_arguments(parser)
    assert bench_kv.run(parser.parse_args(["--only", "disk", "--rounds", "1", "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        set(report["gb_per_s"]["disk_read"]["1MB"])
        == {"tier", "preadv_1", "preadv_4"}
        == set(report["cpu_s_per_gb"]["disk_read"]["1MB"])
    )
    assert report["ratios"]["disk_read.1MB.tier_over_preadv"] > 0
    assert "1MB" in DISK_SIZES
    assert list(tmp_path.iterdir()) == [], "nothing is left on the disk"
