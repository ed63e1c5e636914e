"""What users' type checkers see; the checks are those of mypy, for which these lines are here."""

from __future__ import annotations

import concurrent.futures as cf
import pickle

import pytest

import fdpool


def test_futures_go_where_those_of_the_standard_library_do() -> None:
    with fdpool.Pool(1) as pool:
        sizes: list[int] = [future.result() for future in cf.as_completed([pool.submit(len, "ab")])]
        done: set[cf.Future[int]] = cf.wait([pool.submit(len, "abc")]).done
    assert (sizes, [future.result() for future in done]) == ([2], [3])


def test_a_name_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Poool'"):
        fdpool.Poool(2)  # type: ignore[attr-defined]


def test_the_reason_of_a_failed_bind_travels() -> None:
    told = pickle.loads(pickle.dumps(fdpool.BindFailed("in use", 98)))
    assert (str(told), told.errno) == ("in use", 98)
