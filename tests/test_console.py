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


def test_what_a_terminal_would_obey_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;owned\x07\x9b2J\r\u202e\udcff.png"
    shown = r"a\x1b]0;owned\x07\x9b2J\r\u202e\udcff.png"
    console = Console()
    console.result(name, {"name": name})
    console.say(name)
    console.warn(name)
    console.error(UsageError(name, hint=name))
    out, err = capsys.readouterr()
    assert out == f"{shown}\n"
    assert err == f"{shown}\nwarning: {shown}\nerror: {shown}\n  -> {shown}\n"
    Console(json=True).result(name, {"name": name})
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": name}
    assert out.replace("\n", "").isprintable()


def test_what_is_written_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "a\\b c\u00a0d\u3000e\n\tcaf\u00e9 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f52c"
    )
    Console().result(names, {})
    assert capsys.readouterr().out == f"{names}\n"


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
