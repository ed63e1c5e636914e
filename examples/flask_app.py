"""A Flask application behind a pre-fork server, with four threads in each worker.

The workers import it by its name, as they would with `fdpool serve flask_app:app`.

Needs: flask, waitress
"""

import json
import urllib.request

from flask import Flask

import fdpool

app = Flask(__name__)


@app.get("/greet/<name>")
def greet(name):
    return {"greeting": f"Hello, {name}!"}


if __name__ == "__main__":  # the workers import this module, too
    with fdpool.Server("flask_app:app", bind="127.0.0.1:0", workers=2, threads=4) as server:
        url = server.addresses[0].replace("tcp", "http")
        with urllib.request.urlopen(f"{url}/greet/you") as response:
            print(response.status, json.load(response))
