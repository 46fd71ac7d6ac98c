"""The dashboard's static files: each has a URL that changes with the content, and is sent plain or gzipped.

Scripts are native ES modules. All files of the dashboard are in one folder of the URL, named by the hash of all of
them, so relative imports work unchanged and an upgrade never mixes old and new modules. The chart library and Swagger
UI come from Python packages and have their own hashes: they are large, and stay in the browser's cache when the rest
changes.
"""

import functools
import gzip
import hashlib
import importlib.util
import logging
import re
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainyard.contract.rundir import write_atomically
from trainyard.service.dashboard.module_graph import ENTRY, needed_modules, page_modules
from trainyard.service.dashboard.negotiation import URL_PREFIX

STATIC = Path(__file__).parent / "static"
INDEX_HTML = "index.html"

MEDIA_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
}
HASH_DIGITS = 16

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class Asset:
    """The bytes of one file, plain and gzipped."""

    media_type: str
    plain: bytes
    gzipped: bytes


@dataclass(frozen=True)
class Library:
    """A file of a Python package. ``use``: what does not work without it."""

    package: str
    path: str
    use: str


LIBRARIES = {
    "charts": Library("plotly", "package_data/plotly.min.js", "the charts"),
    "swagger_script": Library("fastapi_swagger", "resources/swagger-ui-bundle.js", "the page /docs"),
    "swagger_style": Library("fastapi_swagger", "resources/swagger-ui.css", "the page /docs"),
}
"""Placeholder in index.html -> the file whose URL replaces it."""


@dataclass(frozen=True)
class HtmlPage:
    """The HTML of a page, which preloads the scripts of this page."""

    html: Asset
    etag: str


@dataclass(frozen=True)
class _Built:
    """All assets, with the libraries not yet compressed. ``libraries``: URL path -> the file and its placeholder.

    ``pages``: pattern of the path -> the page; ``other``: that of any other path.
    """

    files: Mapping[str, Asset]
    pages: Mapping[re.Pattern[str], HtmlPage]
    other: HtmlPage
    libraries: Mapping[str, tuple[str, Path]]


class LibraryMissing(RuntimeError):
    """A library of the dashboard is not installed."""

    def __init__(self, library: Library) -> None:
        super().__init__(
            f"{library.use} will not work: the Python package {library.package} has no file {library.path}; "
            "install the version of it that constraints.txt names"
        )


class Assets:
    """The files of the dashboard by URL path, and the HTML pages that load them."""

    def __init__(self, cache: Path, folder: Path = STATIC) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._loaded: dict[str, Asset] = {}
        found = _find_libraries()
        built = _build(folder, found, _fingerprint(folder, dict(found).values()))
        self._libraries = built.libraries
        self._files = built.files
        self._pages = built.pages
        self._other = built.other

    def page(self, path: str) -> HtmlPage:
        """Return the HTML for the path of a page."""
        return next((page for pattern, page in self._pages.items() if pattern.fullmatch(path)), self._other)

    def find(self, path: str) -> Asset | None:
        """Return the file with this URL path, or None if there is none."""
        return self._load_library(path) if path in self._libraries else self._files.get(path)

    def paths(self) -> list[str]:
        """Return the URL path of every file."""
        return [*self._files, *self._libraries]

    def library_path(self, name: str) -> str:
        """Return the URL path of a library by its name in LIBRARIES. Raises KeyError if it is not installed."""
        return {found: path for path, (found, _) in self._libraries.items()}[name]

    def _load_library(self, path: str) -> Asset:
        with self._lock:
            if path not in self._loaded:
                file = self._libraries[path][1]
                plain = file.read_bytes()
                gzipped = self._gzip_library(self._cache / f"{path.removeprefix(URL_PREFIX)}.gz", plain)
                self._loaded[path] = Asset(MEDIA_TYPES[file.suffix], plain, gzipped)
            return self._loaded[path]

    def _gzip_library(self, cached: Path, plain: bytes) -> bytes:
        # To compress 4.5 MB takes a second, so the result is cached on disk.
        try:
            gzipped = cached.read_bytes()
            if gzip.decompress(gzipped) == plain:
                return gzipped
        except (OSError, EOFError, zlib.error):
            pass  # Missing or truncated: written again below.
        gzipped = _gzip(plain)
        self._cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, gzipped)
        return gzipped


def library_file(library: Library) -> Path:
    """Return the library's file, without importing its package. Raises LibraryMissing."""
    found = importlib.util.find_spec(library.package)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        file = Path(folder) / library.path
        if file.is_file():
            return file
    raise LibraryMissing(library)


def _find_libraries() -> tuple[tuple[str, Path], ...]:
    found = []
    for name, library in LIBRARIES.items():
        try:
            found.append((name, library_file(library)))
        except LibraryMissing as missing:
            # The pages work without them, and the API without the pages.
            log.warning("%s", missing)
    return tuple(found)


def _fingerprint(folder: Path, libraries: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    stats = ((file, file.stat()) for file in (*_static_files(folder), *libraries))
    return tuple(sorted((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats))


@functools.lru_cache(maxsize=8)
def _build(folder: Path, found: tuple[tuple[str, Path], ...], _: tuple[tuple[str, int, int], ...]) -> _Built:
    # Cached until a file changes: tests create many services in one process.
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _static_files(folder)}
    template = files.pop(INDEX_HTML).decode()
    names = sorted(files)
    base = f"{URL_PREFIX}{_hash(*(part for name in names for part in (name.encode(), files[name])))}/"
    libraries = {
        f"{URL_PREFIX}{file.stem}-{_hash(file.read_bytes())}{file.suffix}": (name, file) for name, file in found
    }
    urls = {name: path for path, (name, _) in libraries.items()}
    for name in LIBRARIES:
        template = template.replace("{{" + name + "}}", urls.get(name, ""))
    sources = {name: files[name].decode() for name in names if name.endswith(".js")}

    def page(*entries: str) -> HtmlPage:
        # Without preloads the browser finds each module only after the one that imports it: one round trip per level.
        needed = sorted(needed_modules(sources, entries))
        preloads = "\n".join(f'<link rel="modulepreload" href="{base}{name}">' for name in needed)
        html = template.replace("{{modulepreload}}", preloads).replace("{{base}}", base).encode()
        return HtmlPage(_asset(INDEX_HTML, html), f'"{_hash(html)}"')

    return _Built(
        {base + name: _asset(name, data) for name, data in files.items()},
        {pattern: page(ENTRY, module) for pattern, module in page_modules(sources)},
        page(ENTRY),
        libraries,
    )


def _static_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in MEDIA_TYPES]


def _asset(name: str, data: bytes) -> Asset:
    return Asset(MEDIA_TYPES[Path(name).suffix], data, _gzip(data))


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:HASH_DIGITS]
