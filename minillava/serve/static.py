"""The page at `/`: a few files, read when the server starts; nothing else is ever read for it."""

import json
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from minillava.look.draw import SCALE

FOLDER = Path(__file__).parent / "page"

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser may do for the page: load from this server alone, run no script inside the page,
and send nothing to anybody else."""

HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # a newer server has a newer page
}


def is_page(path: str) -> bool:
    return path == "/" or path.startswith("/page/")


def read_page() -> dict[str, tuple[bytes, str]]:
    """The files of the page by their addresses: content, and media type."""
    found = {
        f"/page/{path.name}": (path.read_bytes(), KINDS[path.suffix])
        for path in sorted(FOLDER.iterdir())
        if path.suffix in KINDS  # systems and editors leave files of their own
    }
    scale = f"export const SCALE = {json.dumps(SCALE)};\n".encode()  # the colours of look
    found["/page/scale.js"] = scale, KINDS[".js"]
    found["/"] = found.pop("/page/index.html")
    return found


def page_routes() -> list[Route]:
    """A route for each file of the page."""

    def route(address: str, content: bytes, kind: str) -> Route:
        async def answer(request: Request) -> Response:
            return Response(content, headers=HEADERS, media_type=kind)

        return Route(address, answer, methods=["GET"])

    return [route(address, *file) for address, file in read_page().items()]
