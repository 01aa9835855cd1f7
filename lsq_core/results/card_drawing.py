"""Drawing a result card's shapes as PNG (with Pillow) and as SVG, in the app's typeface."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lsq_core.errors import LsqError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

#: Size of a card in its own units, the usual size of a link preview.
WIDTH, HEIGHT = 1200, 630
#: Pixels per unit in the PNG.
_SCALE = 2
#: The font file in Streamlit's package: Source Sans 3 (SIL Open Font License), variable weight.
_TYPEFACE = "static/static/media/SourceSansVF-Upright*.woff2"


@dataclass(frozen=True)
class Box:
    """A filled rectangle with its upper left corner at x, y; ``about`` is its tooltip."""

    x: float
    y: float
    width: float
    height: float
    color: str
    about: str = ""


@dataclass(frozen=True)
class Line:
    """A line of text with its baseline at y; ``anchor`` is the point of the line at x."""

    x: float
    y: float
    text: str
    size: float
    color: str
    weight: int = 400
    #: ``start``, ``middle`` or ``end``, as in SVG.
    anchor: str = "start"


Shape = Box | Line


@cache
def _typeface() -> bytes:
    """Return the content of the font file.

    Raises
    ------
    LsqError
        If Streamlit is not installed or does not contain the file.
    """
    spec = find_spec("streamlit")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    file = next(folder.glob(_TYPEFACE), None) if folder else None
    if file is None:
        raise LsqError(
            "Result cards are set in Source Sans, which comes with Streamlit and was not found; "
            "install the requirements again."
        )
    return file.read_bytes()


@cache
def _font(size: int, weight: int) -> FreeTypeFont:
    from PIL import ImageFont

    font = ImageFont.truetype(BytesIO(_typeface()), size)
    font.set_variation_by_axes([weight])
    return font


def text_width(text: str, size: float, weight: int = 400) -> float:
    """Return the width of a line of text in a card's units."""
    return _font(round(size * _SCALE), weight).getlength(text) / _SCALE


def draw_png(shapes: Sequence[Shape]) -> bytes:
    """Return shapes on a white background as PNG, two pixels per unit."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        x, y = shape.x * _SCALE, shape.y * _SCALE
        if isinstance(shape, Box):
            right, bottom = x + shape.width * _SCALE, y + shape.height * _SCALE
            draw.rectangle(
                (round(x), round(y), round(right) - 1, round(bottom) - 1), fill=shape.color
            )
        else:
            font = _font(round(shape.size * _SCALE), shape.weight)
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            draw.text((x, y), shape.text, fill=shape.color, font=font, anchor=anchor)
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def draw_svg(shapes: Sequence[Shape], alt: str) -> str:
    """Return shapes on a white background as an SVG element for a page with :func:`font_css`."""
    parts = [_box_svg(s) if isinstance(s, Box) else _line_svg(s) for s in shapes]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(alt)}" '
        f'xmlns="http://www.w3.org/2000/svg"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        f"{''.join(parts)}</svg>"
    )


def _box_svg(box: Box) -> str:
    about = f"<title>{html.escape(box.about)}</title>" if box.about else ""
    return (
        f'<rect x="{box.x:.2f}" y="{box.y:.2f}" width="{box.width:.2f}" '
        f'height="{box.height:.2f}" fill="{box.color}">{about}</rect>'
    )


def _line_svg(line: Line) -> str:
    return (
        f'<text x="{line.x:.2f}" y="{line.y:.2f}" font-size="{line.size:g}" '
        f'font-weight="{line.weight}" fill="{line.color}" text-anchor="{line.anchor}">'
        f"{html.escape(line.text)}</text>"
    )


def font_css() -> str:
    """Return a CSS rule with the typeface embedded."""
    data = b64encode(_typeface()).decode("ascii")
    return (
        '@font-face { font-family: "Card"; font-weight: 200 900; '
        f'src: url("data:font/woff2;base64,{data}") format("woff2"); }}'
    )
