"""The parts of `fdpool run` that need no process: replacement strings, `--halt`, escapes of the log."""

from __future__ import annotations

import codecs
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdpool._run.halt import Halt
from fdpool._run.joblog import Entry, Joblog, escape, read_done
from fdpool._run.names import Names
from fdpool._run.output import Fatal
from fdpool._run.template import Program, Template

# -- replacement strings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "filled"),
    [
        ("{}", "d/a.tar.gz", "d/a.tar.gz"),
        ("{.}", "d/a.tar.gz", "d/a.tar"),
        ("{/}", "d/a.tar.gz", "a.tar.gz"),
        ("{//}", "d/a.tar.gz", "d"),
        ("{/.}", "d/a.tar.gz", "a.tar"),
        ("{.}", "d.e/a", "d.e/a"),
        ("{.}|{/.}", "d/.bashrc", "d/.bashrc|.bashrc"),
        ("{//}|{/}", "a", ".|a"),
        ("{//}|{/}", "/a", "/|a"),
        ("{//}|{/}", "d/e/", "d|e"),
        ("{//}|{/}", "/", "/|/"),
        ("<{}{}>-{#}-{%}", "a", "<aa>-7-3"),
        ("{}", "{#}", "{#}"),
        ("${#} {x} { } {..} {///} $(({#}))", "a", "${#} {x} { } {..} {///} $((7))"),
    ],
)
def test_replacement_strings_are_those_of_gnu_parallel(text: str, name: str, filled: str) -> None:
    assert Template(text.encode()).fill(name.encode(), 7, 3) == filled.encode()


def test_a_place_that_nobody_knows_stays_as_it_is() -> None:
    assert Template(b"{%}{#}").fill(b"a", 1, None) == b"{%}1"


@pytest.mark.parametrize(
    ("arguments", "append", "filled"),
    [
        ("cp {} -v", True, "cp a.c b.c -v"),
        ("cc -I{//} -o{/.} x{#}", True, "cc -I. -I. -oa -ob x5"),
        ("rm -v", True, "rm -v a.c b.c"),
        ("rm {#}", True, "rm 5 a.c b.c"),
        ("wc -l", False, "wc -l"),
    ],
)
def test_an_argument_is_there_once_for_each_name(arguments: str, append: bool, filled: str) -> None:
    program = Program([each.encode() for each in arguments.split()], append)
    assert program.fill([b"a.c", b"b.c"], 5, 1) == [each.encode() for each in filled.split()]


# -- names -----------------------------------------------------------------------------------------


def test_a_job_waits_for_all_its_names_and_the_last_takes_what_is_left() -> None:
    names = Names(["a", "b", "c"], b"\n", 2)
    assert [names.take_batch(), names.take_batch()] == [[b"a", b"b"], [b"c"]]
    names = Names(["a"], b"\n", 2)
    names.ended = False
    assert not names.has_batch()
    names.ended = True
    assert names.has_batch()


# -- --halt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "due", "not_due"),
    [
        ("now", [(1, 0), (2, 9)], [(0, 99)]),
        ("soon,fail=3", [(3, 0)], [(2, 99)]),
        ("soon,fail=50%", [(3, 3), (4, 0)], [(2, 0), (3, 4)]),
        ("now,success=2", [(0, 2), (9, 3)], [(9, 1)]),
    ],
)
def test_halt_is_due(text: str, due: list[tuple[int, int]], not_due: list[tuple[int, int]]) -> None:
    halt = Halt.parse(text)
    assert halt.now is text.startswith("now")
    assert all(halt.is_due(*counts) for counts in due)
    assert not any(halt.is_due(*counts) for counts in not_due)


@pytest.mark.parametrize(
    "text",
    ["", "later", "now,", "now,fail", "now,fail=0", "soon,fail=0%", "soon,fail=101%", "now,success=5%"],
)
def test_halt_in_any_other_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Halt.parse(text)


# -- the log ---------------------------------------------------------------------------------------


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_command_is_one_line_of_printable_text_in_the_log_and_can_be_had_back(command: bytes) -> None:
    escaped = escape(command)
    text = escaped.decode()
    assert text.isprintable()
    back = b"".join(
        piece.encode() if not piece.isascii() else codecs.escape_decode(piece.encode())[0]  # type: ignore[attr-defined]
        for piece in _pieces(text)
    )
    assert back == command


def _pieces(text: str) -> list[str]:
    """Escapes, and characters, one by one."""
    pieces, at = [], 0
    while at < len(text):
        length = 1 if text[at] != "\\" else 4 if text[at + 1] == "x" else 2
        pieces.append(text[at : at + length])
        at += length
    return pieces


def entry(command: bytes, exit_code: int = 0, signal: int = 0) -> Entry:
    return Entry(1, 1.5, 0.25, 0, 0, exit_code, signal, 1, command)


def log_of(path: bytes, *entries: Entry) -> None:
    log = Joblog(path, resume=False)
    for each in entries:
        log.write(each)
    log.close()


@pytest.fixture
def path(tmp_path: os.PathLike[str]) -> bytes:
    return os.fsencode(tmp_path) + b"/log"


def test_the_log_says_what_succeeded_last(path: bytes) -> None:
    log_of(path, entry(b"a"), entry(b"b", 3), entry(b"c", -1, 9), entry(b"d", 1), entry(b"d"), entry(b"e"))
    log_of(path, entry(b"e", 1))
    done = read_done(path)
    assert {each for each in (b"a", b"b", b"c", b"d", b"e", b"f") if done.take(each)} == {b"a", b"d"}


def test_a_job_that_is_there_twice_has_to_succeed_twice(path: bytes) -> None:
    log_of(path, entry(b"a"))
    done = read_done(path)
    assert [done.take(b"a"), done.take(b"a")] == [True, False]


@pytest.mark.parametrize("torn", [b"2\t:\t1.5", b"\0\0\0", b"1\t:\t1.500\t0.250\t0\t0\t0\t0\t1\tb"])
def test_a_torn_last_line_is_cut_off_and_says_nothing(path: bytes, torn: bytes) -> None:
    log_of(path, entry(b"a"))
    with open(path, "ab") as file:
        file.write(torn)
    log_of(path, entry(b"c"))
    done = read_done(path)
    assert [done.take(each) for each in (b"a", b"b", b"c")] == [True, False, True]


def test_a_log_that_was_torn_in_its_first_line_begins_anew(path: bytes) -> None:
    with open(path, "wb") as file:
        file.write(b"Seq\tHo")
    log_of(path, entry(b"a"))
    assert read_done(path).take(b"a")


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"precious\n", "is no log of fdpool run: its first line is another"),
        (b"S", None),
        (b"SS", "is no log of fdpool run"),
        (
            b"Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n",
            "is no log of fdpool run",
        ),
    ],
)
def test_a_file_that_is_no_log_is_refused_and_left_alone(
    path: bytes, contents: bytes, reason: str | None
) -> None:
    with open(path, "wb") as file:
        file.write(contents)
    if reason is None:
        log_of(path)
        return
    with pytest.raises(Fatal, match=reason):
        Joblog(path, resume=False)
    with open(path, "rb") as file:
        assert file.read() == contents


def test_a_line_in_the_middle_that_is_none_of_ours_is_named(path: bytes) -> None:
    log_of(path, entry(b"a"))
    with open(path, "ab") as file:
        file.write(b"a note\n")
    with pytest.raises(Fatal, match="line 3 of the log .*/log is not as fdpool run writes it"):
        Joblog(path, resume=True)


def test_nobody_waits_to_resume_from_a_pipe(path: bytes) -> None:
    os.mkfifo(path)
    with pytest.raises(Fatal, match="it is not a regular file"):
        Joblog(path, resume=True)


def test_two_runs_cannot_write_to_one_log(path: bytes) -> None:
    log = Joblog(path, resume=False)
    with pytest.raises(Fatal, match="another run is writing to the log"):
        Joblog(path, resume=True)
    log.close()
    log_of(path)
