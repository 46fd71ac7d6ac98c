"""The same command again with the same key finds the job, and starts no second one."""

import json

from tests.service.conftest import Command
from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import saved


def test_submit_and_fork_take_a_key(rig: ServiceHarness, command: Command) -> None:
    submit = ("submit", "--data_path", str(rig.corpus), "--tokenizer_path", "byte", "-y", "--json")
    answers = [command(*submit, "--idempotency-key", "one") for _ in range(2)]
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert len({json.loads(out)["id"] for _, out, _ in answers}) == 1
    code, _, err = command(*submit, "--max_steps", "5", "--idempotency_key", "one")
    assert (code, "used before, with another body" in err) == (1, True), err
    parent, _ = saved(rig, 400, training={"max_steps": 1000})
    for options in ((), ("--decay", "20")):
        forks = [
            command("fork", parent, *options, "--json", "--idempotency-key", f"fork-{len(options)}") for _ in range(2)
        ]
        assert [code for code, _, _ in forks] == [0, 0], forks
        assert len({json.loads(out)["id"] for _, out, _ in forks}) == 1
    assert len(rig.get("/jobs")["data"]) == 4
