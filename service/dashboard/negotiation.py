"""Which requests are for a page, and which for the API that shares its addresses. Pure."""

import re

SHARED = re.compile(r"/jobs(/[^/]+)?")
"""The API's addresses that are pages too: who wants HTML gets the page."""

PAGES = frozenset({"/", "/compare", "/system", "/submit"})
OWN = "/ui/"
READING = frozenset({"GET", "HEAD"})
Q_VALUE = re.compile(r"q=(0(\.\d{0,3})?|1(\.0{0,3})?)")


def is_shared(path: str) -> bool:
    """Whether the answer depends on what the reader accepts."""
    return SHARED.fullmatch(path) is not None


def is_page(method: str, path: str, accept: str) -> bool:
    """Whether the request wants the dashboard's page. It is the same for everybody, and holds no data."""
    if method not in READING:
        return False
    return path in PAGES or (is_shared(path) and prefers_html(accept))


def is_file(method: str, path: str) -> bool:
    """Whether the request is for one of the dashboard's own files."""
    return method in READING and path.startswith(OWN)


def prefers_html(accept: str) -> bool:
    """Whether ``accept`` names HTML, and JSON less. `*/*` alone, as curl sends it, does not name it."""
    weights = dict(map(_weighed, accept.split(",")))
    html = weights.get("text/html", 0.0)
    return html > weights.get("application/json", 0.0)


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an answer may come packed."""
    weights = dict(map(_weighed, accept_encoding.split(",")))
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def _weighed(part: str) -> tuple[str, float]:
    """A media type and its weight; an illegible weight counts as none."""
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    given = next((text for text in parameters if text.startswith("q=")), "q=1")
    match = Q_VALUE.fullmatch(given)
    return name, float(match.group(1)) if match else 0.0
