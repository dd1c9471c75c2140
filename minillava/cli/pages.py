"""The parts that the pages of look and trace share: their style, and pictures inside the page."""

import base64
import io

from PIL import Image

MAX_SIDE = 1024
"""Of the picture in a page, in pixels."""

THEME = """
:root { color-scheme: light dark; --ink: #19191e; --paper: #fff; --faint: #60606a; --line: #8884; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --paper: #16161a; --faint: #a3a3ae; }
}
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; } }
* { box-sizing: border-box; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; }
"""
"""The style of all pages: bright or dark as the reader's system is, always bright on paper. A
browser leaves background colours out when it prints, unless a page says that they must stay."""


def data_url(picture: Image.Image, kind: str = "JPEG") -> str:
    """A picture as the URL that an <img> takes, made smaller if it is large. kind: JPEG, or PNG to
    keep every pixel."""
    picture, file = picture.copy(), io.BytesIO()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(file, kind, quality=92)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
