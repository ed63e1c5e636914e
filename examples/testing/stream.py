"""Squares in Starlette, one a line, as they are asked for; and what was counted at its start and at its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.asked = 0
    print("counting", flush=True)
    yield
    print(f"was asked {app.state.asked} times", flush=True)


async def squares(request: Request) -> StreamingResponse:
    request.app.state.asked += 1

    async def lines() -> AsyncIterator[str]:
        for number in range(request.path_params["count"]):
            yield f"{number * number}\n"

    return StreamingResponse(lines(), media_type="text/plain")


async def health(request: Request) -> JSONResponse:
    return JSONResponse({"asked": request.app.state.asked})


app = Starlette(routes=[Route("/squares/{count:int}", squares), Route("/health", health)], lifespan=lifespan)
