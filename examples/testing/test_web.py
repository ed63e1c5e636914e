"""Two web applications behind fdpool's fixtures: real servers, one for each test, and no port is ever looked for."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest


def call(url: str, data: dict[str, str] | None = None) -> tuple[int, Any]:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def with_database(listening, path):
    """A function that serves may prepare what it likes: here, which file the guestbook is in."""
    import os

    from guestbook import create_app
    from waitress.server import create_server

    os.environ["GUESTBOOK"] = path
    create_server(create_app(), sockets=[listening]).run()


@pytest.fixture
def guestbook(serve, tmp_path):
    return serve(with_database, str(tmp_path / "guestbook.sqlite"))


def test_a_fresh_guestbook_is_empty(guestbook):
    assert call(f"{guestbook.url}/entries") == (200, [])


def test_what_is_signed_is_there_and_in_the_log(guestbook):
    entry = {"name": "Ada", "words": "was here"}
    assert call(f"{guestbook.url}/entries", entry) == (201, entry)
    assert call(f"{guestbook.url}/entries") == (200, [entry])
    assert "Ada has signed" in guestbook.logs


def test_nobody_signs_without_a_name(guestbook):
    assert call(f"{guestbook.url}/entries", {"words": "boo"}) == (400, {"error": "who are you?"})


def test_entries_outlive_a_crash_and_clients_wait_for_the_restart(guestbook):
    entry = {"name": "Ada", "words": "was here"}
    call(f"{guestbook.url}/entries", entry)
    guestbook.kill()
    guestbook.wait()
    with ThreadPoolExecutor() as threads:
        early = threads.submit(call, f"{guestbook.url}/entries")
        guestbook.restart()
        assert early.result() == (200, [entry])


@pytest.fixture
def stream(serve):
    return serve("stream:app")


def test_squares_are_streamed(stream):
    with urllib.request.urlopen(f"{stream.url}/squares/5", timeout=10) as answer:
        assert [int(line) for line in answer] == [0, 1, 4, 9, 16]


def test_each_test_has_a_server_of_its_own(stream):
    urllib.request.urlopen(f"{stream.url}/squares/1", timeout=10).close()
    assert call(f"{stream.url}/health") == (200, {"asked": 1})
    stream.stop()
    assert "counting" in stream.logs
    assert "was asked 1 times" in stream.logs


@pytest.fixture(scope="session")
def shared_stream(session_service):
    """One server for all processes of pytest-xdist."""
    return session_service("stream", "stream:app")


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_many_share_one(shared_stream, count):
    with urllib.request.urlopen(f"{shared_stream.url}/squares/{count}", timeout=10) as answer:
        assert len(list(answer)) == count


@pytest.mark.run_isolated(timeout=20)
def test_what_is_imported_here_is_imported_nowhere_else():
    import stream

    assert stream.app.routes[0].path == "/squares/{count:int}"
