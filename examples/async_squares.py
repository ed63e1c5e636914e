"""The pool under asyncio: `run_in_executor`, and `wrap_future` for what needs keywords or descriptors."""

import asyncio
import tempfile

import fdpool


def square(number):
    return number * number


def first_line(file, *, upper):
    with file:
        line = file.readline().rstrip()
    return line.upper() if upper else line


async def main():
    loop = asyncio.get_running_loop()
    with fdpool.Pool(2) as pool:
        # Any executor can be used this way; this one takes lambdas and open files too.
        squares = await asyncio.gather(*(loop.run_in_executor(pool, square, n) for n in range(8)))
        print("squares:", squares)

        with tempfile.TemporaryFile("w+") as notes:
            notes.write("buy milk\n")
            notes.seek(0)
            future = pool.submit(first_line, notes, upper=True)
        print("first line:", await asyncio.wrap_future(future))


asyncio.run(main())
