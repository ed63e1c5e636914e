"""The kind of a named application, guessed from its source (design, section 12)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fdpool import Server
from fdpool._server import apps, guess

from .helpers import ANY_PORT, get

ASGI = "class {}:\n    async def __call__(self, scope, receive, send): ...\n"
WSGI = "class App:\n    def __call__(self, environ, start_response): ...\n"
HANDLER = "    def app(connection, address): ...\n"

SOURCES = [
    ("asgi", "app", "async def app(scope, receive, send): ..."),
    ("asgi", "app", ASGI.format("App") + "app = App()"),
    ("asgi", "app", ASGI.format("Base") + "class App(Base): pass\napp = App()"),
    ("wsgi", "app", "def app(environ, start_response, more=None): ..."),
    ("wsgi", "app", "app = lambda environ, start_response: []"),
    ("wsgi", "make()", WSGI + "def make():\n    app = App()\n    return app"),
    ("wsgi", "make()", "def make():\n    def app(environ, start_response): ...\n    return app"),
    ("wsgi", "App()", WSGI),
    ("handler", "app", "def app(connection, address): ..."),
    ("handler", "app", "try:\n    import nowhere\nexcept ImportError:\n    pass\nif True:\n" + HANDLER),
    ("listeners", "app", "def app(listeners, worker): ..."),
    ("socketserver", "App", "import socketserver\nclass App(socketserver.StreamRequestHandler): ..."),
    ("wsgi", "app", "from flask import Flask\napp: Flask = Flask(__name__)"),
    ("wsgi", "app", "import flask as f\napp = f.Flask(__name__)"),
    ("asgi", "app", "from starlette.applications import Starlette as Made\napp = Made()"),
    (
        "wsgi",
        "app",
        "def inner(environ, start_response): ...\nfrom nowhere import Wrapped\napp = Wrapped(inner, 3)",
    ),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which modules are looked for."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("kind", "attribute", "source"), SOURCES)
def test_the_kind_is_guessed_from_the_source(kind: str, attribute: str, source: str, folder: Path) -> None:
    (folder / "guessed.py").write_text(source)
    assert guess.interface_of(f"guessed:{attribute}") == kind
    assert "guessed" not in sys.modules


@pytest.mark.parametrize(("kind", "attribute", "source"), SOURCES[:-4])
def test_a_guess_is_what_a_worker_finds(kind: str, attribute: str, source: str, folder: Path) -> None:
    (folder / "guessed_and_loaded.py").write_text(source)
    try:
        assert apps.interface_of(apps.load(f"guessed_and_loaded:{attribute}")) == kind
    finally:
        del sys.modules["guessed_and_loaded"]


def test_what_other_modules_have_is_followed_without_importing_any(folder: Path) -> None:
    package = folder / "shop_guessed"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .inner import app\nfrom . import web\nother = web.make()\n")
    (package / "inner" / "__init__.py").write_text("from ..web import app as app\n")
    (package / "web.py").write_text("from .app import App\napp = App()\ndef make(): return App()\n")
    (package / "app.py").write_text("class App:\n    async def __call__(self, scope, receive, send): ...\n")
    for target in (
        "shop_guessed:app",
        "shop_guessed:other",
        "shop_guessed.inner:app",
        "shop_guessed.web:make()",
    ):
        assert guess.interface_of(target) == "asgi"
    assert not any(name.startswith("shop_guessed") for name in sys.modules)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "app = 3",
        "def app(one): ...",
        "def app(*any): ...",
        "@decorated\ndef app(environ, start_response): ...",
        "app = app",
        "from guessed import app",
        "from .... import app",
        "def app(: ...",
        "app = a.b.c()",
        "class App(App): pass\napp = App()",
        "app = " + "(" * 500,
        "\0",
    ],
)
def test_what_cannot_be_seen_is_no_guess_and_no_error(source: str, folder: Path) -> None:
    (folder / "guessed.py").write_text(source)
    assert guess.interface_of("guessed:app") is None


@pytest.mark.parametrize(
    "target", ["nowhere_at_all:app", "sys:app", "fdpool._server.guess.deeper:app", "os:path.join"]
)
def test_what_has_no_source_is_no_guess(target: str) -> None:
    assert guess.interface_of(target) is None


def test_a_source_that_would_warn_does_so_only_for_whoever_imports_it(folder: Path) -> None:
    (folder / "guessed.py").write_text("pattern = '\\d'\ndef app(environ, start_response): ...\n")
    assert guess.interface_of("guessed:app") == "wsgi"


LOADED = """
import sys
def app(environ, start_response):
    body = ",".join(name for name in ("uvicorn", "waitress") if name in sys.modules).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


def test_only_what_serves_the_application_is_loaded(folder: Path) -> None:
    """Neither the memory nor the time of what the other kind would need."""
    (folder / "shop_loaded.py").write_text(LOADED)
    with Server("shop_loaded:app", ANY_PORT, workers=1) as server:
        assert get(server)[1] == b"waitress"


def test_a_wrong_guess_costs_nothing_but_an_import(folder: Path) -> None:
    wrong = ASGI.format("App") + f"app = App()\nexec({LOADED!r})\n"
    (folder / "shop_mistaken.py").write_text(wrong)
    assert guess.interface_of("shop_mistaken:app") == "asgi"
    with Server("shop_mistaken:app", ANY_PORT, workers=1) as server:
        assert get(server)[1] == b"uvicorn,waitress"


def test_guessing_reads_and_runs_nothing(folder: Path) -> None:
    """In an interpreter of its own: the application's module has an effect, and must not have it here."""
    (folder / "shop_effect.py").write_text(
        "print('imported')\nfrom flask import Flask\napp = Flask('shop')\n"
    )
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom fdpool._server import guess\n"
    code += "print(guess.interface_of('shop_effect:app'), 'flask' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "wsgi False\n"
