"""Field names that are keys on disk or in the database: a rename in the code must not change what is stored."""

import pytest

from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.processes import ProcessIdentity
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import FileDigest
from trainyard.model.costs import MemoryEstimate
from trainyard.service.devices.inventory import Device
from trainyard.service.launch.base import AttemptPlacement
from trainyard.service.metrics.lineage import LineageSegment
from trainyard.service.webhooks.alert_rules import RuleState
from trainyard.worker.agent.rendezvous import RendezvousEndpoint
from trainyard.worker.checkpoint.files import RunState
from trainyard.worker.data.corpus import CorpusMeta
from trainyard.worker.training.nonfinite import NonFiniteCounters

STORED = {
    AttemptPlacement: "engine_id state waiting_for nodes devices tailed",
    CorpusMeta: "content bytes tokenizer text_field vocab_size token_bytes documents tokens lines blank_lines bad_lines"
    " named special_tokens special_texts added_tokens",
    Device: "id kind model memory_bytes memory_used_bytes processes strangers temperature_celsius uuid pci_bus_id"
    " numa_node link nvlink_peers xid_errors fault mig_uuid",
    FileDigest: "bytes sha256",
    FileFingerprint: "bytes sha256",
    LineageSegment: "job_id attempt after until",
    MemoryEstimate: "weights gradients optimizer activations",
    NonFiniteCounters: "in_a_row skipped rollbacks",
    ProcessIdentity: "boot_id pid_namespace pid start_ticks",
    RendezvousEndpoint: "host port",
    RuleState: "inside step total weight best best_step",
    RunIdentity: "model tokenizer corpus seed max_seq_len packing corpus_file vocabulary",
    RunState: "step tokens rows_per_step world_size identity data_offset base_step base_tokens loss interval"
    " interval_bytes smoothed trouble scaler probe unevaluated stacks_matrices torch_version version",
}


@pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.__name__)
def test_stored_names_are_those_of_release_0_1_and_what_was_added(kind: type) -> None:
    assert list(kind.__annotations__) == STORED[kind].split()
