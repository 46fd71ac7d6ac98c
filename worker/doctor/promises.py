"""Trials on one device of what the documentation promises. Each yields results; an exception in it is a fault.

The tests run the same code on a CPU in small sizes. There host syncs are only counted, and neither peak memory nor MFU
is measured.
"""

import contextlib
import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trainyard.contract.rundir import MODEL_FILE
from trainyard.contract.units import human_bytes
from trainyard.model.config import ModelConfig
from trainyard.model.costs import flops_per_token, memory_bytes, parameters
from trainyard.model.grouped_gemm import GROUPED_GENERATIONS
from trainyard.worker.doctor.attention import check_attention
from trainyard.worker.doctor.bench import CPU_SIZES, GPU_SIZES, SaveBench, TrainBench, Trial
from trainyard.worker.doctor.report import CheckResult, fault, ok, warning
from trainyard.worker.doctor.runs import check_ranks, check_resume
from trainyard.worker.matrix_speed import measure
from trainyard.worker.training.metrics import device_name, peak_flops

PLAN_TOLERANCE = 0.10
"""Relative difference that memory and speed may have from the plan."""

PLANNED_EFFICIENCY = 0.3
"""The same as in `service.planning.matrix_speed`, which this module may not import. A test compares the two."""

MAX_BLOCKED = 0.15
"""Share of the time of a blocking save for which a background save may block training."""

MEMORY_SHARE = 0.6
"""Share of a card's memory for which the speed trial chooses its rows."""

SYNCS = {
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero"),
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
}
"""Names in torch's profile of operations that wait for the device. On a CPU they only read numbers."""

STEPS = "trainyard.doctor.steps"
FLOAT16_STEPS = 40
OVERFLOWING_SCALE = 2.0**32
"""An fp16 loss scale at which the first steps overflow."""


def check_promises(device: str) -> Iterator[CheckResult]:
    """Yield the result of each trial on ``device`` as soon as it is known."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    name = device_name(place)
    with tempfile.TemporaryDirectory(prefix="trainyard-doctor-") as folder:
        trial = Trial(place, Path(folder), GPU_SIZES if device == "cuda" else CPU_SIZES, name)
        for promise in PROMISES:
            yield from try_promise(promise, trial)


def try_promise(promise: Callable[[Trial], Iterator[CheckResult]], trial: Trial) -> Iterator[CheckResult]:
    """Yield the results of one trial, with the device's name and the seconds. Its exception is a fault."""
    began = time.perf_counter()
    try:
        for result in promise(trial):
            seconds = time.perf_counter() - began
            yield replace(result, device=trial.name, data={**result.data, "seconds": seconds})
            began = time.perf_counter()
    except Exception as error:
        name = promise.__name__.removeprefix("check_").replace("_", " ")
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = "report it with doctor.json, which has the traceback"
        result = fault(name, f"the trial failed: {lines[0]}", advice, traceback=traceback.format_exc())
        yield replace(result, device=trial.name)
    finally:
        if trial.sizes.compiled:
            # The compiler keeps eight variants of a function, and runs any further one without compiling it.
            torch.compiler.reset()
        gc.collect()
        if trial.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # after some errors every call of CUDA fails
                torch.cuda.empty_cache()


def check_saves(trial: Trial) -> Iterator[CheckResult]:
    """Save in the background: the checkpoint must have the bits of its step, and training must hardly wait."""
    sizes = trial.sizes
    bench = SaveBench(
        trial.folder / "saves",
        trial.device,
        trial.texts(),
        sizes.speed,
        min(8, sizes.max_rows),
        sizes.speed_length,
        {"dtype": sizes.dtype},
    )
    synchronous, blocked, steps, wrong = [], [], 0, []
    for number in range(4):
        bench.train()
        whole = bench.save_synchronously()
        bench.train()
        step = bench.step
        expected = {name: value.cpu().clone() for name, value in bench.state.model.state_dict().items()}
        blocking, during = bench.save_asynchronously()
        saved = load_file(bench.artifacts.checkpoint(step) / MODEL_FILE)
        wrong += [f"{name} of step {step}" for name in saved if not torch.equal(saved[name], expected[name])]
        if number:  # the first round allocates buffers
            synchronous.append(whole)
            blocked.append(blocking)
            steps += len(during)
    yield judge_saves(sum(blocked) / sum(synchronous), steps, wrong)


def judge_saves(ratio: float, steps: int, wrong: list[str]) -> CheckResult:
    """``ratio``: blocked time over that of a save without a copy. ``steps``: done meanwhile. ``wrong``: tensors."""
    data = {"blocked_ratio": ratio, "steps_meanwhile": steps, "wrong": wrong}
    if wrong:
        advice = "set checkpoint.save_interval so that no save is needed before the end, and report it with doctor.json"
        return fault("saves", f"a checkpoint holds other weights than its step had: {wrong[0]}", advice, **data)
    message = f"a background save blocks training for {ratio:.0%} of a blocking one; {steps} steps were done meanwhile"
    if ratio > MAX_BLOCKED:
        return warning("saves", message, "save less often, or give the host more cores", **data)
    return ok("saves", f"{message}; its bits are those of its step", **data)


def check_speed(trial: Trial) -> Iterator[CheckResult]:
    """Measure tokens/s, MFU and peak memory of a 64M model, and compare them with the plan."""
    config, length = trial.sizes.speed, trial.sizes.speed_length
    rows = choose_rows(trial)
    planned = _planned_bytes(trial, rows)
    is_cuda = trial.device.type == "cuda"
    flops = measure(trial.device.type, trial.sizes.dtype)
    for compiled in (False, True) if trial.sizes.compiled else (False,):
        base = torch.cuda.memory_allocated() if is_cuda else 0
        bench = TrainBench(
            trial.folder / "speed",
            trial.device,
            trial.texts(),
            config,
            rows,
            length,
            {"use_compile": compiled, "dtype": trial.sizes.dtype},
        )
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            bench.train()
        tokens, began = 0, time.perf_counter()
        last: Any = None
        for _ in range(trial.sizes.speed_steps):
            last = bench.start_step()
            tokens += bench.loader.tokens(bench.step)
        last.read()
        speed = tokens / (time.perf_counter() - began)
        per_token = flops_per_token(config, bench.data.train_set.attention_length)
        found = Speed(
            model=f"{parameters(config) / 1e6:.0f}M",
            compiled=compiled,
            rows=rows,
            tokens_per_second=speed,
            planned_tokens_per_second=PLANNED_EFFICIENCY * flops / per_token,
            mfu=speed * per_token / peak if is_cuda and (peak := peak_flops(trial.name)) else None,
            peak_bytes=torch.cuda.max_memory_allocated() - base if is_cuda else None,
            planned_bytes=planned,
        )
        del bench, last
        gc.collect()
        yield judge_speed(found)
        if found.peak_bytes is not None:
            yield judge_memory(found, found.peak_bytes)


def choose_rows(trial: Trial) -> int:
    """Return the largest power of two, up to ``max_rows``, that is planned to use at most `MEMORY_SHARE` of a card."""
    rows = trial.sizes.max_rows
    if trial.device.type == "cuda":
        usable = MEMORY_SHARE * torch.cuda.get_device_properties(trial.device).total_memory
        while rows > 1 and _planned_bytes(trial, rows) > usable:
            rows //= 2
    return rows


def _planned_bytes(trial: Trial, rows: int) -> int:
    sizes = trial.sizes
    return memory_bytes(sizes.speed, batch_size=rows, seq_len=sizes.speed_length, dtype=sizes.dtype).total


@dataclass(frozen=True)
class Speed:
    """Measurements of one model, and the plan's values. ``mfu``: None if the peak FLOP/s of the card are unknown."""

    model: str
    compiled: bool
    rows: int
    tokens_per_second: float
    planned_tokens_per_second: float
    mfu: float | None
    peak_bytes: int | None
    planned_bytes: int

    @property
    def mode(self) -> str:
        """How the model ran."""
        return "compiled" if self.compiled else "eager"


def judge_speed(found: Speed) -> CheckResult:
    """Return a warning if the run is slower than planned, and no fault, because the plan is an estimate."""
    mfu = f", MFU {found.mfu:.0%}" if found.mfu is not None else ""
    message = (
        f"{found.model}, {found.mode}, {found.rows} rows: {found.tokens_per_second:,.0f} tokens/s{mfu}; "
        f"planned {found.planned_tokens_per_second:,.0f}"
    )
    if found.tokens_per_second < (1 - PLAN_TOLERANCE) * found.planned_tokens_per_second:
        advice = "look for another process on the device; try training.use_compile and a larger batch_size"
        return warning("speed", message, advice, **vars(found))
    return ok("speed", message, **vars(found))


def judge_memory(found: Speed, peak: int) -> CheckResult:
    """Return a fault for more memory than planned: a run may not fit. Much less is a warning: it wastes memory."""
    off = peak / found.planned_bytes - 1
    message = (
        f"{found.model}, {found.mode}, {found.rows} rows: {human_bytes(peak)} at the peak, "
        f"{human_bytes(found.planned_bytes)} planned ({off:+.0%})"
    )
    data = {**vars(found), "off": off}
    if off > PLAN_TOLERANCE:
        advice = "leave this much room in batch_size, and report it with doctor.json"
        return fault("peak memory", message, advice, **data)
    if off < -PLAN_TOLERANCE:
        return warning("peak memory", message, "batch_size may be larger than the plan says", **data)
    return ok("peak memory", message, **data)


def check_host_syncs(trial: Trial) -> Iterator[CheckResult]:
    """Count how often the host waits for the device in steps between two metric lines, dense and MoE."""
    for name, config in _models(trial):
        bench = trial.bench(f"syncs-{name}", config)
        bench.train()
        bench.train()
        yield judge_syncs(name, 5, count_syncs(bench, 5), trial.device.type)


def count_syncs(bench: TrainBench, steps: int) -> dict[str, int]:
    """Run ``steps`` steps without reading their results. Return the number of waits, by the names in `SYNCS`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(STEPS):
            pending = [bench.start_step() for _ in range(steps)]
    del pending
    events = list(profiler.events() or ())
    # The profiler waits for the device itself when it ends: only what began within the steps counts.
    # On a GPU the steps are listed a second time, with the time at which the device ran them.
    within = next(each.time_range for each in events if each.name == STEPS and each.device_type.name == "CPU")
    found: dict[str, int] = {}
    for event in events:
        if event.name in SYNCS[bench.device.type] and within.start <= event.time_range.start <= within.end:
            found[event.name] = found.get(event.name, 0) + 1
    return found


def judge_syncs(model: str, steps: int, found: dict[str, int], device: str) -> CheckResult:
    """On a GPU a step must not wait for the device. On a CPU the counts are only shown."""
    data = {"model": model, "steps": steps, "found": found}
    shown = ", ".join(f"{count} x {name}" for name, count in sorted(found.items())) or "none"
    message = f"{model}: {shown} in {steps} steps between metric lines"
    if found and device == "cuda":
        if model == "MoE" and torch.cuda.get_device_properties(0).major not in GROUPED_GENERATIONS:
            advice = (
                "nothing to do: only Hopper and data-center Blackwell cards have a kernel for the experts' products"
            )
            return warning("host syncs", message, advice, **data)
        advice = "training is slower than it could be; report it with doctor.json"
        return fault("host syncs", message, advice, **data)
    return ok("host syncs", message, **data)


def check_float16(trial: Trial) -> Iterator[CheckResult]:
    """Train in float16 from a loss scale that overflows: those steps must change nothing, then the loss must fall."""
    bench = trial.bench("float16", trial.sizes.model, dtype="float16")
    scaler = bench.state.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": OVERFLOWING_SCALE})
    before = [parameter.detach().clone() for parameter in bench.state.model.parameters()]
    losses: list[float] = []
    skipped, touched = 0, False
    for _ in range(FLOAT16_STEPS):
        metrics = bench.train()
        if not losses and not metrics.applied:
            skipped += 1
            pairs = zip(before, bench.state.model.parameters(), strict=True)
            touched = touched or not all(torch.equal(old, new) for old, new in pairs)
        else:
            losses.append(metrics.loss)
    finite = all(bool(parameter.isfinite().all()) for parameter in bench.state.model.parameters())
    yield judge_float16(losses, skipped, touched=touched, finite=finite, scale=bench.state.loss_scale() or 0.0)


def judge_float16(losses: list[float], skipped: int, *, touched: bool, finite: bool, scale: float) -> CheckResult:
    """``skipped``: overflowing steps before the first good one. ``touched``: whether one of them changed weights."""
    data = {"losses": losses, "skipped": skipped, "touched": touched, "finite": finite, "scale": scale}
    advice = 'set training.dtype "bfloat16" or "float32", and report it with doctor.json'
    if touched or not finite:
        what = "an overflowing step changed weights" if touched else "weights are not finite"
        return fault("float16", what, advice, **data)
    if not losses or not losses[-1] < losses[0]:
        return fault("float16", "the loss does not fall", advice, **data)
    message = f"{skipped} overflowing steps left out, then the loss fell from {losses[0]:.2f} to {losses[-1]:.2f}"
    return ok("float16", f"{message}; loss scale {scale:,.0f}", **data)


def check_deterministic(trial: Trial) -> Iterator[CheckResult]:
    """Train twice with torch's deterministic algorithms, dense and MoE, and compare the weights bit by bit."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for name, config in _models(trial):
            yield judge_deterministic(name, *(_trained_weights(trial, f"{name}-{i}", config) for i in range(2)))
    finally:
        torch.use_deterministic_algorithms(before)


def _trained_weights(trial: Trial, name: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    bench = trial.bench(f"twice-{name}", config)
    for _ in range(5):
        bench.train()
    return {name: value.cpu() for name, value in bench.state.model.state_dict().items()}


def judge_deterministic(
    model: str, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> CheckResult:  # fmt: skip
    """Return the result for the weights of two equal runs."""
    different = [name for name in first if not torch.equal(first[name], second[name])]
    data = {"model": model, "different": different}
    if different:
        message = f"{model}: {len(different)} of {len(first)} tensors differ after 5 steps, the first is {different[0]}"
        advice = "a resumed run is not the same run here; report it with doctor.json"
        return fault("deterministic", message, advice, **data)
    return ok("deterministic", f"{model}: two runs of 5 steps have the same weights to the bit", **data)


def _models(trial: Trial) -> list[tuple[str, ModelConfig]]:
    dense = trial.sizes.model
    return [("dense", dense), ("MoE", replace(dense, use_moe=True))]


def check_several_ranks(trial: Trial) -> Iterator[CheckResult]:
    """Train on all GPUs, or with two ranks on a CPU, and compare the losses with those of one rank."""
    world = torch.cuda.device_count() if trial.device.type == "cuda" else 2
    if world == 1:
        yield ok("ranks", "there is one GPU: several ranks and NCCL were not tried", world=1)
    else:
        yield from check_ranks(trial, world)


PROMISES: tuple[Callable[[Trial], Iterator[CheckResult]], ...] = (
    check_attention,
    check_deterministic,
    check_float16,
    check_host_syncs,
    check_saves,
    check_speed,
    check_resume,
    check_several_ranks,
)
