"""A Starlette application behind a pre-fork server: an event loop in each worker.

The workers import it by its name, as they would with `fdpool serve starlette_app:app`.

Needs: starlette, uvicorn
"""

import asyncio
import json
import urllib.request

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import fdpool


async def wait(request):
    await asyncio.sleep(request.path_params["ms"] / 1000)
    return JSONResponse({"waited": request.path_params["ms"]})


app = Starlette(routes=[Route("/wait/{ms:int}", wait)])

if __name__ == "__main__":  # the workers import this module, too
    with fdpool.Server("starlette_app:app", bind="127.0.0.1:0", workers=2) as server:
        url = server.addresses[0].replace("tcp", "http")
        with urllib.request.urlopen(f"{url}/wait/5") as response:
            print(response.status, json.load(response))
