"""Images in and out. Bytes come from the client; no address that somebody names is ever fetched."""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.server.media import EXTENSIONS, MAX_MEDIA_BYTES
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.requests import for_role, read_bytes
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import Token
from rlhf_cli.text import one_line

MAX_FORM_BYTES = MAX_MEDIA_BYTES + 16 * 1024
"""An image, and what boundaries and part headers may add to it."""


@for_role("client", "owner")
async def upload(request: Request, store: Store, _: Token) -> Response:
    """Keep one image of a multipart form; the answer names it for datapoints."""
    content = await read_bytes(request, MAX_FORM_BYTES)
    image, original_name = file_part(request.headers.get("Content-Type", ""), content)
    name = store.add_media(image, original_name)
    size = {"originalSizeBytes": len(image), "finalSizeBytes": len(image)}
    return JSONResponse({"fileName": name, "warnings": [], "wasCompressed": False, **size})


@for_role("client", "owner")
async def upload_by_url(request: Request, store: Store, _: Token) -> Response:
    raise Problem(
        422,
        "this server fetches nothing from other addresses; download the files and upload their bytes as local files",
    )


@for_role("rater", "client", "owner", browser=True)
async def show(request: Request, store: Store, _: Token) -> Response:
    """One image, as the type its bytes have; never anything that a browser would run."""
    digest = request.path_params["digest"]
    path, kind = store.media(digest)
    headers = {
        "Content-Disposition": f'inline; filename="{digest[:16]}.{EXTENSIONS[kind]}"',
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, max-age=86400, immutable",
    }
    return FileResponse(path, media_type=kind, headers=headers)


def file_part(content_type: str, body: bytes) -> tuple[bytes, str]:
    """The content and file name of the part called `file`.

    Raises:
        Problem: 400 when there is none.
    """
    boundary = re.search(r'multipart/form-data\s*;.*boundary="?([^";,\s]{1,70})"?', content_type, re.IGNORECASE)
    if boundary is None:
        raise Problem(400, "an image is sent as multipart/form-data with a boundary")
    delimiter = b"\r\n--" + boundary[1].encode()
    for part in (b"\r\n" + body).split(delimiter)[1:-1]:
        head, found, content = part.partition(b"\r\n\r\n")
        headers = head.decode("utf-8", "replace")
        if found and re.search(r'content-disposition:[^\r\n]*[;\s]name="?file"?', headers, re.IGNORECASE):
            name = re.search(r'filename="([^"\r\n]*)"', headers)
            return content, _plain_name(name[1] if name else "")
    raise Problem(400, "the form has no complete part called 'file'", {"file": ["missing"]})


def _plain_name(name: str) -> str:
    """A file name to show: its last component on one line. It never becomes part of a path."""
    return one_line(re.split(r"[/\\]", unquote(name))[-1])[:200].strip() or "image"


routes = [
    Route("/asset/file", upload, methods=["POST"]),
    Route("/asset/url", upload_by_url, methods=["POST"]),
    Route("/asset/batch-upload", upload_by_url, methods=["POST"]),
    Route("/media/{digest}", show, methods=["GET"]),
]
