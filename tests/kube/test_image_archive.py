"""The archive that `deploy/docker/image.sh` ends with: what container runtimes check of it."""

import hashlib
import importlib.util
import io
import json
import os
import tarfile

from kube_tools import ROOT, call

ARCHIVE = ROOT / "deploy" / "docker" / "archive.py"
OPTIONS = ("--user", "10001:10001", "--env", "A=b", "--workdir", "/tmp")


def pack(tmp_path, name="out.tar"):
    root = tmp_path / "root"
    if not root.exists():
        (root / "opt" / "app").mkdir(parents=True)
        (root / "opt" / "app" / "run").write_text("#!/bin/sh\n")
        (root / "opt" / "app" / "run").chmod(0o755)
        (root / "bin").symlink_to("opt/app")
    out = tmp_path / name
    call("python3", ARCHIVE, *OPTIONS, out, "name:tag", root, "run", "--help")
    return out


def test_digests_and_config_are_what_runtimes_compare(tmp_path):
    with tarfile.open(pack(tmp_path)) as archive:
        (manifest,) = json.load(archive.extractfile("manifest.json"))
        assert manifest["RepoTags"] == ["name:tag"]
        (layer,) = manifest["Layers"]
        data = archive.extractfile(layer).read()
        text = archive.extractfile(manifest["Config"]).read()
        config = json.loads(text)
        assert manifest["Config"] == hashlib.sha256(text).hexdigest() + ".json"
        assert config["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(data).hexdigest()]
        assert config["config"] == {
            "Cmd": ["run", "--help"],
            "Env": ["A=b"],
            "User": "10001:10001",
            "WorkingDir": "/tmp",
        }
        with tarfile.open(fileobj=io.BytesIO(data)) as tree:
            assert tree.getmember("opt/app/run").mode & 0o111
            assert tree.getmember("bin").linkname == "opt/app"


def test_the_same_folder_gives_the_same_archive(tmp_path):
    first = pack(tmp_path)
    os.utime(tmp_path / "root" / "opt" / "app" / "run", (1, 1))
    second = pack(tmp_path, "again.tar")
    assert first.read_bytes() == second.read_bytes()


def test_the_architecture_is_named_as_runtimes_do():
    spec = importlib.util.spec_from_file_location("archive", ARCHIVE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ARCHITECTURES["x86_64"] == "amd64"
