"""Printed source as HTML, coloured by pygments; the colours stand in style.css, one set a theme."""

from __future__ import annotations

from markupsafe import Markup


def highlighted(source: str) -> Markup:
    """Python source as a <pre>, its tokens in classes."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return Markup(highlight(source, PythonLexer(), HtmlFormatter(nowrap=True)))
