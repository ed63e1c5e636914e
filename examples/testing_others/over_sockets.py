"""A pytest plugin under which Flask's test clients ask real servers: each application of a test is served in a worker,
and what the test sends to it goes there over a socket. The tests need not know."""

from __future__ import annotations

import http.client
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.cookies import SimpleCookie

import flask
import pytest

asked = pytest.StashKey[int]()


def make_and_serve(listening, package, config):
    """Runs in a worker: the application of `package`, made there as the test has made it here."""
    from waitress.server import create_server

    module = importlib.import_module(package)
    app = module.create_app(config) if hasattr(module, "create_app") else module.app
    create_server(app, sockets=[listening]).run()


@pytest.fixture(autouse=True)
def over_sockets(serve, monkeypatch, pytestconfig):
    """Each application has a server of its own, from its first request to the end of the test."""
    servers = {}

    def forward(app, environ, start_response):
        if app not in servers:
            servers[app] = serve(make_and_serve, app.import_name, dict(app.config))
        answer, body = ask(servers[app].listener, environ)
        pytestconfig.stash[asked] = pytestconfig.stash.get(asked, 0) + 1
        if keep := environ.get("werkzeug.debug.preserve_context"):  # in a test's `with client:`
            keep(as_the_server_left_it(app, environ, answer))
        start_response(f"{answer.status} {answer.reason}", answer.getheaders())
        return [body]

    monkeypatch.setattr(flask.Flask, "wsgi_app", forward)


def ask(listener, environ) -> tuple[http.client.HTTPResponse, bytes]:
    """Send the request that a WSGI environment describes."""
    headers = {
        name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")
    }
    headers |= {"Content-Type": environ.get("CONTENT_TYPE", ""), "Connection": "close"}
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    connection = http.client.HTTPConnection(listener.host)
    with listener.connect() as connection.sock:
        connection.request(environ["REQUEST_METHOD"], environ["REQUEST_URI"], body, headers)
        with connection.getresponse() as answer:
            return answer, answer.read()


@contextmanager
def as_the_server_left_it(app, environ, answer) -> Iterator[None]:
    """The context of a request, with the session that the server has sent: it is all in its cookie."""
    cookies = SimpleCookie(environ.get("HTTP_COOKIE", ""))
    for line in answer.headers.get_all("Set-Cookie", []):
        cookies.load(line)
    kept = "; ".join(f"{name}={each.value}" for name, each in cookies.items() if each["max-age"] != "0")
    with app.request_context({**environ, "HTTP_COOKIE": kept}):
        app.preprocess_request()
        yield


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(
        f"{config.stash.get(asked, 0)} requests of Flask's test clients went over sockets"
    )
