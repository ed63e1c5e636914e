"""The pool under asyncio: its futures can be awaited, and `run_in_executor` takes it as any executor."""

import asyncio
import tempfile

import fdpool


def square(number):
    return number * number


def first_line(file, *, upper):
    with file:
        line = file.readline().rstrip()
    return line.upper() if upper else line


async def main(pool):
    loop = asyncio.get_running_loop()
    squares = await asyncio.gather(*(loop.run_in_executor(pool, square, n) for n in range(8)))
    print("squares:", squares)

    # For keywords, open files and cancelling: a cancelled await of a future ends its task.
    with tempfile.TemporaryFile("w+") as notes:
        notes.write("buy milk\n")
        notes.seek(0)
        future = pool.submit(first_line, notes, upper=True)
    print("first line:", await future)


with fdpool.Pool(2) as pool:  # around the loop: to leave it waits, which would hold the loop up
    asyncio.run(main(pool))
