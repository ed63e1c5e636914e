"""A guestbook in Flask: entries in a SQLite file that the environment names."""

from __future__ import annotations

import os
import sqlite3

import flask


def create_app() -> flask.Flask:
    app = flask.Flask("guestbook")

    def database() -> sqlite3.Connection:
        if "database" not in flask.g:
            flask.g.database = sqlite3.connect(os.environ["GUESTBOOK"])
            flask.g.database.execute("create table if not exists entries (name text, words text)")
        return flask.g.database

    @app.teardown_appcontext
    def close(_error: BaseException | None) -> None:
        if (connection := flask.g.pop("database", None)) is not None:
            connection.close()

    @app.get("/entries")
    def entries() -> list[dict[str, str]]:
        rows = database().execute("select name, words from entries order by rowid")
        return [{"name": name, "words": words} for name, words in rows]

    @app.post("/entries")
    def sign() -> tuple[dict[str, str], int]:
        entry = flask.request.get_json()
        if not entry.get("name"):
            return {"error": "who are you?"}, 400
        with database() as connection:
            connection.execute("insert into entries values (:name, :words)", entry)
        app.logger.warning("%s has signed", entry["name"])
        return entry, 201

    return app
