"""The plan and the lifecycle under a simulated clock and simulated hosts.

TRAINYARD_SIMULATION_SEED=123 replays one seed. A seed that fails is printed as a test of the fewest events that fail.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests import soak_report
from tests.simulation.shrinking import as_test, failure_of, shrink
from tests.simulation.simulated_cluster import Event, SimulatedCluster, replay
from tests.soak_report import SoakReport
from trainyard.service.jobs import lifecycle
from trainyard.service.timing import Timing

EVENTS = 200
SHORT_SEEDS = 400
LONG_SEEDS = 100_000


def simulate(seed: int) -> SimulatedCluster:
    """Run one cluster from its first event until it is idle. Raises AssertionError with a test of the fewest events."""
    cluster = SimulatedCluster(seed)
    try:
        for _ in range(EVENTS):
            cluster.step()
            cluster.check()
        cluster.drain()
    except Exception as error:
        shortest = as_test(seed, cluster.history, error)
        raise AssertionError(f"seed {seed}, event {len(cluster.history)}: {error}\n\n{shortest}") from error
    return cluster


def simulate_all(seeds: Iterable[int]) -> Counter[str]:
    """Return how often each event happened in all of them."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        counts.update(simulate(seed).counts)
    return counts


def test_some_hundred_seeds() -> None:
    given = os.environ.get("TRAINYARD_SIMULATION_SEED")
    simulate_all([int(given)] if given else range(SHORT_SEEDS))


def test_a_seed_is_the_same_world_each_time() -> None:
    one, two = simulate(5), simulate(5)
    assert one.history == two.history
    assert one.jobs == two.jobs
    assert one.processes == two.processes


def test_the_worlds_are_not_all_alike() -> None:
    """What never happens in the simulation is not tested by it."""
    worlds = [simulate(seed) for seed in range(150)]
    statuses = {job.status for cluster in worlds for job in cluster.jobs.values()}
    assert {"paused", "cancelled", "failed", "succeeded", "interrupted"} <= statuses
    assert max(len(job.attempts) for cluster in worlds for job in cluster.jobs.values()) >= 5
    assert any(process.closed for cluster in worlds for process in cluster.processes.values())
    counts = sum((cluster.counts for cluster in worlds), Counter())
    for what in ("Preempt", "ended paused: preempted", "ended failed: max_restarts", "ended interrupted: agent_lost"):
        assert counts[what] >= 3, what


@pytest.mark.parametrize("broken", ["two leases", "two attempts", "success of nothing"])
def test_the_checks_see_what_they_are_for(broken: str) -> None:
    cluster = SimulatedCluster(1)
    cluster.submit()
    cluster.schedule()
    job = next(iter(cluster.jobs.values()))
    cluster.check()
    if broken == "two leases":
        cluster.leases["cpu:99"] = job.id
    elif broken == "two attempts":
        name, process = next(iter(cluster.processes.items()))
        cluster.processes[type(name)(job.id, 2)] = process
    else:
        cluster.release(job, job.latest)
        job.status = type(job.status).SUCCEEDED
    with pytest.raises(AssertionError):
        cluster.check()


@pytest.mark.parametrize("rule", ["give up", "wait longer", "a step first", "lower priority"])
def test_a_rule_that_is_missing_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the simulation proves nothing about it."""
    match rule:
        case "give up":
            monkeypatch.setattr(lifecycle, "MAX_FRUITLESS_ATTEMPTS", 99)
        case "wait longer":
            monkeypatch.setattr(SimulatedCluster, "timing", Timing(setback_seconds=(5.0,)))
        case "a step first":
            monkeypatch.setattr(
                SimulatedCluster,
                "live",
                lambda cluster, job, live=SimulatedCluster.live: replace(live(cluster, job), made_progress=True),
            )
        case _:
            monkeypatch.setattr(
                SimulatedCluster,
                "live",
                lambda cluster, job, live=SimulatedCluster.live: replace(live(cluster, job), priority=-1),
            )
    with pytest.raises(AssertionError, match=VIOLATIONS[rule]):
        simulate_all(range(SHORT_SEEDS))


def test_a_failing_seed_is_shrunk_and_printed_as_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(lifecycle, "MAX_FRUITLESS_ATTEMPTS", 99)
        with pytest.raises(AssertionError, match="gets nowhere and is started again") as caught:
            simulate_all(range(SHORT_SEEDS))
        code = str(caught.value).partition("\n\n")[2]
        printed: dict[str, Any] = {}
        exec(code, printed)
        (test,) = [printed[name] for name in printed if name.startswith("test_seed_")]
        with pytest.raises(AssertionError, match="gets nowhere and is started again"):
            test()
        events = [Event(name, int(number)) for name, number in re.findall(r'\("(\w+)", (\d+)\),', code)]
        assert 4 <= len(events) <= 20, code
        seed = int(test.__name__.removeprefix("test_seed_"))
        wanted = failure_of(seed, events)
        for left_out in range(len(events)):
            rest = events[:left_out] + events[left_out + 1 :]
            assert failure_of(seed, rest) != wanted, f"event {left_out} is not needed: {code}"
    test()  # without the fault the same events break nothing


def test_shrinking_finds_the_items_that_matter() -> None:
    tried: list[int] = []

    def fails(items: Sequence[int]) -> bool:
        tried.append(len(items))
        return {17, 18, 160} <= set(items)

    assert shrink(range(200), fails) == [17, 18, 160]
    assert len(tried) < 200
    assert shrink([1, 2, 3], lambda _: True) == []


def test_a_history_is_done_again_event_by_event() -> None:
    whole = simulate(5)
    again = replay(5, whole.history)
    assert again.jobs == whole.jobs
    assert again.processes == whole.processes


VIOLATIONS = {
    "give up": "gets nowhere and is started again",
    "wait longer": "restarts too soon",
    "a step first": "has made no step since",
    "lower priority": "is not more important",
}


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_hundred_thousand_seeds(account: SoakReport) -> None:
    seeds = int(soak_report.chosen("SEEDS", LONG_SEEDS))
    started = time.perf_counter()
    account.faults = simulate_all(range(seeds))
    took = time.perf_counter() - started
    account.invariants.append(f"{seeds:,} seeds of {EVENTS} events, {seeds / took:.0f} a second: no invariant broken")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_delays_no_restart_and_hides_no_lost_agent(hours: int) -> None:
    """With a clock set back, ages would be an hour too small, and a dead attempt would keep its devices."""
    cluster = SimulatedCluster(1)
    cluster.submit()
    cluster.schedule()
    cluster.agents_send_heartbeats()
    (process,) = cluster.processes.values()
    (job,) = cluster.jobs.values()
    cluster.heartbeat(next(iter(cluster.processes)), process)
    assert job.status == "running"
    process.agent = process.ranks = False
    cluster.now += timedelta(hours=hours)
    cluster.schedule()
    assert job.status == "interrupted"
    cluster.now += timedelta(hours=hours)
    cluster.schedule()
    assert job.status == "queued"
    cluster.schedule()
    assert job.status == "starting"


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_declares_nothing_dead(hours: int) -> None:
    cluster = SimulatedCluster(2)
    cluster.submit()
    cluster.schedule()
    (name,) = cluster.processes
    cluster.heartbeat(name, cluster.processes[name])
    cluster.now += timedelta(hours=hours)
    for _ in range(5):
        cluster.schedule()
        cluster.now += timedelta(seconds=1)
    assert cluster.processes[name].is_alive
    assert cluster.jobs[name.job_id].status == "running"
