"""Writer of safetensors files: one pass, tensor by tensor, hashed on the way, without a second copy in memory.

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

BLOCK_BYTES = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileDigest:
    """Write ``tensors`` to ``path`` and fsync it. The bytes depend on names and values alone. Raises OSError."""
    return write_blocks(path, _blocks(dict(sorted(tensors.items()))))


def write_blocks(path: Path, blocks: Iterator[bytes | memoryview]) -> FileDigest:
    """Write ``blocks`` one after the other to a new file, fsync it, and return its size and sha256. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for block in blocks:
            for start in range(0, len(block), BLOCK_BYTES):
                part = block[start : start + BLOCK_BYTES]
                digest.update(part)
                size += len(part)
                rest = memoryview(part)
                while rest:  # os.write may write less than it is given
                    rest = rest[os.write(file.fileno(), rest) :]
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


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
        # As bytes, because numpy has no bfloat16. One tensor at a time is copied from the device.
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        yield flat.numpy().data


@failpoint("resume.digest")
def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
