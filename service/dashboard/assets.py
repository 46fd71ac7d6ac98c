"""The dashboard's files, read once: each at an address that changes with its content, and packed beside it.

All modules are one file, and so are all styles: the page is there after two requests. The chart library has a hash of
its own: it is large, and stays in the browser's cache when the rest changes.
"""

import functools
import gzip
import hashlib
import importlib.util
import logging
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from contract.rundir import write_atomically
from service.dashboard.linking import linked
from service.dashboard.negotiation import OWN

STATIC = Path(__file__).parent / "static"
SHELL = "index.html"
ENTRY = "app.js"
STYLES = ("styles.css", "job.css", "form.css")
"""In the order in which one overrides the other."""

TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".html": "text/html; charset=utf-8",
}
DIGITS = 16
HUGE = (b'(typeof self !== "undefined" ? self : this, () => {', b"}));")
"""How the chart library's one large function begins, and how the file ends behind it."""

UNMARKED_TIME = 0

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class Asset:
    """A file as it is sent."""

    media_type: str
    plain: bytes
    packed: bytes


@dataclass(frozen=True)
class _Made:
    """What the files come to: all but the packed library."""

    files: Mapping[str, Asset]
    shell: Asset
    library_path: str
    library_digest: str


class LibraryMissing(RuntimeError):
    """The chart library's script is not where its package keeps it: install the plotly that is pinned."""


class Assets:
    """Every file of the dashboard by its address, and the page that names them."""

    def __init__(self, cache: Path, folder: Path = STATIC) -> None:
        self._cache = cache
        self._library = _library()
        self._lock = threading.Lock()
        self._charts: Asset | None = None
        made = _made(folder, self._library, _stamps(folder, self._library))
        self._library_digest = made.library_digest
        self.library_path = made.library_path
        self._files = made.files
        self.shell = made.shell
        self.shell_tag = f'"{_digest(made.shell.plain)}"'

    def find(self, path: str) -> Asset | None:
        """The file at an address; None where there is none, or none any more."""
        if path == self.library_path and self._library is not None:
            return self._library_asset(self._library)
        return self._files.get(path)

    def addresses(self) -> list[str]:
        """Every address there is."""
        return [*self._files, self.library_path]

    def _library_asset(self, library: Path) -> Asset:
        """Read and packed at its first use; packed takes a second, so what was packed is kept in the cache."""
        with self._lock:
            if self._charts is None:
                plain = compiled_ahead(library.read_bytes())
                self._charts = Asset(TYPES[".js"], plain, self._packed_library(plain))
            return self._charts

    def _packed_library(self, plain: bytes) -> bytes:
        kept = self._cache / f"plotly-{self._library_digest}.js.gz"
        try:
            packed = kept.read_bytes()
            if gzip.decompress(packed) == plain:
                return packed
        except (OSError, EOFError, zlib.error):
            pass  # None yet, or half a file: made anew.
        packed = gzip.compress(plain, 9, mtime=UNMARKED_TIME)
        self._cache.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, packed)
        return packed


def library_file() -> Path:
    """The chart library's script, in its package; the package itself is not imported. Raises LibraryMissing."""
    found = importlib.util.find_spec("plotly")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        file = Path(folder) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file
    raise LibraryMissing(LibraryMissing.__doc__)


def _stamps(folder: Path, library: Path | None) -> tuple[tuple[str, int, int], ...]:
    """What tells that a file is another one."""
    stats = ((file, file.stat()) for file in (*_files(folder), *((library,) if library is not None else ())))
    return tuple(sorted((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats))


@functools.lru_cache(maxsize=8)
def _made(folder: Path, library: Path | None, _: tuple[tuple[str, int, int], ...]) -> _Made:
    """Kept for as long as no file changes: who makes a service for each test makes many."""
    files = _joined({path.relative_to(folder).as_posix(): path.read_bytes() for path in _files(folder)})
    shell = files.pop(SHELL).decode()
    base = f"{OWN}{_digest(*(part for name in sorted(files) for part in (name.encode(), files[name])))}/"
    digest = _digest(compiled_ahead(library.read_bytes()) if library is not None else b"")
    charts = f"{OWN}plotly-{digest}.js"
    page = shell.replace("{{base}}", base).replace("{{charts}}", charts)
    return _Made(
        {base + name: _asset(name, data) for name, data in files.items()}, _asset(SHELL, page.encode()), charts, digest
    )


def compiled_ahead(library: bytes) -> bytes:
    """The library with its one large function in parentheses: browsers take that for a function that is called at once.

    They then compile it while it is loading, beside the page. Without, they read through it twice, and the second time
    the page stands still. Where it does not begin and end as expected it is left as it is.
    """
    begin, end = HUGE
    if library.count(begin) != 1 or not library.endswith(end):
        return library
    opened = library.replace(begin, begin.replace(b"() => {", b"(() => {"))
    return opened.removesuffix(end) + end.replace(b"}", b"})", 1)


def _library() -> Path | None:
    """None where it is missing: the pages work without their charts, and jobs without the pages."""
    try:
        return library_file()
    except LibraryMissing as missing:
        log.warning("%s", missing)
        return None


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in TYPES]


def _joined(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same with one file of scripts and one of styles."""
    scripts = {name: data.decode() for name, data in files.items() if name.endswith(".js")}
    rest = {name: data for name, data in files.items() if not name.endswith((".js", ".css"))}
    styles = b"".join(files[name] for name in STYLES if name in files)
    return {**rest, "pages.js": linked(scripts, ENTRY).encode(), "pages.css": styles}


def _asset(name: str, data: bytes) -> Asset:
    return Asset(TYPES[Path(name).suffix], data, gzip.compress(data, 9, mtime=UNMARKED_TIME))


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:DIGITS]
