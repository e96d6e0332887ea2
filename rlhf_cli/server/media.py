"""Images: kept under the hash of their bytes, known by their first bytes, never fetched from anywhere."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from rlhf_cli.server.problems import Problem

MAX_MEDIA_BYTES = 8 * 1024 * 1024
EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif"}
_HASH = re.compile(r"[0-9a-f]{64}")


def image_type(content: bytes) -> str | None:
    """The type by its signature, whatever name or type came with it; None for everything else, SVG above all."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return None


class MediaFolder:
    """Files named by the SHA-256 of their content; `folder` is made with the first one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def put(self, content: bytes) -> tuple[str, str]:
        """Keep an image, on disk once this returns. Returns its hash and type.

        Raises:
            Problem: 413 too large, 415 no image, 503 the store is in memory and has no place for files.
        """
        if len(content) > MAX_MEDIA_BYTES:
            raise Problem(413, f"an image may have {MAX_MEDIA_BYTES} bytes")
        kind = image_type(content)
        if kind is None:
            raise Problem(415, "only PNG, JPEG, WebP and GIF images are taken, and this is none by its first bytes")
        if self._folder is None:
            raise Problem(503, "this server keeps everything in memory and has no place for images")
        digest = hashlib.sha256(content).hexdigest()
        path = self.path(digest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, content)
        return digest, kind

    def path(self, digest: str) -> Path:
        """Where the image with that hash is, or would be.

        Raises:
            Problem: 404 for what is not a hash, so that no path is ever built from it.
        """
        if self._folder is None or not _HASH.fullmatch(digest):
            raise Problem(404, "no such image")
        return self._folder / digest[:2] / digest


def _write(path: Path, content: bytes) -> None:
    """A reader, or a crash, meets the whole file or none."""
    fd, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(name).rename(path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise Problem(503, f"the disk cannot take this now ({error.strerror})") from error
