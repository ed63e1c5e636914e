"""Many servers in parallel processes of tests, each asked for a word that only it knows: `python -m tests.plugin.many`.

F1: no two of them ever have one port, and no client meets another's server.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.plugin.conftest import command, environment, write_project

TEXT = """
import pytest, secrets

def tell(listening, word):
    while True:
        with listening.accept()[0] as connection:
            connection.sendall(word.encode())

@pytest.mark.parametrize("number", range({count}))
def test_it(serve, number):
    word = secrets.token_hex(8)
    server = serve(tell, word)
    for _ in range(2):
        with server.listener.connect() as client:
            assert client.recv(100).decode() == word
"""


def run(servers: int, processes: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """One run of pytest with so many tests, a server each."""
    write_project(folder, TEXT.replace("{count}", str(servers)))
    return subprocess.run(
        command("-q", f"-n{processes}", "--fdpool-leaks=fail", plugins=["xdist"]),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plugin.many", description=__doc__)
    parser.add_argument("--servers", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = run(given.servers, given.processes, Path(folder))
    print(done.stdout[-2000:], done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
