"""One session of the exec hand-off, pure: what may come in which state, and what follows.

                 request                 Run, Deny: answered
    REQUEST ────────────► POLICY ─────────────────────────────────────► OVER
                             │ Escalate: answered                          ▲
                             ▼          descriptors              finished  │
                        DESCRIPTORS ────────────────► RUNNING ─────────────┘
                                                       │  ▲
                                                       └──┘ signal

Wherever it is: a client that goes, or breaks the protocol, ends it, and with it the command. The table at
the end has a cell for each state and event.

Frames, JSON, in both directions as a peer in any language speaks them:

    client  {"file", "argv", "workdir", "env"}
    server  {"action": "Run"} | {"action": "Escalate"} | {"action": {"Deny": {"reason": text}}}
    client  {"fds": [n, ...]} with as many descriptors, only after Escalate
    client  {"signal": n}, any number of times (our own addition)
    server  {"exit_code": n}; by a signal: 128 + n, and "signal": n beside it; never started: 126 or 127,
            and "error": text; it is not known how it ended: 125, and "error": text
"""

import signal
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple, Union

from .errors import WireError

#: Most characters of a reason or an error that are told to a client.
MOST_TEXT = 10_000

#: What a client may have passed on to its command.
FORWARDED = tuple(
    int(getattr(signal, name))
    for name in (
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGQUIT",
        "SIGWINCH",
        "SIGTSTP",
        "SIGCONT",
        "SIGUSR1",
        "SIGUSR2",
    )
)


# -- what is asked and decided -------------------------------------------------------------------


class Request(NamedTuple):
    """A client asks to have a command run."""

    file: str
    argv: list[str]
    workdir: str
    env: dict[str, str]


class Run(NamedTuple):
    """Decision: the client runs the command itself, where it is."""


class Escalate(NamedTuple):
    """Decision: the server runs the command, on the client's descriptors."""


class Deny(NamedTuple("Deny", [("reason", str)])):
    """Decision: nobody runs the command, and the client is told the reason, a text.

    Raises:
        TypeError: the reason is no `str`.
    """

    __slots__ = ()

    def __new__(cls, reason: str) -> "Deny":
        if not isinstance(reason, str):
            raise TypeError(f"Deny(reason) takes a text for the client, a str, not {reason!r}")
        return super().__new__(cls, reason)


Decision = Union[Run, Escalate, Deny]


def parse_request(message: object) -> Request:
    """The request in a frame.

    Raises:
        WireError: it is none.
    """
    if not isinstance(message, Mapping):
        raise WireError(f"a request is a JSON object, not {type(message).__name__}")
    file, argv, workdir, env = (message.get(name) for name in Request._fields)
    if not (isinstance(file, str) and isinstance(workdir, str) and _are_strings(argv) and argv):
        raise WireError("a request has file and workdir, which are strings, and argv, a list of them")
    if not (isinstance(env, Mapping) and _are_strings([*env.keys(), *env.values()])):
        raise WireError("a request has env, an object of strings")
    return Request(file, list(argv), workdir, dict(env))


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def encode_decision(decision: Decision) -> dict[str, object]:
    """The frame that tells the client."""
    if isinstance(decision, Deny):
        return {"action": {"Deny": {"reason": sayable(decision.reason)}}}
    return {"action": type(decision).__name__}


def sayable(text: str) -> str:
    """`text` as a frame can hold it: cut where it is long, and without what has no UTF-8.

    It may quote what the client sent, which chose both.
    """
    return text[:MOST_TEXT].encode(errors="replace").decode()


def parse_decision(message: object) -> Decision:
    """What the server has decided, as the client reads it.

    Raises:
        WireError: nothing that we know of.
    """
    action = message.get("action") if isinstance(message, Mapping) else None
    if action == "Run":
        return Run()
    if action == "Escalate":
        return Escalate()
    if isinstance(action, Mapping) and isinstance(action.get("Deny"), Mapping):
        reason = action["Deny"].get("reason")
        return Deny(reason if isinstance(reason, str) else "no reason was given")
    raise WireError("the server's answer is neither Run nor Escalate nor Deny")


def encode_request(request: Request) -> dict[str, object]:
    """The frame that asks."""
    return request._asdict()


# -- the machine ---------------------------------------------------------------------------------


class State(Enum):
    """Where a session is."""

    REQUEST = "the request is awaited"
    POLICY = "the policy is asked"
    DESCRIPTORS = "the client's descriptors are awaited"
    RUNNING = "the command runs"
    OVER = "nothing more happens"


class Received(NamedTuple):
    """Event: a frame has come, with so many descriptors."""

    message: object
    fd_count: int


class Decided(NamedTuple):
    """Event: the policy has decided."""

    decision: Decision


class Finished(NamedTuple):
    """Event: the command has ended; the return code as `subprocess` has it, or why it has none of its own."""

    returncode: int
    error: str | None = None


class Gone(NamedTuple):
    """Event: the client has closed its end, or what came from it is no frame."""

    reason: str


class Overdue(NamedTuple):
    """Event: the client has been silent for too long."""


Event = Union[Received, Decided, Finished, Gone, Overdue]


class AskPolicy(NamedTuple):
    """Action: have the policy decide."""

    request: Request


class Send(NamedTuple):
    """Action: send a frame."""

    message: dict[str, object]


class StartCommand(NamedTuple):
    """Action: run the command; the descriptors that came with the frame have these numbers in it."""

    request: Request
    numbers: list[int]


class SignalCommand(NamedTuple):
    """Action: send a signal to the command's process group."""

    number: int


class EndCommand(NamedTuple):
    """Action: end the command with all that descends from it."""


class Close(NamedTuple):
    """Action: close the session; the reason is for the log, None if all went well."""

    reason: str | None


Action = Union[AskPolicy, Send, StartCommand, SignalCommand, EndCommand, Close]


class Session:
    """The protocol's state; `handle(event)` returns what is to be done, in order."""

    def __init__(self) -> None:
        self.state = State.REQUEST
        self._request: Request | None = None

    @property
    def waits_for_client(self) -> bool:
        """True while silence on the client's side would be its fault."""
        return self.state in (State.REQUEST, State.DESCRIPTORS)

    @property
    def takes_descriptors(self) -> bool:
        """True while they may come from the client."""
        return self.state is State.DESCRIPTORS

    def handle(self, event: Event) -> list[Action]:
        """Move on, by the table."""
        return _TABLE[self.state, type(event)](self, event)

    # Each of these is a cell.

    def _take_request(self, event: Received) -> list[Action]:
        if event.fd_count:
            return self._break_off("a request came with descriptors")
        try:
            self._request = parse_request(event.message)
        except WireError as error:
            return self._break_off(str(error))
        self.state = State.POLICY
        return [AskPolicy(self._request)]

    def _tell_decision(self, event: Decided) -> list[Action]:
        answer = Send(encode_decision(event.decision))
        if isinstance(event.decision, Escalate):
            self.state = State.DESCRIPTORS
            return [answer]
        self.state = State.OVER
        return [answer, Close(None)]

    def _take_descriptors(self, event: Received) -> list[Action]:
        numbers = event.message.get("fds") if isinstance(event.message, Mapping) else None
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**31 for n in numbers):
            return self._break_off("after Escalate the client sends fds, a list of numbers")
        if len(numbers) != event.fd_count:
            return self._break_off(f"{len(numbers)} numbers came with {event.fd_count} descriptors")
        if len(set(numbers)) != len(numbers):
            return self._break_off("a number is in fds twice")
        assert self._request is not None
        self.state = State.RUNNING
        return [StartCommand(self._request, numbers)]

    def _take_signal(self, event: Received) -> list[Action]:
        number = event.message.get("signal") if isinstance(event.message, Mapping) else None
        if type(number) is not int or number not in FORWARDED or event.fd_count:
            return [EndCommand(), *self._break_off("while a command runs the client sends signals")]
        return [SignalCommand(number)]

    def _tell_end(self, event: Finished) -> list[Action]:
        self.state = State.OVER
        message: dict[str, object] = {"exit_code": event.returncode}
        if event.returncode < 0:
            message = {"exit_code": 128 - event.returncode, "signal": -event.returncode}
        if event.error is not None:
            message["error"] = sayable(event.error)
        return [Send(message), Close(None)]

    def _speak_out_of_turn(self, _: Event) -> list[Action]:
        return self._break_off("a frame came while the policy was asked")

    def _lose_client(self, event: Gone) -> list[Action]:
        return self._break_off(event.reason)

    def _lose_client_of_command(self, event: Gone) -> list[Action]:
        return [EndCommand(), *self._break_off(event.reason)]

    def _tire(self, _: Event) -> list[Action]:
        return self._break_off("the client was silent for too long")

    def _pass_over(self, _: Event) -> list[Action]:
        """It comes too late to matter."""
        return []

    def _cannot_be(self, event: Event) -> list[Action]:
        raise AssertionError(f"{type(event).__name__} while {self.state.value}")

    def _break_off(self, reason: str) -> list[Action]:
        self.state = State.OVER
        return [Close(reason)]


_TABLE: dict[tuple[State, type[Any]], Callable[[Session, Any], list[Action]]] = {
    (State.REQUEST, Received): Session._take_request,
    (State.REQUEST, Decided): Session._cannot_be,
    (State.REQUEST, Finished): Session._cannot_be,
    (State.REQUEST, Gone): Session._lose_client,
    (State.REQUEST, Overdue): Session._tire,
    (State.POLICY, Received): Session._speak_out_of_turn,
    (State.POLICY, Decided): Session._tell_decision,
    (State.POLICY, Finished): Session._cannot_be,
    (State.POLICY, Gone): Session._lose_client,
    (State.POLICY, Overdue): Session._pass_over,  # a policy may take its time
    (State.DESCRIPTORS, Received): Session._take_descriptors,
    (State.DESCRIPTORS, Decided): Session._cannot_be,
    (State.DESCRIPTORS, Finished): Session._cannot_be,
    (State.DESCRIPTORS, Gone): Session._lose_client,
    (State.DESCRIPTORS, Overdue): Session._tire,
    (State.RUNNING, Received): Session._take_signal,
    (State.RUNNING, Decided): Session._cannot_be,
    (State.RUNNING, Finished): Session._tell_end,
    (State.RUNNING, Gone): Session._lose_client_of_command,
    (State.RUNNING, Overdue): Session._pass_over,  # so may a command
    (State.OVER, Received): Session._pass_over,
    (State.OVER, Decided): Session._pass_over,  # the client went while the policy was asked
    (State.OVER, Finished): Session._pass_over,  # the command was ended because its client went
    (State.OVER, Gone): Session._pass_over,
    (State.OVER, Overdue): Session._pass_over,
}
