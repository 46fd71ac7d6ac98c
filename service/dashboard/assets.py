"""The dashboard's static files: each has a URL that changes with the content, and is sent plain or gzipped.

Scripts are native ES modules. All files of the dashboard are in one folder of the URL, named by the hash of all of
them, so relative imports work unchanged and an upgrade never mixes old and new modules. The chart library has its own
hash: it is large, and stays in the browser's cache when the rest changes.
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

from trainyard.contract.rundir import write_atomically
from trainyard.service.dashboard.negotiation import URL_PREFIX

STATIC = Path(__file__).parent / "static"
INDEX_HTML = "index.html"

MEDIA_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".html": "text/html; charset=utf-8",
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
class _Built:
    """Everything but the gzipped chart library."""

    files: Mapping[str, Asset]
    index: Asset
    library_path: str
    library_hash: str


class LibraryMissing(RuntimeError):
    """The chart library's script is not in the plotly package: install the pinned version of plotly."""


class Assets:
    """The files of the dashboard by URL path, and the HTML page that loads them."""

    def __init__(self, cache: Path, folder: Path = STATIC) -> None:
        self._cache = cache
        self._library = _find_library()
        self._lock = threading.Lock()
        self._library_asset: Asset | None = None
        built = _build(folder, self._library, _fingerprint(folder, self._library))
        self._library_hash = built.library_hash
        self.library_path = built.library_path
        self._files = built.files
        self.index = built.index
        self.index_etag = f'"{_hash(built.index.plain)}"'

    def find(self, path: str) -> Asset | None:
        """Return the file with this URL path, or None if there is none."""
        if path == self.library_path and self._library is not None:
            return self._load_library(self._library)
        return self._files.get(path)

    def paths(self) -> list[str]:
        """Return the URL path of every file."""
        return [*self._files, self.library_path]

    def _load_library(self, library: Path) -> Asset:
        with self._lock:
            if self._library_asset is None:
                plain = library.read_bytes()
                self._library_asset = Asset(MEDIA_TYPES[".js"], plain, self._gzip_library(plain))
            return self._library_asset

    def _gzip_library(self, plain: bytes) -> bytes:
        # To compress 4.5 MB takes a second, so the result is cached on disk.
        cached = self._cache / f"plotly-{self._library_hash}.js.gz"
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


def library_file() -> Path:
    """Return the chart library's script in the plotly package, without importing it. Raises LibraryMissing."""
    found = importlib.util.find_spec("plotly")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        file = Path(folder) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file
    raise LibraryMissing(LibraryMissing.__doc__)


def _find_library() -> Path | None:
    try:
        return library_file()
    except LibraryMissing as missing:
        # The pages work without charts, and the API without the pages.
        log.warning("%s", missing)
        return None


def _fingerprint(folder: Path, library: Path | None) -> tuple[tuple[str, int, int], ...]:
    stats = ((file, file.stat()) for file in (*_static_files(folder), *((library,) if library is not None else ())))
    return tuple(sorted((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats))


@functools.lru_cache(maxsize=8)
def _build(folder: Path, library: Path | None, _: tuple[tuple[str, int, int], ...]) -> _Built:
    # Cached until a file changes: tests create many services in one process.
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _static_files(folder)}
    template = files.pop(INDEX_HTML).decode()
    names = sorted(files)
    base = f"{URL_PREFIX}{_hash(*(part for name in names for part in (name.encode(), files[name])))}/"
    library_hash = _hash(library.read_bytes() if library is not None else b"")
    library_path = f"{URL_PREFIX}plotly-{library_hash}.js"
    # Without them the browser finds each module only after the one that imports it: one round trip per level.
    preloads = "\n".join(f'<link rel="modulepreload" href="{base}{name}">' for name in names if name.endswith(".js"))
    page = template.replace("{{modulepreload}}", preloads).replace("{{base}}", base).replace("{{charts}}", library_path)
    return _Built(
        {base + name: _asset(name, data) for name, data in files.items()},
        _asset(INDEX_HTML, page.encode()),
        library_path,
        library_hash,
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
