"""Fetches the files of a checkpoint: piece by piece, checked, and gone on with after a break."""

import hashlib
import os
from pathlib import Path

from client.connection import Connection
from client.errors import Damaged
from contract.rundir import MANIFEST_FILE, parse_manifest

PART = ".part"


def fetch(connection: Connection, url: str, into: Path) -> list[str]:
    """Every file that the manifest at ``url`` names, and the manifest last: where it is, all of them are whole."""
    into.mkdir(parents=True, exist_ok=True)
    with connection.download(f"{url}/{MANIFEST_FILE}", {}) as response:
        manifest = response.read()
    listed = parse_manifest(manifest)
    for name, said in listed.items():
        if not name or Path(name).name != name or name.startswith("."):
            raise Damaged(f"the manifest names a file that is none: {name!r}")
        if not _is(into / name, said.sha256):
            _fetch_one(connection, f"{url}/{name}", into / name, said.sha256)
    (into / MANIFEST_FILE).write_bytes(manifest)
    return [*listed, MANIFEST_FILE]


def _fetch_one(connection: Connection, url: str, path: Path, sha256: str) -> None:
    part = path.with_name(path.name + PART)
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": f'"{sha256}"'} if have else {}
    with connection.download(url, headers) as response:
        with part.open("ab" if response.status_code == 206 else "wb") as file:
            for piece in response.iter_bytes():
                file.write(piece)
    if not _is(part, sha256):
        part.unlink()
        raise Damaged(f"{path.name} is not what the manifest says: fetch it again")
    os.replace(part, path)


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
