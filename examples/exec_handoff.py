"""The exec hand-off: a shell that may not write a byte to any file has one command run for it outside.

The shell gives its right to write away for good (`ulimit -f 0`). Its commands are then asked for one by one: the
policy lets one run where it is, runs one outside, on the shell's own pipe and terminal, and denies one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fdpool
from fdpool.exec_server import Deny, Escalate, Run

SHELL = """
ulimit -f 0
(trap "" XFSZ; echo text > note) 2>/dev/null || echo "shell: I cannot write"
ask echo "echo: I run in the shell's place"
echo "written outside" | ask tee note
ask rm -r /
echo "shell: that exited with $?"
"""


def policy(request):
    if request.argv == ["tee", "note"]:
        return Escalate()
    if request.argv[0] == "echo":
        return Run()
    return Deny(f"{request.argv[0]} is not for you")


with (
    tempfile.TemporaryDirectory() as folder,
    fdpool.Pool(1) as pool,
    fdpool.ExecServer(pool, policy) as server,
):
    # In an installed system this is the command `fdpool exec`.
    ask = f'ask() {{ "{sys.executable}" -m fdpool exec -- "$@" 2>&1; }}'
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shell = server.start(["sh", "-c", ask + SHELL], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    output, _ = shell.communicate()
    print(output, end="")
    print("in the file:", Path(folder, "note").read_text(), end="")
