"""The client's side of the exec hand-off: ask a server outside to run a command, here on our own descriptors."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ._exec_session import FORWARDED, Deny, Request, Run, encode_request, parse_decision
from ._frames import encode_json
from .errors import FdTransferError, PayloadTooLarge, WireError
from .fds import above_stdio
from .sockets import DatagramSocket, StreamSocket

# 125 is what `env`, `timeout` and their kind exit with when it is they who failed.
DENIED, UNAVAILABLE = (126, 125)


class ExecRefused(Exception):
    """The command did not run: denied (126), or there is no server to ask (125).

    Attributes:
        status: what to exit with.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Outcome:
    """How an escalated command ended.

    Attributes:
        exit_code: as its server told it.
        signal: the signal that ended it, or None.
        error: why it could not be started, or None.
    """

    def __init__(self, message: object) -> None:
        if not isinstance(message, Mapping) or type(message.get("exit_code")) is not int:
            raise WireError("the server's last word is no exit code")
        self.exit_code: int = message["exit_code"]
        number, error = message.get("signal"), message.get("error")
        self.signal = number if type(number) is int else None
        self.error = error if isinstance(error, str) else None


def connect(variable: str) -> StreamSocket:
    """Begin a session with the server whose end this process has inherited.

    Raises:
        ExecRefused: there is none.
    """
    text = os.environ.get(variable)
    if text is None:
        raise ExecRefused(f"{variable} is not set: no server has started this program", UNAVAILABLE)
    try:
        door = DatagramSocket.from_fd(int(text))
    except (ValueError, OSError) as error:
        reason = f"{variable}={text} is not a socket that was inherited ({error})"
        raise ExecRefused(reason, UNAVAILABLE) from None
    session, theirs = StreamSocket.pair()
    try:
        with theirs:
            door.send_with_fds(b"\0", [theirs])
    except (OSError, FdTransferError) as error:
        session.close()
        raise ExecRefused(f"the server cannot be reached: {error}", UNAVAILABLE) from None
    finally:
        door.into_inner().detach()  # it is not ours to close: the command, if we run it, inherits it
    return session


def ask(session: StreamSocket, request: Request) -> Run | StreamSocket:
    """Put the request; `Run()` if the command is for us to run, the session itself if the server will.

    Raises:
        ExecRefused: it was denied, or cannot be put, or the server has gone.
    """
    try:
        body = encode_json(encode_request(request))
    except UnicodeEncodeError:
        reason = f"{_not_utf8(request)} is not UTF-8, in which all of a request is sent: change or unset it"
        raise ExecRefused(reason, UNAVAILABLE) from None
    try:
        session.send_bytes(body)
        decision = parse_decision(session.receive())
    except PayloadTooLarge as error:
        raise ExecRefused(f"the request is too large: {error}", UNAVAILABLE) from None
    except ConnectionError:  # the server has closed without reading to the request's end
        reason = (
            f"the server did not take the request, of {len(body)} bytes: they may be more than its max_request"
            " (make the arguments or the environment smaller), or it is busy, or closing (try again)"
        )
        raise ExecRefused(reason, UNAVAILABLE) from None
    except (EOFError, OSError, WireError) as error:
        raise ExecRefused(f"the server broke off: {error}", UNAVAILABLE) from None
    if isinstance(decision, Deny):
        raise ExecRefused(f"denied: {decision.reason}", DENIED)
    return decision if isinstance(decision, Run) else session


def _not_utf8(request: Request) -> str:
    """What of the request is not, in words."""
    texts = {f"the environment variable {name}": name + value for name, value in request.env.items()}
    texts["the working directory"] = request.workdir
    for text in (request.file, *request.argv):
        texts[f"the command's {text}"] = text
    return next(what for what, text in texts.items() if text.encode(errors="ignore").decode() != text)


def hand_over(session: StreamSocket, numbers: Sequence[int]) -> Outcome:
    """Hand our descriptors over under their own numbers, pass on signals, and wait for the command's end.

    Runs in: the main thread, as signals are caught here.

    Raises:
        ExecRefused: the server has gone; it has ended the command.
    """
    with _Forwarder() as signals:
        try:
            session.send_with_fds({"fds": list(numbers)}, numbers)
            poll = select.poll()
            poll.register(session.fileno(), select.POLLIN)
            poll.register(signals.fd, select.POLLIN)
            while True:
                for fd, _ in poll.poll():
                    if fd == session.fileno():
                        if (received := session.try_receive_with_fds()) is not None:
                            return Outcome(received[0])
                    else:
                        _pass_on(session, signals.caught())
        except (EOFError, OSError, WireError) as error:
            raise ExecRefused(f"the server broke off: {error}", UNAVAILABLE) from None


def _pass_on(session: StreamSocket, numbers: Sequence[int]) -> None:
    for number in numbers:
        session.send({"signal": number})
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)  # as the command does; whoever continues us continues it


class _Forwarder:
    """Catches the signals that are the command's; `fd` is readable once one has come."""

    def __init__(self) -> None:
        self.fd, self._tell = (above_stdio(fd) for fd in os.pipe())
        for fd in (self.fd, self._tell):
            os.set_blocking(fd, False)

    def __enter__(self) -> _Forwarder:
        self._wakeup_before = signal.set_wakeup_fd(self._tell)
        self._handlers: dict[int, Any] = {}
        for number in FORWARDED:
            # What is ignored here (nohup) was meant to be, for the command as well.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, lambda *_: None)
        return self

    def caught(self) -> list[int]:
        """The signals that came, in order."""
        return [number for number in os.read(self.fd, 4096) if number in FORWARDED]

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.fd)
        os.close(self._tell)


# -- for a program that becomes the command ------------------------------------------------------


def complain(text: str) -> None:
    """Tell on standard error, if it can be told there: the exit status says it too, and must not change for that."""
    line = f"fdpool exec: {text}\n".encode(sys.getfilesystemencoding(), "backslashreplace")
    try:
        os.write(2, line)  # what `sys.stderr` could not write it would try again at exit, and fail again
    except OSError:
        pass


def run_in_place(request: Request) -> NoReturn:
    """Become the command, as if we had never been; exits with 127 or 126 if that cannot be."""
    for name in ("SIGPIPE", "SIGXFSZ"):  # what Python ignores from its start
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        if "/" not in request.file:  # it is nowhere in PATH
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        os.execve(request.file, request.argv, os.environ)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        complain(f"cannot run {request.argv[0]}: {reason}")
        os._exit(127 if number == errno.ENOENT else 126)


def exit_as(outcome: Outcome) -> int:
    """The status to exit with; if a signal ended the command, die by the same."""
    if outcome.signal is not None and outcome.signal in signal.valid_signals():
        import resource

        # The core, if there is one, is the command's.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if outcome.signal not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(outcome.signal, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [outcome.signal])
        os.kill(os.getpid(), outcome.signal)
    return outcome.exit_code & 0xFF
