"""When `fdpool run` stops before its end: the policy that `--halt` gives, and one question to it."""

import re
from typing import NamedTuple

_FORM = re.compile(r"(now|soon)(?:,(?:(fail|success)=([0-9]+)|fail=([0-9]+)%))?")
_FEWEST = 3  # failures of which to take a percentage: the first job to end would else always be all of them


class Halt(NamedTuple):
    """Stop after so many failures or successes, or at a share of failures among what has ended.

    Attributes:
        now: what runs is ended, instead of waited for.
    """

    now: bool
    failures: int | None = None
    percent: int | None = None
    successes: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Halt":
        """From `now` or `soon`, and then `,fail=N`, `,fail=P%` or `,success=N`; without these, `fail=1`.

        Raises:
            ValueError: it has another form, or a number is out of range.
        """
        form = _FORM.fullmatch(text)
        if form is None:
            raise ValueError("it is now or soon, and may go on with ,fail=N ,fail=P% or ,success=N")
        when, what, number, percent = form.groups()
        now = when == "now"
        if percent is not None:
            if not 1 <= int(percent) <= 100:
                raise ValueError(f"a share of failures is from 1% to 100%, not {percent}%")
            return cls(now, percent=int(percent))
        if number is not None and int(number) < 1:
            raise ValueError(f"{what}= must be at least 1")
        if what == "success":
            return cls(now, successes=int(number))
        return cls(now, failures=int(number or 1))

    def is_due(self, failed: int, succeeded: int) -> bool:
        """True if it is time, after so many jobs."""
        if self.successes is not None:
            return succeeded >= self.successes
        if self.percent is not None:
            return failed >= _FEWEST and 100 * failed >= self.percent * (failed + succeeded)
        assert self.failures is not None
        return failed >= self.failures
