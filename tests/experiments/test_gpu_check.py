import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.gpu_check import CheckError, check, finished, page, running


def fail() -> None:
    raise CheckError("no such luck")


def test_what_fails_is_named_and_the_rest_goes_on() -> None:
    checks: Any = SimpleNamespace(all={"bad": fail, "good": lambda: {"a row": {"ms/step": 1.5}}})
    found = dict(check(checks))
    assert list(found) == ["bad", "good"]
    text = page({"machine": {"about": "this machine"}, "checks": found})
    assert "On this machine." in text
    assert "FAILED: CheckError: no such luck" in text
    assert "| a row | 1.5 |" in text


def test_program_that_takes_too_long_ends_with_what_it_has_started() -> None:
    began = time.monotonic()
    # Both hold the pipe open, which is read to its end.
    with (
        pytest.raises(CheckError, match=r"took more than 0\.1 s"),
        running("sh", "-c", "sleep 60 & sleep 60") as process,
    ):
        finished(process, 0.1)
    assert time.monotonic() - began < 30


def test_program_that_fails_is_quoted() -> None:
    with (
        pytest.raises(CheckError, match="ended with code 1: oh no"),
        running(sys.executable, "-c", "raise SystemExit('oh no')") as process,
    ):
        finished(process, 30)
