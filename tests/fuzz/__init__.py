"""Near misses of every message, in great number: `python -m tests.fuzz --inputs 100000 --seed 1`.

`inputs` makes them from a `random.Random`, which may be seeded, drawn from by Hypothesis (`tests/test_fuzz.py`, a
short form that shrinks what fails), or fed by atheris (`--atheris`). `targets` takes them: the pure decoders, and
live sockets of a worker, a client and an `ExecServer`.
"""
