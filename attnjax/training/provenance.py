"""What a result was made with: code, packages, machine, command."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import attnjax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIT_SECONDS = 20


def describe() -> dict:
    """The present process as JSON: code, packages, python, machine, command.

    Starts JAX's backend, to name the devices.
    """
    return {
        "code": code_version(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": machine(),
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
    }


def code_version() -> dict:
    """{"attnjax": version, "sources": sha256 of the package's files, "git": ...}.

    "git" is {"commit", "dirty"} of the source tree the package lies in, or None when
    it was installed. "dirty" is whether tracked files differ from the commit.
    """
    package = Path(attnjax.__file__).parent
    return {
        "attnjax": attnjax.__version__,
        "sources": sources_digest(package),
        "git": git_state(package.parent),
    }


@functools.cache
def sources_digest(package: Path) -> str:
    """sha256 over the paths and contents of every .py file below `package`."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        raw = path.read_bytes()
        total.update(f"{path.relative_to(package).as_posix()}\0{len(raw)}\0".encode())
        total.update(raw)
    return total.hexdigest()


def git_state(root: Path) -> dict | None:
    """{"commit", "dirty"} of the repository at `root`; None when there is none.

    A repository further up is not asked: an installed package is not its source.
    """
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def package_versions() -> dict[str, str | None]:
    """Version of each package that numbers depend on; None when not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict:
    """Host, platform, cores usable by this process, devices."""
    import jax

    devices = jax.devices()
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device_kind": devices[0].device_kind,
        "device_platform": devices[0].platform,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def changes(before: dict, now: dict) -> list[str]:
    """What makes other bits likely between two descriptions, one line each.

    `before` may lack entries, as in a new run: what is not known has not changed.
    """
    lines = []
    if before.get("code", now["code"])["sources"] != now["code"]["sources"]:
        lines.append("attnjax's own code has changed since this run was last started")
    pairs = [
        *(("packages", name) for name in PACKAGES),
        *(("machine", name) for name in ("cores", "device_kind", "device_count")),
    ]
    for group, name in pairs:
        was, is_now = before.get(group, now[group]).get(name), now[group][name]
        if was != is_now:
            lines.append(
                f"{name} was {was} when this run was last started, now {is_now}"
            )
    return lines


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
