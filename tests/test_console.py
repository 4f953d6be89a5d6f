"""Streams: the result on stdout, talk on stderr, and progress where there is no terminal."""

from __future__ import annotations

import json

import pytest

from cdclean import console as room
from cdclean.console import Console, duration
from cdclean.errors import UsageError


def test_the_result_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("talk")
    console.warn("beware")
    console.error(UsageError("wrong", hint="do this"))
    console.result("answer", {"answer": 1})
    shown = capsys.readouterr()
    assert shown.out == "answer\n"
    assert shown.err == "talk\nwarning: beware\nerror: wrong\n  -> do this\n"


def test_json_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json=True, quiet=True)
    console.say("talk")
    console.warn("beware")
    console.result("answer", {"answer": [1, None]})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"answer": [1, None]}
    assert shown.err == "warning: beware\n"


def test_progress_off_a_terminal_is_lines_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LOG_EVERY", 0.0)
    with Console().progress("scoring", 10, done=4) as advance:
        advance(1)
    with Console().progress("indexing", None, unit="files") as advance:
        advance(7)
    with Console(quiet=True).progress("silence", 10) as advance:
        advance(5)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("scoring: 5/10 images, ")
    assert first.endswith(" left")
    assert second.startswith("indexing: 7 files, ")
    assert "left" not in second


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (95, "1m35s"), (3600 * 25, "25h00m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
