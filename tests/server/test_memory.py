"""A worker that takes more memory than there is (W3)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.memory_group import memory_group
from tests.server.helpers import read_all
from tests.server.programs import ask_port, port_in, program


def test_a_worker_that_the_kernel_kills_for_memory_is_named_and_the_server_goes_on(tmp_path: Path) -> None:
    """W3: a real control group, which has room for the server and its workers, but not for such a request."""
    body = """
    with open(os.environ["GROUP"], "w") as members:
        members.write(str(os.getpid()))

    def serve(connection, address):
        kept = []
        while connection.recv(1) == b"m":
            kept.append(bytearray(10 << 20))
        connection.sendall(b"%d" % os.getpid())

    sys.exit(fdpool.Server(serve, "127.0.0.1:0", workers=2).run())
    """
    with memory_group(200 << 20) as members, program(tmp_path, body, GROUP=str(members)) as server:
        port = port_in(server.expect("started"))
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(b"m" * 1000)
            try:
                assert read_all(client) == b""
            except ConnectionResetError:
                pass  # it died with some of the request unread
        exited = server.expect("worker_exited")
        assert exited["reason"] == (
            "it was killed by SIGKILL by the kernel's out-of-memory killer, as its control group counts"
        )
        assert exited["lost"] == 1
        successor = server.expect("worker_ready")["worker_pid"]
        assert successor != exited["worker_pid"]
        assert ask_port(port) not in (exited["worker_pid"], os.getpid())
