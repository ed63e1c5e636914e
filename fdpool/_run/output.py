"""What `fdpool run` says: standard output and error, by number, and a bar that gives way to them.

Nothing is buffered here, so nothing is left that could fail at exit.
"""

from __future__ import annotations

import os
import select

_BLOCK_BYTES = 256 * 1024
_LONGEST_SHOWN = 4096  # PATH_MAX

FAILED, USAGE = 1, 2  # exit statuses


class Fatal(Exception):
    """What ends the whole run, and the exit status that it ends with."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


def copy(source: int, size: int, target: int) -> None:
    """Copy `size` bytes, and not what somebody left behind may still append.

    Raises:
        BrokenPipeError: nobody reads `target`.
        Fatal: standard output cannot be written.
    """
    offset = 0
    while offset < size and (block := os.pread(source, min(_BLOCK_BYTES, size - offset), offset)):
        offset += len(block)
        write(target, block)


def write(target: int, data: bytes) -> None:
    """Write all of it, waiting where that is needed.

    Raises: as `copy`.
    """
    view = memoryview(data)
    try:
        while view:
            view = view[_write_some(target, view) :]
    except OSError as error:
        if target != 1:
            return  # who has closed standard error wants none of it
        if isinstance(error, BrokenPipeError):
            raise
        raise Fatal(f"cannot write to standard output: {error.strerror}") from error


def _write_some(target: int, data: memoryview) -> int:
    try:
        return os.write(target, data)
    except (
        BlockingIOError
    ):  # somebody has set O_NONBLOCK, which belongs to all who share the terminal or pipe
        poll = select.poll()
        poll.register(target, select.POLLOUT)
        poll.poll()
        return 0


def complain(text: str) -> None:
    """A line on standard error."""
    write(2, f"fdpool: {text}\n".encode(errors="backslashreplace"))


def shown(name: bytes) -> str:
    """A name for a message: what cannot be printed is escaped, as `ls -b` does it; what no path can have is cut off."""
    text = name[:_LONGEST_SHOWN].decode("utf-8", "backslashreplace")
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped + ("..." if len(name) > _LONGEST_SHOWN else "")


def said(error: BaseException) -> str:
    """An error's reason, without the name that it is about."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


class Progress:
    """A bar on standard error, if that is a terminal that knows how to clear a line.

    Args:
        total: how many files there are, or None if nobody knows.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._done = self._failed = 0
        self._wanted = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
        self._visible = False
        self._mid_line = False  # output on a terminal has left the cursor there
        if total:
            self.show()

    def advance(self, files: int, failed: bool) -> None:
        """So many more files are done."""
        self._done += files
        self._failed += files if failed else 0
        self.show()

    def show(self) -> None:
        """Draw the bar."""
        if self._wanted:
            self.begin_line()
            self._visible = True
            write(2, b"\r" + self._line().encode() + b"\x1b[K")

    def hide(self) -> None:
        """Clear the line, for output that is about to be printed."""
        if self._visible:
            self._visible = False
            write(2, b"\r\x1b[K")

    def note_output(self, target: int, last: bytes) -> None:
        """What ends with this byte has been written to `target`."""
        self._mid_line = last != b"\n" and os.isatty(target)

    def begin_line(self) -> None:
        """Leave a line that output has not ended, so that nothing is written over it, or behind."""
        if self._wanted and self._mid_line:
            self._mid_line = False
            write(2, b"\n")

    def close(self) -> None:
        """Leave the last count standing."""
        if self._visible:
            self._visible = False
            write(2, b"\n")

    def _line(self) -> str:
        count = f"{self._done} files" if self._total is None else f"{self._done} of {self._total} files"
        if self._failed:
            count += f", {self._failed} failed"
        try:
            columns = os.get_terminal_size(2).columns or 80
        except OSError:  # it has hung up
            columns = 80
        width = min(30, columns - len(count) - 4)
        if not self._total or width < 5:
            return count[: columns - 1]
        filled = width * self._done // self._total
        return f"[{'#' * filled}{'.' * (width - filled)}] {count}"
