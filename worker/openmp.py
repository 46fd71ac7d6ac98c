"""How the threads of a CPU rank wait for each other. Import it before torch: OpenMP reads it when torch is loaded."""

from collections.abc import MutableMapping

SPINS = "2500"
"""About 0.1 ms: most operators of a step follow each other faster than that."""


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let threads wait in a busy loop for `SPINS` rounds, and then sleep. What the user has set stays.

    By default they spin for 300,000 rounds. If another program uses the cores, a step then takes three times as long as
    with this. If they sleep at once, each operator has to wake them, which costs a fifth of a step on free cores
    (docs/decisions/0026-openmp-waits.md).
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
