"""The identity of a run: stored in each checkpoint's state.json, and compared before a run resumes from it.

The worker compares all of it after it has read the corpus. The service compares the parts whose cost does not grow with
the corpus, so that most resumes that must fail are rejected when they are requested, and not when they start.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from trainyard.contract.corpus_files import describe_changes

CHANGEABLE_FIELDS = ("dropout", "router_aux_loss_coef", "rope_theta", "max_position_embeddings")
"""Fields of a model that may change in a fork that restarts the data: the weights still fit."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same in a resumed run.

    ``tokenizer``, ``corpus``: fingerprints, which decide. ``corpus_file``: `contract.file_identity.FileFingerprint` of
    a corpus of one file, `contract.corpus_files.stored_fingerprint` of any other, or {} if unknown. ``vocabulary``:
    size of the tokenizer, or None if unknown. The last two are for quick checks by the service; here ``corpus_file`` is
    used only to name the files that differ.
    """

    model: dict[str, Any]
    tokenizer: str
    corpus: str
    seed: int
    max_seq_len: int
    packing: str
    corpus_file: dict[str, Any] = field(default_factory=dict, compare=False)
    vocabulary: int | None = field(default=None, compare=False)

    def differences(self, other: Self) -> list[str]:
        """Return the differences from the checkpoint's identity ``other`` as texts: ``seed is 43 and was 42``."""
        saved = asdict(other)
        texts = []
        for name, value in asdict(self).items():
            if name == "model":
                keys = sorted(set(value) | set(saved[name]))
                texts += [_difference(f"model.{key}", value.get(key), saved[name].get(key)) for key in keys]
            elif name == "corpus" and value != saved[name]:
                texts += self._file_changes(other) or [_difference(name, value, saved[name])]
            elif name not in ("corpus_file", "vocabulary"):
                texts.append(_difference(name, value, saved[name]))
        return [text for text in texts if text]

    def _file_changes(self, other: Self) -> list[str]:
        before, now = (identity.corpus_file.get("files") for identity in (other, self))
        return describe_changes(before, now) if before and now else []


def _difference(name: str, value: Any, saved: Any) -> str:
    if value == saved:
        return ""
    if name in ("corpus", "tokenizer"):
        return f"the {name} is another one (fingerprint {str(value)[:12]} and was {str(saved)[:12]})"
    return f"{name} is {value} and was {saved}"
