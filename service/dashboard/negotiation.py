"""Which requests are for the dashboard's page or files, and which are for the API. Pure functions."""

import re

PAGE_OR_API = re.compile(r"/jobs(/[^/]+)?")
"""Paths that the pages share with the API; the Accept header decides."""

PAGES = frozenset({"/", "/compare", "/data", "/system", "/submit", "/docs"})
CORPUS_PAGE = re.compile(r"/data/[^/]+")
URL_PREFIX = "/ui/"
READ_METHODS = frozenset({"GET", "HEAD"})
Q_VALUE = re.compile(r"q=(0(\.\d{0,3})?|1(\.0{0,3})?)")


def is_page_or_api(path: str) -> bool:
    """Return whether the response at this path depends on the Accept header."""
    return PAGE_OR_API.fullmatch(path) is not None


def is_page(method: str, path: str, accept: str) -> bool:
    """Return whether to answer with the dashboard's page. The page is the same for every caller and holds no data."""
    if method not in READ_METHODS:
        return False
    return path in PAGES or CORPUS_PAGE.fullmatch(path) is not None or (is_page_or_api(path) and prefers_html(accept))


def is_file(method: str, path: str) -> bool:
    """Return whether the request is for one of the dashboard's static files."""
    return method in READ_METHODS and path.startswith(URL_PREFIX)


def prefers_html(accept: str) -> bool:
    """Return whether ``accept`` names HTML and ranks it above JSON. `*/*` alone, curl's default, means JSON."""
    weights = dict(map(_parse_weight, accept.split(",")))
    return weights.get("text/html", 0.0) > weights.get("application/json", 0.0)


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether the response may be gzipped."""
    weights = dict(map(_parse_weight, accept_encoding.split(",")))
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def _parse_weight(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    given = next((text for text in parameters if text.startswith("q=")), "q=1")
    match = Q_VALUE.fullmatch(given)
    # An invalid weight counts as 0.
    return name, float(match.group(1)) if match else 0.0
