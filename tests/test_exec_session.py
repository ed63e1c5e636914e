"""`_exec_session`: the protocol of the exec hand-off, without a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpool import _exec_session as protocol
from fdpool._exec_session import (
    AskPolicy,
    Close,
    Decided,
    Deny,
    EndCommand,
    Escalate,
    Finished,
    Gone,
    Overdue,
    Received,
    Request,
    Run,
    Send,
    Session,
    SignalCommand,
    StartCommand,
    State,
)
from fdpool.errors import WireError

REQUEST = {"file": "/bin/ls", "argv": ["ls", "-l"], "workdir": "/tmp", "env": {"A": "1"}}
PARSED = Request("/bin/ls", ["ls", "-l"], "/tmp", {"A": "1"})


def asked() -> Session:
    session = Session()
    assert session.handle(Received(REQUEST, 0)) == [AskPolicy(PARSED)]
    return session


def running() -> Session:
    session = asked()
    assert session.handle(Decided(Escalate())) == [Send({"action": "Escalate"})]
    assert session.handle(Received({"fds": [0, 1, 2]}, 3)) == [StartCommand(PARSED, [0, 1, 2])]
    return session


def test_every_state_knows_every_event() -> None:
    events = protocol.Event.__args__  # type: ignore[attr-defined]
    assert set(protocol._TABLE) == {(state, event) for state in State for event in events}


def test_a_command_that_may_run_is_the_clients_to_run() -> None:
    session = asked()
    assert session.handle(Decided(Run())) == [Send({"action": "Run"}), Close(None)]
    assert session.state is State.OVER


def test_a_denial_tells_why() -> None:
    session = asked()
    told = {"action": {"Deny": {"reason": "not today"}}}
    assert session.handle(Decided(Deny("not today"))) == [Send(told), Close(None)]


def test_an_escalated_command_runs_and_its_end_is_told() -> None:
    assert running().handle(Finished(3)) == [Send({"exit_code": 3}), Close(None)]
    killed = Send({"exit_code": 137, "signal": 9})
    assert running().handle(Finished(-9)) == [killed, Close(None)]
    failed = Send({"exit_code": 127, "error": "not found"})
    assert running().handle(Finished(127, "not found")) == [failed, Close(None)]


def test_signals_are_passed_on_while_the_command_runs() -> None:
    session = running()
    assert session.handle(Received({"signal": 2}, 0)) == [SignalCommand(2)]
    assert session.handle(Received({"signal": 15}, 0)) == [SignalCommand(15)]
    assert session.state is State.RUNNING


@pytest.mark.parametrize(
    "message", [{"signal": 9}, {"signal": "2"}, {"signal": True}, {"fds": [1]}, [], None]
)
def test_anything_else_ends_the_command(message: Any) -> None:
    first, second = running().handle(Received(message, 0))
    assert first == EndCommand()
    assert isinstance(second, Close)


def test_a_client_that_dies_ends_its_command() -> None:
    session = running()
    assert session.handle(Gone("dead")) == [EndCommand(), Close("dead")]
    assert session.handle(Finished(-15)) == []


def test_a_decision_for_a_client_that_has_gone_is_dropped() -> None:
    session = asked()
    assert session.handle(Gone("dead")) == [Close("dead")]
    assert session.handle(Decided(Escalate())) == []


def test_silence_is_a_fault_only_when_it_is_the_clients_turn() -> None:
    silent = Session()
    assert silent.waits_for_client
    assert silent.handle(Overdue()) == [Close("the client was silent for too long")]
    assert not asked().waits_for_client
    assert asked().handle(Overdue()) == []
    assert not running().waits_for_client


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        "request",
        {},
        {**REQUEST, "file": 1},
        {**REQUEST, "argv": "ls"},
        {**REQUEST, "argv": []},
        {**REQUEST, "argv": ["ls", None]},
        {**REQUEST, "workdir": None},
        {**REQUEST, "env": ["A=1"]},
        {**REQUEST, "env": {"A": 1}},
    ],
)
def test_what_is_no_request_ends_the_session(message: Any) -> None:
    session = Session()
    (action,) = session.handle(Received(message, 0))
    assert isinstance(action, Close)
    assert session.state is State.OVER


def test_a_request_with_more_fields_is_a_request() -> None:
    assert protocol.parse_request({**REQUEST, "later": True}) == PARSED


@pytest.mark.parametrize(
    ("message", "count"),
    [
        ({"fds": [0, 1, 2]}, 2),
        ({"fds": [0, 1]}, 3),
        ({"fds": [1, 1]}, 2),
        ({"fds": [-1]}, 1),
        ({"fds": [2**31]}, 1),
        ({"fds": [True]}, 1),
        ({"fds": ["0"]}, 1),
        ({"fds": 3}, 3),
        ({}, 3),
        (None, 0),
    ],
)
def test_impossible_descriptors_start_nothing(message: Any, count: int) -> None:
    session = asked()
    session.handle(Decided(Escalate()))
    (action,) = session.handle(Received(message, count))
    assert isinstance(action, Close)


def test_decisions_are_read_as_they_were_written() -> None:
    for decision in (Run(), Escalate(), Deny("why")):
        written = json.loads(json.dumps(protocol.encode_decision(decision)))
        assert protocol.parse_decision(written) == decision
    assert protocol.parse_decision({"action": {"Deny": {"reason": None}}}) == Deny("no reason was given")
    for message in (None, {}, {"action": "Dance"}, {"action": {"Deny": 1}}):
        with pytest.raises(WireError):
            protocol.parse_decision(message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
messages = (
    st.sampled_from([REQUEST, {"fds": [0, 1]}, {"fds": []}, {"signal": 2}, {"signal": 9}]) | json_values
)
from_clients = st.one_of(
    st.builds(Received, messages, st.integers(0, 3)), st.builds(Gone, st.just("gone")), st.just(Overdue())
)


@settings(max_examples=100, deadline=None)
@given(st.lists(from_clients | st.sampled_from(["policy", "end"]), max_size=8), st.data())
def test_no_client_can_bring_a_session_out_of_step(events: list[Any], data: Any) -> None:
    session = Session()
    open_command = False
    closed = 0
    for drawn in events:
        event = drawn
        if event == "policy":
            if session.state is not State.POLICY:
                continue
            event = Decided(data.draw(st.sampled_from([Run(), Escalate(), Deny("no")])))
        elif event == "end":
            if session.state is not State.RUNNING:
                continue
            event, open_command = Finished(0), False
        actions = session.handle(event)
        for action in actions:
            open_command = open_command or isinstance(action, StartCommand)
            open_command = open_command and not isinstance(action, EndCommand)
            closed += isinstance(action, Close)
        json.dumps([action.message for action in actions if isinstance(action, Send)])
        assert closed == (session.state is State.OVER)
        assert open_command == (session.state is State.RUNNING)
