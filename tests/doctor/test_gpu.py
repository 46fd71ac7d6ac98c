"""The trials of `trainyard doctor --gpu` on the GPU at hand, in their full size."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainyard.worker.doctor.bench import GPU_SIZES, Trial
from trainyard.worker.doctor.promises import PROMISES, try_promise
from trainyard.worker.doctor.report import HealthLevel
from trainyard.worker.training.metrics import device_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # the trial of attention compiles six models
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.filterwarnings("default")
def test_a_promise_holds_on_the_gpu(promise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # cuBLAS reads it when it first uses the device.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", 0)
    results = list(try_promise(promise, Trial(device, tmp_path, GPU_SIZES, device_name(device))))
    for result in results:
        print(result.line())
    assert results
    assert [result.line() for result in results if result.health is HealthLevel.FAULT] == []
