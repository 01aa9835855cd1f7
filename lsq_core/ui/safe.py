"""Streamlit as the pages use it: no text that they show can fetch or link to anything.

Names of models, jobs, corpora and plans, notes and error messages come from outside, and most
elements of Streamlit take Markdown, in which a name like ``![](http://host/x)`` is an image that
the browser fetches. Every page imports ``st`` from here instead of from Streamlit; whatever text
an element takes as Markdown passes through :func:`lsq_core.ui.words.inert` first, and every
figure through :func:`lsq_core.charts.style.inert_figure`. A name that should also look as it is
written (``my_*_model``) goes through :func:`lsq_core.ui.words.literal` where it is put in a
sentence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pandas as pd
import streamlit
from streamlit.delta_generator import DeltaGenerator

from lsq_core.charts.style import inert_figure
from lsq_core.ui.words import inert

#: Parameters that hold Markdown, in every element that has one of the name.
_EVERYWHERE = ("label", "help", "text", "tabs")
#: Further ones, by element.
_MORE = {
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
#: Elements whose options are Markdown, as their ``format_func`` writes them.
_OPTIONS = ("radio", "pills", "segmented_control", "select_slider")
#: Elements that show text as it is.
_PLAIN = ("text", "code", "html")


class Guarded:
    """Streamlit, or a place on the page, whose elements take no Markdown but inert Markdown."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if isinstance(found, DeltaGenerator):  # the sidebar
            return Guarded(found)
        is_element = name == "spinner" or hasattr(DeltaGenerator, name)
        return _guard(name, found) if is_element and callable(found) else found

    def __enter__(self) -> Guarded:
        self._target.__enter__()
        return self

    def __exit__(self, *raised: object) -> Any:
        return self._target.__exit__(*raised)


def _guard(name: str, element: Callable) -> Callable:
    """An element that makes its text inert, and whose places on the page do so too."""

    @functools.wraps(element)
    def guarded(*args: Any, **options: Any) -> Any:
        given = _signature(name, element).bind(*args, **options)
        if name not in _PLAIN:
            for key in (*_EVERYWHERE, *_MORE.get(name, ())):
                if key in given.arguments:
                    given.arguments[key] = _inert(given.arguments[key])
        if name in _OPTIONS:
            shown = given.arguments.get("format_func", str)
            given.arguments["format_func"] = lambda option: inert(str(shown(option)))
        if name == "plotly_chart":
            first = next(iter(given.arguments))
            given.arguments[first] = inert_figure(given.arguments[first])
        return _place(element(*given.args, **given.kwargs))

    return guarded


_signatures: dict[str, inspect.Signature] = {}


def _signature(name: str, element: Callable) -> inspect.Signature:
    if name not in _signatures:
        _signatures[name] = inspect.signature(element)
    return _signatures[name]


def _inert(value: Any) -> Any:
    """Text, each of several texts, or a table's texts, made inert; anything else as it is."""
    if isinstance(value, str):
        return inert(value)
    if isinstance(value, list | tuple):
        return type(value)(_inert(item) for item in value)
    if isinstance(value, pd.Series):
        return _inert(value.to_frame())
    if isinstance(value, pd.DataFrame):
        return value.map(_inert).rename(index=_inert, columns=_inert)
    return value


def _place(made: Any) -> Any:
    """What an element gave back; places on the page are guarded too."""
    if isinstance(made, DeltaGenerator):
        return Guarded(made)
    if isinstance(made, list) and made and isinstance(made[0], DeltaGenerator):
        return [Guarded(place) for place in made]
    return made


st: Any = Guarded(streamlit)
