"""Programs: how many in a second, from a small and from a large client, and bytes from file to file."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import fdpool

from .._measure import Measure, Outcome, Round, Settings

TRUE = ["/bin/true"]


@contextmanager
def by_pool(settings: Settings, ballast: int = 0) -> Iterator[Round]:
    held = b"x" * ballast
    with fdpool.Pool(2) as pool:

        def one_round() -> Outcome:
            for done in [pool.run(TRUE) for _ in range(settings.size)]:
                done.result()
            return Outcome(settings.size)

        one_round()
        yield one_round
    del held


@contextmanager
def by_threads(settings: Settings, ballast: int = 0) -> Iterator[Round]:
    held = b"x" * ballast
    with ThreadPoolExecutor(2) as threads:

        def one_round() -> Outcome:
            for done in [threads.submit(subprocess.run, TRUE, check=False) for _ in range(settings.size)]:
                done.result()
            return Outcome(settings.size)

        yield one_round
    del held


@contextmanager
def by_xargs(settings: Settings) -> Iterator[Round]:
    names = b"x\n" * settings.size

    def one_round() -> Outcome:
        subprocess.run(["xargs", "-P", "2", "-n", "1", *TRUE], input=names, check=True)
        return Outcome(settings.size)

    yield one_round


FILES = 4


@contextmanager
def files_of(size: int) -> Iterator[list[tuple[Path, Path]]]:
    """Pairs of a file of `size` bytes, which can be compressed somewhat, and the name of another; in memory, as how
    long a disk takes depends on what else is to be written to it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fdpool-bench-", dir=memory) as folder:
        words = [random.randbytes(random.randint(2, 12)) for _ in range(500)]
        block = b"".join(random.choice(words) for _ in range(20_000))
        pairs = [(Path(folder, f"{number}.in"), Path(folder, f"{number}.out")) for number in range(FILES)]
        for source, _ in pairs:
            source.write_bytes((block * (size // len(block) + 1))[:size])
        yield pairs


def timed(pairs: list[tuple[Path, Path]], work: Callable[[], object]) -> Outcome:
    """What `work` takes for a file, where there is none of the round before: to empty one takes half as long as to copy
    it, and who opens all of them does so one after the other, where two halves of a shell do it at the same time."""
    for _, target in pairs:
        target.unlink(missing_ok=True)
    begun = time.perf_counter()
    work()
    return Outcome(FILES, value=(time.perf_counter() - begun) / FILES)


@contextmanager
def files_by_pool(program: list[str], settings: Settings) -> Iterator[Round]:
    with files_of(settings.size) as pairs, fdpool.Pool(2) as pool:

        def work() -> None:
            with ExitStack() as files:
                done = [
                    pool.run(
                        program,
                        stdin=files.enter_context(source.open("rb")),
                        stdout=files.enter_context(target.open("wb")),
                        check=True,
                    )
                    for source, target in pairs
                ]
                for each in done:
                    each.result()

        yield partial(timed, pairs, work)


@contextmanager
def pipeline_by_pool(programs: list[list[str]], settings: Settings) -> Iterator[Round]:
    with files_of(settings.size) as pairs, fdpool.Pool(2) as pool:

        def work() -> None:
            with ExitStack() as files:
                done = [
                    pool.pipeline(
                        programs,
                        stdin=files.enter_context(source.open("rb")),
                        stdout=files.enter_context(target.open("wb")),
                        check=True,
                    )
                    for source, target in pairs
                ]
                for each in done:
                    each.result()

        yield partial(timed, pairs, work)


@contextmanager
def files_by_shell(command: str, settings: Settings) -> Iterator[Round]:
    """Two at a time, by one shell: each half of the files in the background, one after another."""
    with files_of(settings.size) as pairs:
        halves = [
            "; ".join(
                f"{command.format(source=shlex.quote(str(source)))} > {shlex.quote(str(target))}"
                for source, target in half
            )
            for half in (pairs[::2], pairs[1::2])
        ]
        script = " & ".join(f"{{ {half}; }}" for half in halves) + " & wait"
        yield partial(timed, pairs, partial(subprocess.run, ["/bin/sh", "-c", script], check=True))


LABELS = {
    "threads": "`subprocess.run` in a ThreadPoolExecutor",
    "xargs": "`xargs -P 2 -n 1`",
    "shell": "a shell, two at a time",
}
MIB = 2**20


def of_files(name: str, title: str, pool, shell: str) -> Measure:
    return Measure(
        name,
        "Programs",
        f"{title}, file to file; a file of 32 MiB",
        {"fdpool": pool, "shell": partial(files_by_shell, shell)},
        size=32 * MIB,
        quick_size=MIB,
        unit="ms",
        scale=1e3,
        rounds=7,
        labels=LABELS,
    )


MEASURES = (
    Measure(
        "programs",
        "Programs",
        "`/bin/true`, 400 of them; each",
        {"fdpool": by_pool, "threads": by_threads, "xargs": by_xargs},
        size=400,
        quick_size=40,
        rounds=11,
        labels=LABELS,
    ),
    Measure(
        "programs-large",
        "Programs",
        "`/bin/true`, 400 of them, from a client that holds 400 MB; each",
        {
            "fdpool": partial(by_pool, ballast=400_000_000),
            "threads": partial(by_threads, ballast=400_000_000),
            "xargs": by_xargs,
        },
        size=400,
        quick_size=40,
        rounds=11,
        labels=LABELS,
    ),
    of_files("files-gzip", "`gzip -1`", partial(files_by_pool, ["gzip", "-1"]), "gzip -1 < {source}"),
    of_files("files-cat", "`cat`", partial(files_by_pool, ["cat"]), "cat < {source}"),
    of_files(
        "files-pipeline",
        "`cat | gzip -1`",
        partial(pipeline_by_pool, [["cat"], ["gzip", "-1"]]),
        "cat < {source} | gzip -1",
    ),
)
