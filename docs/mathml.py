"""An mkdocs hook: formulas become MathML, which browsers set by themselves, without scripts or fonts from elsewhere."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex writes in generic mode.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, **kwargs) -> str:
    """Called by mkdocs with the HTML of each page."""
    return FORMULA.sub(_to_mathml, content)


def _to_mathml(match: re.Match) -> str:
    display = "block" if match["open"] == "[" else "inline"
    mathml = convert(html.unescape(match["latex"]).strip(), display=display)
    return f'<{match["tag"]} class="formula">{mathml}</{match["tag"]}>'
