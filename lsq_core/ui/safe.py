"""Streamlit wrapped so that no displayed text can link to or fetch anything.

Names of models, jobs, corpora and plans, notes and error messages come from outside, and most
Streamlit elements take Markdown, in which a name like ``![](http://host/x)`` is an image that the
browser fetches. Every page imports ``st`` from here instead of from Streamlit; text rendered as
Markdown first passes through :func:`lsq_core.ui.words.sanitize`, and every figure through
:func:`lsq_core.charts.style.sanitize_figure`. A name that must also appear verbatim
(``my_*_model``) is passed through :func:`lsq_core.ui.words.escape` when it is put in a sentence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pandas as pd
import streamlit
from streamlit.delta_generator import DeltaGenerator

from lsq_core.charts.style import sanitize_figure
from lsq_core.ui.words import sanitize

#: Parameters that hold Markdown in every element that has them.
_COMMON_TEXT_PARAMETERS = ("label", "help", "text", "tabs")
#: Further parameters, by element.
_TEXT_PARAMETERS = {
    "metric": ("value", "delta", "delta_description"),
    "title": ("body",),
    "header": ("body",),
    "subheader": ("body",),
    "markdown": ("body",),
    "caption": ("body",),
    "info": ("body",),
    "warning": ("body",),
    "error": ("body",),
    "success": ("body",),
    "toast": ("body",),
    "write": ("args",),
    "table": ("data",),
}
#: Elements whose options, formatted by ``format_func``, are Markdown.
_MARKDOWN_OPTION_ELEMENTS = ("radio", "pills", "segmented_control", "select_slider")
#: Elements whose text is passed on unchanged.
_PLAIN_TEXT_ELEMENTS = ("text", "code", "html")


class SafeStreamlit:
    """Streamlit or one of its containers, whose elements render only sanitized Markdown."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if isinstance(attribute, DeltaGenerator):  # the sidebar
            return SafeStreamlit(attribute)
        is_element = name == "spinner" or hasattr(DeltaGenerator, name)
        return _wrap_element(name, attribute) if is_element and callable(attribute) else attribute

    def __enter__(self) -> SafeStreamlit:
        self._target.__enter__()
        return self

    def __exit__(self, *raised: object) -> Any:
        return self._target.__exit__(*raised)


def _wrap_element(name: str, element: Callable) -> Callable:
    """Wrap an element so that its text, and that of containers it returns, is sanitized."""

    @functools.wraps(element)
    def wrapped(*args: Any, **options: Any) -> Any:
        bound = _signature(name, element).bind(*args, **options)
        if name not in _PLAIN_TEXT_ELEMENTS:
            for key in (*_COMMON_TEXT_PARAMETERS, *_TEXT_PARAMETERS.get(name, ())):
                if key in bound.arguments:
                    bound.arguments[key] = _sanitize(bound.arguments[key])
        if name in _MARKDOWN_OPTION_ELEMENTS:
            format_option = bound.arguments.get("format_func", str)
            bound.arguments["format_func"] = lambda option: sanitize(str(format_option(option)))
        if name == "plotly_chart":
            first = next(iter(bound.arguments))
            bound.arguments[first] = sanitize_figure(bound.arguments[first])
        return _wrap_result(element(*bound.args, **bound.kwargs))

    return wrapped


_signatures: dict[str, inspect.Signature] = {}


def _signature(name: str, element: Callable) -> inspect.Signature:
    if name not in _signatures:
        _signatures[name] = inspect.signature(element)
    return _signatures[name]


def _sanitize(value: Any) -> Any:
    """Sanitize a string, a sequence of strings or a table; return anything else unchanged."""
    if isinstance(value, str):
        return sanitize(value)
    if isinstance(value, list | tuple):
        return type(value)(_sanitize(item) for item in value)
    if isinstance(value, pd.Series):
        return _sanitize(value.to_frame())
    if isinstance(value, pd.DataFrame):
        return value.map(_sanitize).rename(index=_sanitize, columns=_sanitize)
    return value


def _wrap_result(result: Any) -> Any:
    """Wrap the containers that an element returned."""
    if isinstance(result, DeltaGenerator):
        return SafeStreamlit(result)
    if isinstance(result, list) and result and isinstance(result[0], DeltaGenerator):
        return [SafeStreamlit(item) for item in result]
    return result


st: Any = SafeStreamlit(streamlit)
