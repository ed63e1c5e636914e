"""To be preloaded: the supervisor's control group counts in a file that the environment names."""

from __future__ import annotations

import os

from fdpool import _oom

VARIABLE = "FDPOOL_TEST_GROUP"

if VARIABLE in os.environ:
    _events = os.environ[VARIABLE]
    _oom._TOGETHER_S = 0.0
    _oom.Witness._kills = lambda _: _oom._read_count(_events)  # type: ignore[method-assign]
