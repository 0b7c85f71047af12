"""Packs a folder as a docker archive of one layer: archive.py [options] OUT.tar NAME:TAG ROOTFS COMMAND...

The same folder gives the same archive: entries are sorted, and times are cut off.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import tarfile
import tempfile
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
PIECE = 1 << 20


def write_layer(rootfs: Path, layer: io.BufferedRandom) -> str:
    """The layer's tar; returns its SHA-256."""
    with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(rootfs.rglob("*")):
            entry = tar.gettarinfo(path, arcname=str(path.relative_to(rootfs)))
            if entry is None:
                continue  # a socket
            entry.mtime = 0
            if entry.isreg():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
    layer.seek(0)
    digest = hashlib.sha256()
    while piece := layer.read(PIECE):
        digest.update(piece)
    layer.seek(0)
    return digest.hexdigest()


def image_config(options: argparse.Namespace, layer: str) -> bytes:
    config = {"Cmd": options.command, "Env": options.env, "User": options.user, "WorkingDir": options.workdir}
    return json.dumps(
        {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}"]},
            "history": [{"created_by": "deploy/docker/image.sh"}],
        }
    ).encode()


def pack(options: argparse.Namespace) -> None:
    with tempfile.TemporaryFile(dir=options.out.parent) as layer, tarfile.open(options.out, "w") as archive:
        digest = write_layer(options.rootfs, layer)
        config = image_config(options, digest)
        name = f"{hashlib.sha256(config).hexdigest()}.json"
        entry = tarfile.TarInfo(f"{digest}/layer.tar")
        entry.size = layer.seek(0, io.SEEK_END)
        layer.seek(0)
        archive.addfile(entry, layer)
        manifest = [{"Config": name, "RepoTags": [options.tag], "Layers": [entry.name]}]
        for file, data in ((name, config), ("manifest.json", json.dumps(manifest).encode())):
            entry = tarfile.TarInfo(file)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("tag")
    parser.add_argument("rootfs", type=Path)
    parser.add_argument("--user", default="0")
    parser.add_argument("--workdir", default="/")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    pack(parser.parse_args())


if __name__ == "__main__":
    main()
