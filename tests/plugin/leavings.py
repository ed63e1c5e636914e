"""Tasks that leave something in their worker; without pytest, which each worker would import."""

from __future__ import annotations

import os
import subprocess
import threading
import time


def leave_thread() -> None:
    threading.Thread(target=time.sleep, args=(30,), daemon=True).start()


def leave_child() -> None:
    globals()["left"] = subprocess.Popen(["sleep", "30"])


def leave_file() -> None:
    globals()["left"] = open(os.devnull)
