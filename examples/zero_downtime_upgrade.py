"""A server is replaced by a new one, of new code, on the same port, while clients go on asking.

SIGUSR2 has `fdpool serve` start itself anew. The new process takes the listening socket over, and the old one leaves
when the new one serves. So even Python, or fdpool itself, can be upgraded under load.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CODE = """
import os

def handle(connection, address):
    connection.recv(100)
    connection.sendall(b"version 1")
"""


def ask(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"which version?")
        return client.recv(100).decode()


def ask_all_the_time(port, answers, enough):
    while not enough.is_set():
        try:
            answers.append(ask(port))
        except OSError as error:
            answers.append(f"lost: {error}")


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
    code, pid_file, port = Path(folder, "app.py"), Path(folder, "pid"), listener.getsockname()[1]
    code.write_text(CODE)
    command = [sys.executable, "-m", "fdpool", "serve", "--app-dir", folder, "--pid-file", str(pid_file)]
    command += ["--bind", f"fd:{listener.fileno()}", "--workers", "2", "app:handle"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server = subprocess.Popen(command, pass_fds=[listener.fileno()], env=env, stderr=subprocess.DEVNULL)

    answers, enough = [], threading.Event()
    client = threading.Thread(target=ask_all_the_time, args=(port, answers, enough), daemon=True)
    client.start()
    wait_for(lambda: answers)
    code.write_text(CODE.replace("version 1", "version 1.1"))
    server.send_signal(signal.SIGUSR2)
    server.wait()  # the old one leaves by itself
    successor = int(pid_file.read_text())
    wait_for(lambda: answers[-1] == "version 1.1")
    enough.set()
    client.join()

    print("answers:", *sorted(set(answers)))
    print("another process:", successor != server.pid)
    os.kill(successor, signal.SIGTERM)
    wait_for(lambda: not pid_file.exists())
