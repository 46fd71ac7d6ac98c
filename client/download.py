"""Download of the files of a checkpoint or an export: verified, and resumed after an interruption."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainyard.client.connection import Connection
from trainyard.client.errors import ChecksumMismatch
from trainyard.contract.rundir import MANIFEST_FILE, parse_manifest

PARTIAL_SUFFIX = ".part"


def download_checkpoint(connection: Connection, url: str, into: Path) -> list[str]:
    """Download the files in the manifest below ``url``, and the manifest last: if it exists, all files are complete.

    Returns the file names. Raises ChecksumMismatch.
    """
    into.mkdir(parents=True, exist_ok=True)
    with connection.download(f"{url}/{MANIFEST_FILE}", {}) as response:
        manifest = response.read()
    listed = parse_manifest(manifest)
    for name, entry in listed.items():
        if not name or Path(name).name != name or name.startswith("."):
            raise ChecksumMismatch(f"the manifest names an invalid file: {name!r}")
        if not _matches(into / name, entry.sha256):
            _download_file(connection, f"{url}/{name}", into / name, entry.sha256)
    (into / MANIFEST_FILE).write_bytes(manifest)
    return [*listed, MANIFEST_FILE]


def download_export(connection: Connection, url: str, files: Iterable[Mapping[str, Any]], into: Path) -> list[str]:
    """Download the ``files`` of an export below ``url`` into a folder; return their names. Raises ChecksumMismatch."""
    into.mkdir(parents=True, exist_ok=True)
    names = []
    for file in files:
        name = str(file["name"])
        if not name or Path(name).name != name or name.startswith("."):
            raise ChecksumMismatch(f"the export names an invalid file: {name!r}")
        part = into / f"{name}{PARTIAL_SUFFIX}"
        with connection.download(f"{url}/{name}", {}) as response, part.open("wb") as target:
            for chunk in response.iter_bytes():
                target.write(chunk)
        if part.stat().st_size != file["bytes"]:
            part.unlink()
            raise ChecksumMismatch(f"{name} does not have the size of the export: download it again")
        os.replace(part, into / name)
        names.append(name)
    return names


def _download_file(connection: Connection, url: str, path: Path, digest: str) -> None:
    part = path.with_name(path.name + PARTIAL_SUFFIX)
    have = part.stat().st_size if part.exists() else 0
    # If-Range: if the file has changed, the service sends all of it with status 200 and not the rest with 206.
    headers = {"Range": f"bytes={have}-", "If-Range": f'"{digest}"'} if have else {}
    with connection.download(url, headers) as response:
        with part.open("ab" if response.status_code == 206 else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
    if not _matches(part, digest):
        part.unlink()
        raise ChecksumMismatch(f"{path.name} differs from the manifest: download it again")
    os.replace(part, path)


def _matches(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
