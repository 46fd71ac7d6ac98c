"""Writes safetensors files in one pass: tensor by tensor, hashed on the way, never a second copy in memory.

The format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
Source: https://github.com/huggingface/safetensors#format. Files are read back with the safetensors library.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from trainyard.contract.failpoints import failpoint
from trainyard.contract.rundir import FileDigest

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

BLOCK = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileDigest:
    """Write ``tensors`` to ``path`` and fsync it. The bytes depend on names and values alone. Raises OSError."""
    return write_blocks(path, _blocks(dict(sorted(tensors.items()))))


def write_blocks(path: Path, blocks: Iterator[bytes | memoryview]) -> FileDigest:
    """Write ``blocks`` one after the other to a new file, fsync it, and return its size and sha256. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for block in blocks:
            for start in range(0, len(block), BLOCK):
                part = block[start : start + BLOCK]
                digest.update(part)
                size += _write_all(file.fileno(), part)
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def _write_all(descriptor: int, part: bytes | memoryview) -> int:
    view = memoryview(part)
    while view:
        view = view[os.write(descriptor, view) :]
    return len(part)


def _blocks(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        # numpy has no bfloat16, so the bytes are taken as such; one tensor at a time comes down from the device.
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        yield flat.numpy().data


@failpoint("resume.digest")
def sha256_of(path: Path) -> str:
    """The file's sha256, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
