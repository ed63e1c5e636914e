"""Source distributions of what is tested: fetched by pip, which compares their hashes, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


class NotFetchedError(Exception):
    """pip could not fetch something; says what, and why."""


def unpack(requirements: Path, folder: Path) -> None:
    """Unpack each distribution that the file names, fetched if it is not in the cache, below `folder`.

    Raises:
        NotFetchedError: it is in no index that pip knows, or there is no network.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdpool-examples"
    wanted = {
        cache / f"{name}-{version}.tar.gz": digest
        for name, version, digest in re.findall(
            r"(?m)^(\w+)==(\S+) --hash=sha256:(\w+)$", requirements.read_text()
        )
    }
    if not all(_is_whole(path, digest) for path, digest in wanted.items()):
        _fetch(requirements, cache)
    for path in wanted:
        with tarfile.open(path) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(folder)


def _is_whole(path: Path, digest: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _fetch(requirements: Path, cache: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        done = subprocess.run(
            [*pip, "--retries=1", "--no-deps", "--require-hashes", "-r", str(requirements), "-d", folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = [line for line in done.stdout.splitlines() if "ERROR" in line] or done.stdout.splitlines()
            raise NotFetchedError(
                f"pip could not fetch what {requirements.name} names: {said[-1] if said else '?'}"
            )
        for path in Path(folder).iterdir():
            path.replace(cache / path.name)  # at once: another run may be reading it


def write_programs(documents: Path, package: Path) -> None:
    """Write each program of the pages, a block that defines `app`, as a module: `<page>_<number of the block>`."""
    package.mkdir()
    for page in documents.glob("*.md"):
        blocks = re.findall(r"^```python[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
        for number, block in enumerate(blocks):
            if re.search(r"^(app = |async def app\()", block, re.M):
                module = f"{page.stem.replace('-', '_')}_{number}.py"
                (package / module).write_text(block, encoding="utf-8")
