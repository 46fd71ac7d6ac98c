"""Warnings about the device and the schedule, the entry point, and the `started` event."""

import importlib
from typing import Any

import pytest
import torch

from trainyard.contract.events import Started
from trainyard.contract.spec import JobSpec
from trainyard.worker.events.console import ConsoleLogger
from trainyard.worker.training.startup import device_warnings, schedule_warnings, supports_bfloat16


def spec(**groups: Any) -> JobSpec:
    import json

    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": "/x"}, **groups}))


@pytest.mark.parametrize(
    ("wanted", "dtype", "device", "native", "codes"),
    [
        ("auto", "bfloat16", "cpu", True, ["cpu_fallback"]),
        ("cpu", "bfloat16", "cpu", True, []),
        ("auto", "bfloat16", "cuda", True, []),
        ("cuda", "bfloat16", "cuda", False, ["bfloat16_emulated"]),
        ("cuda", "float16", "cuda", False, []),
    ],
)
def test_warnings_about_the_device(wanted: str, dtype: str, device: str, native: bool, codes: list[str]) -> None:
    asked = spec(training={"dtype": dtype}, resources={"device": wanted})
    assert [warning.code for warning in device_warnings(asked, device, native)] == codes
    assert supports_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("training", "steps", "codes"),
    [
        ({"warmup_steps": 5000, "epochs": 2}, 94, ["warmup_beyond_run"]),
        ({"warmup_steps": 94}, 94, ["warmup_beyond_run"]),
        ({"warmup_steps": 93}, 94, []),
        ({"epochs": 3, "max_steps": 94}, 94, ["epochs_ignored"]),
        ({"epochs": 3}, 94, []),
    ],
)
def test_warnings_about_a_schedule_that_the_run_cannot_follow(
    training: dict[str, Any], steps: int, codes: list[str]
) -> None:
    found = list(schedule_warnings(spec(training=training).training, steps))
    assert [warning.code for warning in found] == codes
    assert all("94 steps" in warning.message for warning in found)


def test_the_started_line_names_the_checkpoint_it_resumes_from() -> None:
    numbers = dict.fromkeys(
        ("parameters", "active_parameters", "vocab_size", "samples", "documents", "tokens", "bad_lines"), 10
    )
    started = Started(
        start_step=3,
        steps=9,
        world_size=2,
        device="cpu",
        device_name="CPU",
        dtype="float32",
        torch_version="2",
        global_batch=4,
        tokens_per_step=1.0,
        steps_per_epoch=3,
        flops_per_token=60.0,
        resumed_from="/c/step-00000003",
        **numbers,
    )
    text = ConsoleLogger().text(started)
    assert text is not None
    assert text.endswith("steps 4 to 9, from /c/step-00000003")


def test_the_entry_point_loads_no_torch_before_it_has_set_up_openmp() -> None:
    assert "torch" not in vars(importlib.import_module("trainyard.worker.__main__"))
