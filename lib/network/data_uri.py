"""Decode data URIs (RFC 2397), in the forms in which programs write them."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from lib.errors import UserError

FORM = "data:image/png;base64,..."
BLANKS = re.compile(rb"[ \t\r\n\f]+")


def decode(uri: str) -> tuple[str, bytes]:
    """Return the media type and the content of a data URI. Raises UserError.

    Base64 may be escaped, split into lines, in the alphabet for URLs, and without padding.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise UserError(f"the data URI has no comma: give {FORM}")
    media_type, *parameters = head[len("data:") :].split(";")
    content = body.encode(errors="replace")  # JSON can hold halves of surrogate pairs
    content = unquote_to_bytes(content) if "%" in body else content
    if parameters and parameters[-1].strip().lower() == "base64":
        content = _decode_base64(content)
    if not content:
        raise UserError(f"the data URI holds no file: give {FORM}")
    return media_type.strip().lower() or "text/plain", content


def _decode_base64(text: bytes) -> bytes:
    text = BLANKS.sub(b"", text).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise UserError(f"the data URI is not complete, or not base64: give {FORM}") from None
