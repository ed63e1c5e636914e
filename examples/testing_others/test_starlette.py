"""The programs of Starlette's documentation, each served as it stands, and asked over its socket."""

from __future__ import annotations

import http.client
import os
import sys
from base64 import b64encode
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect


@pytest.fixture
def program(serve, request):
    return serve(f"starlette_docs.{request.param}:app")


def get(server, path="/", method="GET", body=None, **headers):
    connection = http.client.HTTPConnection(server.listener.host)
    with server.listener.connect() as connection.sock:
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        with connection.getresponse() as answer:
            return answer.status, answer.read().decode(), answer.headers


def talk(server, path="/", **options):
    return connect(
        f"ws://{server.listener.netloc}{path}", sock=server.listener.connect(), proxy=None, **options
    )


@pytest.mark.parametrize(
    ("program", "path", "text"),
    [
        ("index_0", "/", '{"hello":"world"}'),
        ("index_1", "/", "Hello, world!"),
        ("endpoints_1", "/", "Hello, world!"),
        ("endpoints_1", "/tom", "Hello, tom"),
        ("requests_0", "/any/path", "GET /any/path"),
        ("responses_0", "/", "Hello, world!"),
        ("responses_1", "/", "<html><body><h1>Hello, world!</h1></body></html>"),
        ("responses_2", "/", "Hello, world!"),
        ("responses_3", "/", '{"hello":"world"}'),
        ("routing_0", "/about", "About"),
    ],
    indirect=["program"],
)
def test_a_page_is_what_the_documentation_says(program, path, text):
    assert get(program, path)[:2] == (200, text)


@pytest.mark.parametrize("program", ["requests_1"], indirect=True)
def test_a_body_comes_back_as_it_was_sent(program):
    assert get(program, method="POST", body="x" * 100_000)[:2] == (200, "x" * 100_000)


@pytest.mark.parametrize("program", ["responses_5"], indirect=True)
def test_a_redirect_leads_home(program):
    status, _, headers = get(program, "/elsewhere")
    assert (status, headers["location"]) == (307, "/")


@pytest.mark.parametrize("program", ["authentication_0"], indirect=True)
def test_who_gives_a_name_is_called_by_it(program):
    assert get(program)[:2] == (200, "Hello, you")
    assert get(program, Authorization=f"Basic {b64encode(b'tom:secret').decode()}")[:2] == (200, "Hello, tom")
    assert get(program, Authorization="Basic nonsense")[0] == 400


@pytest.mark.parametrize("program", ["middleware_2"], indirect=True)
def test_every_origin_is_allowed(program):
    status, _, headers = get(program, Origin="https://example.org")
    assert (status, headers["access-control-allow-origin"]) == (404, "*")


@pytest.mark.parametrize("program", ["release_notes_2"], indirect=True)
def test_middleware_adds_its_header(program):
    assert get(program)[2]["custom-header"] == "Example"


@pytest.mark.parametrize(
    ("program", "path", "text"),
    [("websockets_0", "/", "Hello, world!"), ("routing_19", "/tom", "Hello, tom")],
    indirect=["program"],
)
def test_a_websocket_greets(program, path, text):
    with talk(program, path) as client:
        assert client.recv() == text


@pytest.mark.parametrize(
    ("program", "path"), [("websockets_1", "/"), ("endpoints_3", "/ws")], indirect=["program"]
)
def test_a_websocket_answers_each_message(program, path):
    with talk(program, path) as client:
        for word in ("one", "two"):
            client.send(word)
            assert client.recv() == f"Message text was: {word}"


@pytest.mark.parametrize("program", ["exceptions_6"], indirect=True)
def test_a_websocket_may_be_refused(program):
    with pytest.raises(InvalidStatus) as caught:
        talk(program, "/ws")
    assert caught.value.response.status_code == 400


def test_uvicorn_itself_serves_on_the_socket_that_it_inherits(serve, tmp_path):
    """This one has its files beside it, so it is a program in a folder."""
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "file.txt").write_text("static")
    uvicorn = [sys.executable, "-m", "uvicorn", "--fd", "3", "starlette_docs.applications_0:app"]
    packages = str(Path(os.environ["STARLETTE_DOCS"]).parent)
    server = serve.command(uvicorn, cwd=tmp_path, env={**os.environ, "PYTHONPATH": packages})
    assert get(server, "/user/tom")[1] == "Hello, tom!"
    assert get(server, "/static/file.txt")[1] == "static"
    with talk(server, "/ws") as client:
        assert client.recv() == "Hello, websocket!"
    server.stop()
    assert "Startup" in server.logs
    assert "Shutdown" in server.logs
