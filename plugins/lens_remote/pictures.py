"""A picture in an answer, or at the address that it names: decoded, bounded, and checked that it is one."""

from __future__ import annotations

import base64
import binascii
import time
from urllib.parse import urljoin, urlsplit

from attrs import frozen

from lens_core.io import http, images
from lens_core.io.images import ImageError
from lens_core.io.redaction import holds
from lens_remote.answers import Failure, lost

LARGEST = 64 << 20  # bytes of a picture's file
HOPS = 5  # redirects of a picture's address that are followed, none of them with the key
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # what a manifest takes
GONE = frozenset({401, 403, 404, 410})  # how a store answers for an address that has expired


@frozen
class Checked:
    """A picture's file as the API made it, and what its content says it is, whatever the API said."""

    data: bytes
    suffix: str
    height: int
    width: int


def decode(text: str) -> bytes | Failure:
    """The bytes of base64 in either alphabet, with line ends or not, padded or not, or as a data: URL."""
    if text[:5] == "data:":
        text = text.partition(",")[2]
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return lost("bad_base64", "the picture is not base64")


def check(data: bytes) -> Checked | Failure:
    """Decode every pixel of a picture, whose size has a bound."""
    if len(data) > LARGEST:
        return lost("bad_picture", f"the picture's file is larger than {LARGEST >> 20} MiB")
    try:
        image = images.read_raw(data, "the picture")
    except ImageError as error:
        return lost("bad_picture", str(error))
    suffix = SUFFIXES.get(image.format or "")
    if suffix is None:
        return lost("bad_picture", f"the picture is in the format {image.format}")
    return Checked(data, suffix, image.height, image.width)


def flaw_of_address(url: str, plain: bool, key: str) -> Failure | None:
    """Why nothing is fetched from an address, or None. `plain`: http will do, as the API itself is reached by http."""
    flaw = http.check_url(url)
    if flaw is None and holds(url, key):
        flaw = "holds the key"
    if flaw is None and urlsplit(url).scheme != "https" and not plain:
        flaw = "is not https"
    return None if flaw is None else lost("bad_address", f"the picture's address {flaw}")


def fetch(url: str, timeout: float, plain: bool, key: str) -> bytes | Failure:
    """The file at the address of a picture; `plain` as above.

    The `key` is sent nowhere: the request carries no header of ours, and an address with the key in it is not fetched.
    Redirects are followed, each checked like the first.
    """
    ends = time.monotonic() + timeout
    for _ in range(HOPS + 1):
        flaw = flaw_of_address(url, plain, key)
        if flaw is not None:
            return flaw
        try:
            answer = http.get(url, {}, max(0.001, ends - time.monotonic()), LARGEST)
        except http.TooLarge:
            return lost("bad_picture", f"the picture's file is larger than {LARGEST >> 20} MiB")
        except (OSError, ValueError) as error:  # TimeoutError and ConnectionError are of the first kind
            return Failure("retry", "no_download", f"the picture cannot be fetched: {error}")
        if answer.status == 200:
            return answer.body
        if 300 <= answer.status < 400 and answer.location:
            url = urljoin(url, answer.location)
            continue
        if answer.status in GONE:
            return lost("address_expired", f"the picture's address has expired or is wrong (HTTP {answer.status})")
        return Failure("retry", "no_download", f"the picture cannot be fetched: HTTP {answer.status}")
    return lost("bad_address", f"the picture's address redirects more than {HOPS} times")
