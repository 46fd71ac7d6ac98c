import json
import sys
import textwrap
from pathlib import Path

import pytest

from trainyard.client.demo.corpus import MIN_CHARACTERS, docstrings, standard_library, write_corpus


@pytest.mark.long
def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    before = set(sys.modules)
    file = tmp_path / "corpus.jsonl"
    number = write_corpus(file)
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert number == len(texts) > 5000
    assert min(map(len, texts)) >= MIN_CHARACTERS
    assert len(set(texts)) == len(texts)
    assert any("Return" in text for text in texts)
    assert not {"turtle", "tkinter", "antigravity"} & (set(sys.modules) - before)
    assert standard_library().is_dir()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of a few files: one broken, one of another package, one with each kind of docstring."""
    sources = {
        "b.py": '"""The second module, with a docstring that is long enough."""\n',
        "a.py": '''
            """The first module, with a docstring that is long enough."""
            class C:
                """A class, whose docstring is certainly long enough to count."""
                async def f(self):
                    """An async function, whose docstring is long enough.

                    With a second paragraph.
                    """
                def g(self):
                    """Too short."""
            def h():
                """The first module, with a docstring that is long enough."""
            raise SystemExit("this module must never be imported")
            ''',
        "broken.py": "def (:\n",
        "nul.py": "x = 1\0",
        "site-packages/other.py": '"""Somebody else\'s docstring, which is long enough too."""\n',
        "test/test_a.py": '"""A docstring of a test of the standard library itself."""\n',
    }
    for name, text in sources.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (tmp_path / "lib" / "latin.py").write_bytes(b'"""\xe9 is no UTF-8, so that nobody can read this module."""')
    return tmp_path / "lib"


def test_docstrings_in_a_fixed_order_each_once(library: Path) -> None:
    found = list(docstrings(library))
    assert found == [
        "The first module, with a docstring that is long enough.",
        "A class, whose docstring is certainly long enough to count.",
        "An async function, whose docstring is long enough.\n\nWith a second paragraph.",
        "The second module, with a docstring that is long enough.",
    ]
    assert found == list(docstrings(library))
