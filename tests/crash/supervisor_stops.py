"""To be preloaded: has the supervisor stop at the point that the environment names."""

from __future__ import annotations

import os

from . import points

_name, _, _folder = os.environ[points.VARIABLE].partition("@")
points.install(_name, _folder)
