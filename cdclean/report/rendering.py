"""The page as text: the template with its style and script, and the words for numbers in it.

Names come from file systems and archives that nobody vouches for. The template escapes all of them, the script holds
none, and the page's own policy (by hash) lets no other style or script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from importlib.resources import files
from typing import Any

from cdclean.report.figures import percent


def render(context: dict[str, Any]) -> str:
    """The page for the variables in `context`; the same ones give the same text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "count": lambda number: f"{number:,}",
        "figures": lambda number: f"{number:,.0f}" if number >= 100 else f"{number:.3g}",
        "json": json.dumps,  # ASCII: HTML turns some characters into others, even in an attribute
        "percent": percent,
        "pixels": lambda number: f"{number:,.1f}",
        "times": _times,
        "visible": visible,
    }
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = environment.from_string(_asset("page.html.j2"))
    return template.render(context, style=Markup(style), script=Markup(script), policy=policy).lstrip()


def visible(text: str) -> str:
    """`text` with control and formatting characters spelled out, so that none can hide or turn round its neighbours."""
    if text.isprintable():
        return text
    return "".join(_spelled(letter) if unicodedata.category(letter) in _HIDDEN else letter for letter in text)


_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _spelled(letter: str) -> str:
    code = ord(letter)
    return _SHORT.get(letter) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×" if 0 < ratio < 9.95 else f"{ratio:,.0f}×"


def _asset(name: str) -> str:
    return files("cdclean.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
