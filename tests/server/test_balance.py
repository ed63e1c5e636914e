"""How connections that are kept are spread over workers that accept from the same listeners (S1, S8)."""

from __future__ import annotations

import contextlib
import http.client
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fdpool._server.balance import ABSENT, LEAD, Balance, Loads
from fdpool._server.courtesy import PolledCourtesy
from fdpool.server import Server
from tests.process_state import wait_until
from tests.server.applications import asgi, wsgi
from tests.server.helpers import ANY_PORT, pids, port_of


@pytest.fixture
def loads() -> Iterator[Loads]:
    made = Loads(8)
    yield made
    made.close()


def test_a_worker_leads_by_a_few_or_by_a_share_of_many(loads: Loads) -> None:
    mine, other = Balance(loads.fd, 0), Balance(loads.fd, 1)
    mine.look()
    assert mine.spare(1000) is None  # there is no other
    assert not mine.leads(1000)
    other.tell(0)
    mine.look()
    assert mine.spare(LEAD - 1) == LEAD
    assert mine.spare(LEAD) == 0
    other.tell(800)
    assert not mine.leads(899)
    assert mine.leads(900)
    assert mine.spare(700) == 200
    loads.absent(1)
    assert not mine.leads(900)


def test_the_one_with_the_fewest_counts(loads: Loads) -> None:
    mine = Balance(loads.fd, 2)
    for slot, connections in ((0, 50), (1, 3), (3, 60)):
        Balance(loads.fd, slot).tell(connections)
    mine.look()
    assert mine.leads(3 + LEAD)
    assert not mine.leads(2 + LEAD)


def test_a_worker_stands_back_more_seldom_the_more_often_it_was_in_vain(loads: Loads) -> None:
    mine = Balance(loads.fd, 0)
    Balance(loads.fd, 1).tell(0)
    mine.look()
    granted = []
    for _ in range(12):
        assert mine.spare(100) == 0
        mine.left_to_others(taken=False)
        granted.append(mine.spare(100))
    assert granted == [LEAD << min(time, 8) for time in range(1, 13)]
    assert mine.spare(100) == 0
    mine.left_to_others(taken=True)
    assert mine.spare(100) == 0
    mine.left_to_others(taken=False)
    assert mine.spare(100) == 2 * LEAD


def test_one_that_has_left_tells_nothing_more(loads: Loads) -> None:
    leaving, coming, other = Balance(loads.fd, 0), Balance(loads.fd, 0), Balance(loads.fd, 1)
    coming.tell(7)
    leaving.leave()
    leaving.tell(0)
    other.look()
    assert not other.leads(6 + LEAD)


def test_what_others_see_is_what_a_worker_has(loads: Loads) -> None:
    mine, other = Balance(loads.fd, 0), Balance(loads.fd, 1)
    other.tell(0)
    connections = 5
    courtesy = PolledCourtesy(mine, [], lambda: connections, threads=1)
    connections = 6  # one has come
    assert courtesy.leaves_it()
    connections = 5  # and gone
    courtesy.tell()
    other.look()
    assert other.leads(4 + LEAD)


WAYS = [
    pytest.param(asgi, {"options": {"loop": "uvloop"}}, id="uvloop"),
    pytest.param(asgi, {"options": {"loop": "asyncio"}}, id="asyncio"),
    pytest.param(wsgi, {"threads": 1}, id="wsgi of one thread"),
    pytest.param(wsgi, {"threads": 4}, id="wsgi of four threads"),
]


@contextlib.contextmanager
def kept(server: Server, count: int) -> Iterator[Counter[int]]:
    """So many connections, opened one after the other and kept; how many of them each worker has."""
    with contextlib.ExitStack() as open_ones:
        pids: Counter[int] = Counter()
        for _ in range(count):
            client = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
            open_ones.callback(client.close)
            client.request("GET", "/")
            pids[int(client.getresponse().read())] += 1
        yield pids


def is_told(server: Server, slot: int) -> bool:
    loop: Any = server._loop
    return loop.crew._loads._words[slot] != ABSENT


@pytest.mark.parametrize(("app", "given"), WAYS)
def test_kept_connections_are_spread(
    app: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if given.get("options", {}).get("loop") == "uvloop":
        pytest.importorskip("uvloop")
    monkeypatch.setattr("fdpool._server.courtesy._HEAD_START_S", 20.0)  # however busy the machine is
    with Server(app, ANY_PORT, workers=2, start_method="fork", **given) as server:
        wait_until(lambda: is_told(server, 0) and is_told(server, 1))
        with kept(server, 40) as by_pid:
            assert set(by_pid) == set(pids(server))
            assert min(by_pid.values()) >= 12


@pytest.mark.parametrize(("app", "given"), WAYS)
def test_a_worker_that_stands_still_is_not_waited_for(app: Any, given: dict[str, Any]) -> None:
    with Server(app, ANY_PORT, workers=2, **given) as server:
        wait_until(lambda: is_told(server, 0) and is_told(server, 1))
        still, other = (psutil.Process(pid) for pid in pids(server))
        still.suspend()
        try:
            with kept(server, 40) as by_pid:
                assert by_pid == {other.pid: 40}
        finally:
            still.resume()


@pytest.mark.parametrize(("app", "given"), WAYS)
def test_nothing_is_left_to_a_worker_that_is_not_there(app: Any, given: dict[str, Any]) -> None:
    with Server(app, ANY_PORT, workers=2, **given) as server:
        wait_until(lambda: is_told(server, 0) and is_told(server, 1))
        server.scale(1)
        wait_until(lambda: len(pids(server)) == 1 and not is_told(server, 1))
        [left] = pids(server)
        psutil.Process(left).kill()
        wait_until(lambda: not is_told(server, 0) or left not in pids(server))
        wait_until(lambda: pids(server) and is_told(server, 0))
        server.scale(2)
        wait_until(lambda: is_told(server, 1))
