"""Run the examples of Flask and Starlette behind fdpool's fixtures: `python run.py [arguments of pytest]`.

Nothing of theirs is here: pip fetches their source distributions (`requirements.txt`), and they are kept for next time.
- Flask's examples have tests. They run as they are, but what their test clients ask goes to real servers, over sockets:
  `over_sockets.py`.
- Starlette's are the programs in its documentation. Each is served as it stands and asked: `test_starlette.py`.

Needs: flask, starlette, uvicorn, waitress, websockets. Ends with status 77 if something could not be fetched.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import sources

HERE = Path(__file__).parent
CANNOT_FETCH = 77  # as automake has it: skipped


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="testing-others-") as name:
        folder = Path(name)
        try:
            sources.unpack(HERE / "requirements.txt", folder)
        except sources.NotFetchedError as error:
            print(f"skipped: {error}")
            return CANNOT_FETCH
        (examples,) = folder.glob("flask-*/examples")
        (documents,) = folder.glob("starlette-*/docs")
        sources.write_programs(documents, folder / "starlette_docs")
        packages = [folder, examples / "tutorial", examples / "javascript"]
        sys.path[:0] = [str(HERE), *map(str, packages)]  # servers of the tests look there, too
        os.environ["STARLETTE_DOCS"] = str(folder / "starlette_docs")
        suites = [
            examples / "tutorial" / "tests",
            examples / "javascript" / "tests",
            HERE / "test_starlette.py",
        ]
        options = [
            "-c",
            str(HERE / "pytest.ini"),
            "--rootdir",
            name,
            "-p",
            "over_sockets",
            "-p",
            "no:cacheprovider",
        ]
        return pytest.main([*options, *sys.argv[1:], *map(str, suites)])


if __name__ == "__main__":
    raise SystemExit(main())
