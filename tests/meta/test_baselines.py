"""The baselines of the benchmarks: which ratios count as worse, and for which processor."""

from pathlib import Path

import pytest

from benchmarks.__main__ import compare
from benchmarks.baselines import Ratio, processor, read, verdicts, write

CPUINFO = """processor\t: 0
model name\t: AMD EPYC 9R14 96-Core Processor
flags\t\t: fpu avx2 avx512f avx512_bf16
"""


def test_a_processor_is_named_by_its_model_and_its_best_unit() -> None:
    assert processor(CPUINFO) == "amd-epyc-9r14-96-core-processor-avx512-bf16"
    assert processor("model name : Intel(R) Xeon(R) Processor\nflags : avx2 avx512f") == "intel-xeon-processor-avx512f"
    assert processor("") == "unknown"


@pytest.mark.parametrize(
    ("ratio", "is_worse"),
    [
        (Ratio("a", 0.96), False),
        (Ratio("a", 0.94), True),
        (Ratio("a", 2.0), False),
        (Ratio("a", 1.04, higher_is_better=False), False),
        (Ratio("a", 1.06, higher_is_better=False), True),
        (Ratio("a", 0.5, higher_is_better=False), False),
        (Ratio("new", 0.1), False),
    ],
)
def test_more_than_five_percent_worse_is_reported(ratio: Ratio, is_worse: bool) -> None:
    assert bool(verdicts({"a": 1.0}, [ratio])) == is_worse


def test_a_baseline_is_kept_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.baselines.FOLDER", tmp_path / "baselines")
    assert compare([Ratio("a", 1.2), Ratio("b", 2.0)], keep=True) == 0
    assert compare([Ratio("a", 1.19)], keep=False) == 0
    assert compare([Ratio("a", 1.0)], keep=False) == 1
    assert compare([Ratio("a", 1.0)], keep=True) == 0
    [file] = (tmp_path / "baselines").iterdir()
    assert read(file) == {"a": 1.0, "b": 2.0}
    write(file, read(file), [Ratio("c", 1 / 3)])
    assert read(file)["c"] == 0.333
    assert read(tmp_path / "none.json") == {}
