"""The trials of the promises: each finds what is broken, and passes on a CPU in small sizes."""

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from trainyard.contract.rundir import RunDir
from trainyard.model import layers
from trainyard.model.costs import parameters
from trainyard.model.varlen_attention import varlen_attention
from trainyard.service.planning import matrix_speed
from trainyard.worker.cuda_errors import error_line
from trainyard.worker.doctor import promises, runs
from trainyard.worker.doctor.attention import PathError, check_attention, judge_attention, judge_generation, path_errors
from trainyard.worker.doctor.bench import CPU_SIZES, GPU_SIZES, Trial
from trainyard.worker.doctor.promises import (
    Speed,
    check_deterministic,
    check_float16,
    check_host_syncs,
    check_saves,
    check_speed,
    judge_deterministic,
    judge_float16,
    judge_memory,
    judge_saves,
    judge_speed,
    judge_syncs,
    try_promise,
)
from trainyard.worker.doctor.report import CheckResult, HealthLevel, ok
from trainyard.worker.doctor.runs import judge_ranks, judge_resume

OK, WARNING, FAULT = HealthLevel


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Trial(torch.device("cpu"), tmp_path, CPU_SIZES, "a processor")
    torch.set_num_threads(before)
    gc.collect()


@pytest.mark.long
@pytest.mark.parametrize(
    "promise",
    [check_attention, check_deterministic, check_float16, check_host_syncs, check_saves, check_speed],
    ids=lambda promise: promise.__name__,
)
def test_a_promise_holds_on_a_cpu(promise: Any, trial: Trial) -> None:
    results = list(try_promise(promise, trial))
    assert results
    for result in results:
        assert result.health is not FAULT, (result.line(), result.data.get("traceback"))
        assert result.device == "a processor"
        assert result.data["seconds"] > 0
        json.dumps(result.data)


def without_segments(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    rows = torch.arange(0, queries.shape[0] * queries.shape[1] + 1, queries.shape[1], dtype=torch.int32)
    return varlen_attention(queries, keys, values, rows)


def slightly_off(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    return varlen_attention(queries, 1.05 * keys, values, offsets)


@pytest.mark.parametrize("broken", [without_segments, slightly_off])
def test_a_broken_kernel_is_found_in_every_type(broken: Any, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "varlen_attention", broken)
    errors = path_errors(trial, CPU_SIZES.model, compiled=False)
    assert {(error.path, error.dtype) for error in errors if error.is_wrong} == {
        ("offsets", "float32"),
        ("offsets", "bfloat16"),
    }
    result = judge_attention("dense", "eager", errors)
    assert result.health is FAULT
    assert "offsets in bfloat16" in result.message


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("default::FutureWarning:torch.*")
@pytest.mark.parametrize("experts", [False, True])
def test_compiled_paths_agree_too(experts: bool, trial: Trial) -> None:
    config = replace(CPU_SIZES.model, use_moe=experts, num_hidden_layers=1)
    errors = path_errors(trial, config, compiled=True)
    assert [error.path for error in errors] == ["offsets", "mask", "whole rows"]
    assert not any(error.is_wrong for error in errors), errors


@pytest.mark.long
@pytest.mark.parametrize("promise", [runs.check_resume, promises.check_several_ranks], ids=["resume", "ranks"])
def test_whole_runs_hold_their_promise_on_a_cpu(promise: Any, trial: Trial) -> None:
    results: list[CheckResult] = []
    for number in range(3):
        folder = trial.folder / str(number)
        folder.mkdir()
        results = list(try_promise(promise, replace(trial, folder=folder)))
        # On a busy host the run may end before it is killed. Then nothing was tested.
        if all(result.data.get("was_killed", True) for result in results):
            break
    assert results
    for result in results:
        assert result.health is OK, (result.line(), result.data)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_command_tries_all_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "trainyard.worker.doctor", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    document = json.loads(done.stdout)
    tried = {each["check"] for each in document["checks"] if each["device"] is not None}
    assert tried == {
        "attention", "generation", "deterministic", "float16", "host syncs", "saves", "speed", "resume", "ranks"
    }  # fmt: skip
    assert all(each["health"] != "fault" for each in document["checks"] if each["device"] is not None), document
    assert list(tmp_path.iterdir()) == []


def path_error(gradient: float, loss: float = 0.0) -> PathError:
    return PathError("mask", "bfloat16", loss, gradient, 0.04)


SPEED = Speed("64M", True, 64, 950e3, 900e3, 0.4, 10**10, 10**10)
NAN = float("nan")
LOSSES = [3.0 - 0.1 * step for step in range(runs.LOSS_STEPS)]
DIGESTS = {"model.safetensors": "a" * 64, "optimizer.safetensors": "b" * 64}
OTHER = {**DIGESTS, "optimizer.safetensors": "c" * 64}


@pytest.mark.parametrize(
    ("result", "health", "text"),
    [
        (judge_attention("dense", "eager", [path_error(0.01)]), OK, "off by 1.00%"),
        (judge_attention("dense", "eager", [path_error(0.01), path_error(0.3)]), FAULT, "off by 30.0%"),
        (judge_attention("dense", "eager", [path_error(NAN)]), FAULT, "nan"),
        (judge_attention("dense", "eager", [path_error(0.0, loss=0.1)]), FAULT, "mask"),
        (judge_generation("dense", 1e-6), OK, "same tokens"),
        (judge_generation("dense", 0.5), FAULT, "0.5 below"),
        (judge_generation("dense", NAN), FAULT, "nan"),
        (judge_saves(0.08, 30, []), OK, "8%"),
        (judge_saves(0.50, 30, []), WARNING, "50%"),
        (judge_saves(0.08, 30, ["w of step 2"]), FAULT, "w of step 2"),
        (judge_speed(SPEED), OK, "64M, compiled, 64 rows: 950,000 tokens/s, MFU 40%"),
        (judge_speed(replace(SPEED, tokens_per_second=820e3)), OK, "820,000"),
        (judge_speed(replace(SPEED, tokens_per_second=700e3, mfu=None)), WARNING, "planned 900,000"),
        (judge_memory(SPEED, 10**10), OK, "(+0%)"),
        (judge_memory(SPEED, int(1.09e10)), OK, "(+9%)"),
        (judge_memory(SPEED, int(1.2e10)), FAULT, "(+20%)"),
        (judge_memory(SPEED, int(0.7e10)), WARNING, "(-30%)"),
        (judge_syncs("dense", 5, {}, "cuda"), OK, "none in 5 steps"),
        (judge_syncs("dense", 5, {"cudaStreamSynchronize": 5}, "cuda"), FAULT, "5 x cudaStreamSynchronize"),
        (judge_syncs("dense", 5, {"aten::nonzero": 5}, "cpu"), OK, "5 x aten::nonzero"),
        (judge_float16([5.0, 3.0], 4, touched=False, finite=True, scale=64.0), OK, "from 5.00 to 3.00"),
        (judge_float16([5.0, 3.0], 4, touched=True, finite=True, scale=64.0), FAULT, "changed weights"),
        (judge_float16([5.0, 3.0], 4, touched=False, finite=False, scale=64.0), FAULT, "not finite"),
        (judge_float16([5.0, 5.1], 4, touched=False, finite=True, scale=64.0), FAULT, "does not fall"),
        (judge_float16([5.0, NAN], 4, touched=False, finite=True, scale=64.0), FAULT, "does not fall"),
        (judge_float16([], 60, touched=False, finite=True, scale=64.0), FAULT, "does not fall"),
        (judge_deterministic("MoE", {"w": torch.ones(2)}, {"w": torch.ones(2)}), OK, "to the bit"),
        (judge_deterministic("MoE", {"w": torch.ones(2)}, {"w": torch.zeros(2)}), FAULT, "1 of 1 tensors"),
        (judge_resume(DIGESTS, DIGESTS, was_killed=True, promised=True), OK, "aaaaaaaaaaaa"),
        (judge_resume(DIGESTS, OTHER, was_killed=True, promised=True), FAULT, "optimizer.safetensors differ"),
        (judge_resume(DIGESTS, OTHER, was_killed=True, promised=False), WARNING, "training.deterministic"),
        (judge_resume(DIGESTS, DIGESTS, was_killed=False, promised=True), WARNING, "could be killed"),
        (judge_ranks(2, "NCCL", LOSSES, LOSSES, 9.0), OK, "2 ranks by NCCL"),
        (judge_ranks(2, "NCCL", LOSSES, [loss * 1.001 for loss in LOSSES], 9.0), FAULT, "off by 0.001"),
        (judge_ranks(2, "NCCL", LOSSES, LOSSES[:-1], 9.0), FAULT, "do not give"),
        (judge_ranks(2, "NCCL", LOSSES, [*LOSSES[:-1], NAN], 9.0), FAULT, "do not give"),
        (judge_ranks(2, "NCCL", [], [], 9.0), FAULT, "do not give"),
    ],
)
def test_a_promise_is_judged_by_its_numbers(result: CheckResult, health: HealthLevel, text: str) -> None:
    assert result.health is health, result.line()
    assert text in result.message or text in result.advice
    assert result.data
    assert bool(result.advice) is (health is not OK)


@pytest.mark.parametrize(
    ("generation", "health"),
    [(8, WARNING), (9, FAULT), (10, FAULT), (12, WARNING)],
    ids=["A100", "H100", "B200", "5090"],
)
def test_a_wait_of_moe_is_a_fault_only_on_cards_with_grouped_products(
    generation: int, health: HealthLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(major=generation)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert judge_syncs("MoE", 5, {"cudaStreamSynchronize": 10}, "cuda").health is health
    assert judge_syncs("dense", 5, {"cudaStreamSynchronize": 10}, "cuda").health is FAULT


def test_an_error_in_a_trial_is_a_fault(trial: Trial) -> None:
    def check_that_breaks(_: Trial) -> Iterator[CheckResult]:
        yield judge_generation("dense", 0.0)
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    first, second = try_promise(check_that_breaks, trial)
    assert first.health is OK
    assert second.health is FAULT
    assert second.line().startswith(
        "fault    that breaks      the trial failed: CUDA error: an illegal memory access [a"
    )
    assert "RuntimeError" in second.data["traceback"]


@pytest.mark.long
@pytest.mark.filterwarnings("default::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("default::FutureWarning:torch.*")
def test_a_trial_compiles_all_its_variants_whatever_an_earlier_one_compiled(trial: Trial) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        compiled.append(len(compiled))
        return graph.forward

    def check_variants(_: Trial) -> Iterator[CheckResult]:
        function = torch.compile(double, backend=backend, dynamic=False)
        for size in range(2, 8):
            function(torch.ones(size))
        yield ok("variants", "all compiled")

    trial = replace(trial, sizes=replace(trial.sizes, compiled=("dense",)))
    for _ in range(2):
        assert [result.health for result in try_promise(check_variants, trial)] == [OK]
    assert len(compiled) == 12


def double(x: Tensor) -> Tensor:
    return x + x


def test_an_error_that_breaks_cuda_for_good_does_not_end_the_report(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "empty_cache", mock.Mock(side_effect=error))

    def check_that_breaks(_: Trial) -> Iterator[CheckResult]:
        raise error
        yield

    (result,) = try_promise(check_that_breaks, replace(trial, device=torch.device("cuda")))
    assert result.health is FAULT


def test_the_last_words_are_the_exception_and_not_torchs_advice() -> None:
    words = "File x\n[rank0]: torch.AcceleratorError: CUDA error: no kernel image\nFor debugging consider passing A=1\n"
    assert error_line(words) == "[rank0]: torch.AcceleratorError: CUDA error: no kernel image"
    assert error_line("no exception\nat all\n") == "at all"
    assert error_line("") == ""


def test_a_run_that_fails_is_a_fault_with_its_last_words(trial: Trial) -> None:
    run = runs.WorkerRun.create(trial, "wrong", optimizer="none")
    with pytest.raises(runs.RunFailed, match=r"ended with 2: .*optimizer"):
        run.finish()


def test_the_planned_efficiency_is_that_of_the_service() -> None:
    assert promises.PLANNED_EFFICIENCY == matrix_speed.EFFICIENCY


def test_the_sizes_on_a_gpu_are_those_of_the_goals() -> None:
    speed = GPU_SIZES.speed
    shape = (speed.hidden_size, speed.num_hidden_layers, speed.vocab_size, GPU_SIZES.speed_length)
    assert shape == (768, 8, 6400, 1024)
    assert round(parameters(speed) / 1e6) == 64
    # The heads of the trials fit the flash kernel.
    assert all(config.head_dim is not None and config.head_dim % 8 == 0 for config in (speed, GPU_SIZES.model))


@pytest.mark.parametrize("trial_of", ["finish", "kill_after_save"])
def test_ctrl_c_ends_the_ranks_of_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial_of: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    run = runs.WorkerRun(RunDir(tmp_path), Trial.__new__(Trial))
    monkeypatch.setattr(runs.WorkerRun, "start", lambda self: process)
    interrupts = iter([KeyboardInterrupt])

    def interrupted(*_: Any) -> None:
        for error in interrupts:
            raise error

    def wait(timeout: float | None = None) -> int:
        interrupted()
        return real_wait(timeout)

    real_wait = process.wait
    monkeypatch.setattr(process, "wait", wait)
    monkeypatch.setattr("time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(run, trial_of)()
    assert process.poll() == -signal.SIGKILL
