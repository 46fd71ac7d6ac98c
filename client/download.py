"""Download of the files of a checkpoint or an export: verified, and resumed after an interruption."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainyard.client.connection import Exchange
from trainyard.client.errors import ChecksumMismatch
from trainyard.client.flows import Body, Flow, Work
from trainyard.contract.rundir import MANIFEST_FILE, FileDigest, parse_manifest

PARTIAL_SUFFIX = ".part"


def download_checkpoint(exchange: Exchange, url: str, into: Path) -> Flow[list[str]]:
    """Download the files in the manifest below ``url``, and the manifest last: if it exists, all files are complete.

    Returns the file names. Raises ChecksumMismatch.
    """
    into.mkdir(parents=True, exist_ok=True)
    body = yield from exchange.download(f"{url}/{MANIFEST_FILE}", {})
    manifest = b""
    while chunk := (yield from exchange.chunk(body)):
        manifest += chunk
    listed = parse_manifest(manifest)
    for name, entry in listed.items():
        if not name or Path(name).name != name or name.startswith("."):
            raise ChecksumMismatch(f"the manifest names an invalid file: {name!r}")
        if not (yield from _matches(into / name, entry.sha256)):
            yield from _download_file(exchange, f"{url}/{name}", into / name, entry)
    part = into / f"{MANIFEST_FILE}{PARTIAL_SUFFIX}"
    with _errors_with_path(part):
        part.write_bytes(manifest)
    os.replace(part, into / MANIFEST_FILE)
    return [*listed, MANIFEST_FILE]


def download_export(exchange: Exchange, url: str, files: Iterable[Mapping[str, Any]], into: Path) -> Flow[list[str]]:
    """Download the ``files`` of an export below ``url`` into a folder; return their names. Raises ChecksumMismatch."""
    into.mkdir(parents=True, exist_ok=True)
    names = []
    for file in files:
        name = str(file["name"])
        if not name or Path(name).name != name or name.startswith("."):
            raise ChecksumMismatch(f"the export names an invalid file: {name!r}")
        part = into / f"{name}{PARTIAL_SUFFIX}"
        body = yield from exchange.download(f"{url}/{name}", {})
        yield from _write(exchange, body, part, "wb")
        if part.stat().st_size != file["bytes"]:
            part.unlink()
            raise ChecksumMismatch(f"{name} does not have the size of the export: download it again")
        os.replace(part, into / name)
        names.append(name)
    return names


def _download_file(exchange: Exchange, url: str, path: Path, listed: FileDigest) -> Flow[None]:
    part = path.with_name(path.name + PARTIAL_SUFFIX)
    have = part.stat().st_size if part.exists() else 0
    # A complete file was interrupted before its rename. A range after its last byte would be rejected.
    if not have or have != listed.bytes or not (yield from _matches(part, listed.sha256)):
        resumed = 0 < have < listed.bytes
        # If-Range: if the file has changed, the service sends all of it with status 200 and not the rest with 206.
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{listed.sha256}"'} if resumed else {}
        body = yield from exchange.download(url, headers)
        yield from _write(exchange, body, part, "ab" if body.response.status_code == 206 else "wb")
        if not (yield from _matches(part, listed.sha256)):
            part.unlink()
            raise ChecksumMismatch(f"{path.name} differs from the manifest: download it again")
    os.replace(part, path)


def _write(exchange: Exchange, body: Body, path: Path, mode: str) -> Flow[None]:
    with _errors_with_path(path), path.open(mode) as file:
        while chunk := (yield from exchange.chunk(body)):
            file.write(chunk)


@contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    """Add the path to an error of a write, such as a full disk. Python adds it only to errors of `open`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _matches(path: Path, digest: str) -> Flow[bool]:
    return path.is_file() and (yield Work(lambda: sha256(path))) == digest


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
