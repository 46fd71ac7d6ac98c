"""The checks of the host in order: read the facts of each, and judge them."""

from collections.abc import Iterator, Mapping

from trainyard.worker.doctor import checks, facts
from trainyard.worker.doctor.report import CheckResult


def check_host(environment: Mapping[str, str]) -> Iterator[CheckResult]:
    """Yield the result of each check as soon as it is known. Takes about 15 seconds, most of them for torch."""
    yield checks.check_python(facts.read_python())
    torch, driver = facts.read_torch(), facts.read_driver(environment)
    limits = facts.read_limits()
    cards = len(torch.cards)
    yield checks.check_torch(torch, limits["AS"][0])
    yield checks.check_driver(driver, torch)
    yield checks.check_cuda(torch, driver)
    yield checks.check_nccl(torch)
    yield checks.check_compiler(facts.read_compiler(environment), torch)
    yield from checks.check_bfloat16(torch)
    yield checks.check_memory(facts.read_memory())
    for disk in facts.read_disks(environment):
        yield checks.check_disk(disk)
    yield checks.check_shared_memory(facts.read_shared_memory(), cards)
    yield checks.check_clock(facts.read_clock())
    yield checks.check_limits(limits, cards)
    yield checks.check_ports(facts.read_ports(environment))
    yield checks.check_slurm(facts.read_slurm(environment))
