"""What makes a run the same run: stored in each checkpoint's state.json, and compared before anything goes on from it.

The worker compares all of it, having read the corpus. The service holds against it what costs the same however large
the corpus is, so that most of what cannot go on is refused when it is asked for, and not when its turn has come.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

CHANGEABLE_FIELDS = ("dropout", "router_aux_loss_coef", "rope_theta", "max_position_embeddings")
"""Of a model, what may be another one where the data begins anew: the weights fit, and mean the same."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a resume to be the same run.

    ``tokenizer``, ``corpus``: fingerprints. ``corpus_file``, ``vocabulary``: how the service tells them at a glance,
    the file's `contract.file_identity.Sketch` and the tokenizer's size; {} and None where that is not known. They are no part
    of the comparison: the fingerprints decide.
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
        """What differs, in words: ``seed is 43 and was 42``; ``other`` is the checkpoint's."""
        theirs = asdict(other)
        found = []
        for name, mine in asdict(self).items():
            if name == "model":
                keys = sorted(set(mine) | set(theirs[name]))
                found += [_difference(f"model.{key}", mine.get(key), theirs[name].get(key)) for key in keys]
            elif name not in ("corpus_file", "vocabulary"):
                found.append(_difference(name, mine, theirs[name]))
        return [text for text in found if text]


def _difference(name: str, mine: Any, theirs: Any) -> str:
    if mine == theirs:
        return ""
    if name in ("corpus", "tokenizer"):
        return f"the {name} is another one (fingerprint {str(mine)[:12]} and was {str(theirs)[:12]})"
    return f"{name} is {mine} and was {theirs}"
