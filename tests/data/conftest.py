"""A corpus file of real text, and a tokenizer trained on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.data.texts import docstrings, write_jsonl
from trainyard.worker.data.tokenizers import train_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def docstring_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "docstrings.jsonl", docstrings())


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a byte-level BPE of 600 tokens."""
    out = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer(docstrings(), 600, out) == 600
    return out
