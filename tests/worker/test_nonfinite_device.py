"""The guard on the device decides as the host does, and a step does not wait for the device."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.worker.test_step import CPU, SHAPE, cut, rows, train_state, unseeded
from trainyard.worker.training.nonfinite import (
    DeviceNonFiniteGuard,
    NonFiniteCounters,
    Policy,
    StepDecision,
    decide_step,
)

WAITS = {"item", "tolist", "numpy", "nonzero", "cpu", "unique", "bincount", "masked_select"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains")
}


@pytest.mark.parametrize("policy", ["fail", "skip", "rollback"])
def test_the_guard_skips_what_the_host_does_not_apply_and_all_steps_after_an_end(policy: Policy) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    drawn, ends = random.Random(seed), []
    for number in range(20):
        guard, counters, ended = DeviceNonFiniteGuard(policy, is_latching=True, device=CPU), NonFiniteCounters(), False
        bad_share = (0.01, 0.5, 0.95)[number % 3]
        for _ in range(200):
            finite = drawn.random() > bad_share
            norm = torch.tensor(1.0 if finite else drawn.choice([float("nan"), float("inf")]))
            is_skipped = bool(guard.found_inf(norm))
            if ended:
                assert is_skipped
                continue
            decision, counters = decide_step(finite, policy, counters, None)
            assert is_skipped == (decision is not StepDecision.APPLIED)
            ended = decision in (StepDecision.FAIL, StepDecision.ROLL_BACK)
        ends.append(ended)
    assert any(ends)


def test_a_reset_sets_the_counters_and_enables_updates() -> None:
    guard = DeviceNonFiniteGuard("skip", is_latching=True, device=CPU)
    guard.reset(NonFiniteCounters(in_a_row=10, skipped=10))
    assert bool(guard.found_inf(torch.tensor(float("nan"))))
    assert bool(guard.found_inf(torch.tensor(1.0))), "eleven in a row end the run"
    guard.reset(NonFiniteCounters())
    assert not bool(guard.found_inf(torch.tensor(1.0)))


def test_with_a_loss_scale_only_bad_steps_are_skipped() -> None:
    guard = DeviceNonFiniteGuard("fail", is_latching=False, device=CPU)
    assert [bool(guard.found_inf(torch.tensor(norm))) for norm in (1.0, float("inf"), 1.0)] == [False, True, False]


class NoDeviceSync(TorchFunctionMode):
    """Fails if an operation makes the host wait for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_step_does_not_wait_for_the_device(use_moe: bool, optimizer: str) -> None:
    student = train_state(replace(SHAPE, use_moe=use_moe), dtype="bfloat16", optimizer=optimizer)
    micros = cut(rows(4, seed=5), 2)
    with NoDeviceSync():
        pending = [student.train_step.run(micros, 1e-3, unseeded) for _ in range(2)]
    with pytest.raises(AssertionError, match="tolist waits"), NoDeviceSync():
        pending[0].read()
    assert all(step.read().applied for step in pending)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_after_a_bad_step_nothing_is_updated_until_a_reset(optimizer: str) -> None:
    student, batch = train_state(optimizer=optimizer), rows(4, seed=5)
    student.train_step.run(cut(batch, 4), 1e-2, unseeded)
    student.optimizer.step()
    before = [parameter.detach().clone() for parameter in student.model.parameters()]
    state = [value.clone() for each in student.optimizer.state.values() for value in each.values()]
    bad = [replace(micro, factor=float("nan")) for micro in cut(batch, 4)]
    pending = [student.train_step.run(micros, 1e-2, unseeded) for micros in (bad, cut(batch, 4))]
    assert [(step.read().applied, step.read().finite) for step in pending] == [(False, False), (False, True)]
    assert all(map(torch.equal, student.model.parameters(), before))
    after = [value for each in student.optimizer.state.values() for value in each.values()]
    assert all(map(torch.equal, after, state))
    student.train_step.guard.reset(NonFiniteCounters())
    assert student.train_step.run(cut(batch, 4), 1e-2, unseeded).read().applied
    assert not any(map(torch.equal, student.model.parameters(), before))
