"""A corpus of docstrings for benchmarks and tests."""

import json
from itertools import islice
from pathlib import Path

from trainyard.client.demo.corpus import docstrings, standard_library


def write_docstrings(file: Path, limit: int) -> int:
    """Write the first ``limit`` docstrings of the standard library as JSONL; return how many there were."""
    texts = list(islice(docstrings(standard_library()), limit))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return len(texts)
