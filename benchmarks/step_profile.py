"""Profile training steps in their own process, on one thread of one core, and print a table of their parts.

Started by benchmarks.profile as ``python -m benchmarks.step_profile FOLDER eager|compiled``.
"""

import contextlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.trainer import BATCH, LEARNING_RATE, LENGTH, STEPS, VOCABULARY, WARMUP_STEPS, spec
from trainyard.contract.spec import JobSpec
from trainyard.model import cpu_attention, decoder, layers
from trainyard.worker.data import tokenizers
from trainyard.worker.data.corpus import open_corpus
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.data.packing import PackedDataset
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training import step as train_step
from trainyard.worker.training.state import TrainState, build_train_state, initial_model

MODULES = {
    "q_proj": "attention: projections",
    "k_proj": "attention: projections",
    "v_proj": "attention: projections",
    "o_proj": "attention: projections",
    "self_attn": "attention: rest",
    "gate_proj": "feed-forward: projections",
    "up_proj": "feed-forward: projections",
    "down_proj": "feed-forward: projections",
    "mlp": "feed-forward: SiLU and product",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "q_norm": "norms",
    "k_norm": "norms",
    "norm": "norms",
    "embed_tokens": "embedding",
}
"""Last name of a module -> the part of the step that its forward and backward passes belong to."""

ATTENTION = "attention: softmax and its products"
RESIDUAL = "residual sums"
CLIPPING = "gradient norm and clipping"
OPTIMIZER = "optimizer"
ACCUMULATION = "gradients: kept by autograd"
BACKWARD = "backward pass"
REST = "rest"

PRODUCTS, COPIES, OTHER, PYTHON = KINDS = ("products", "casts and copies", "other operators", "Python")
PRODUCT_NAMES = {"mm", "bmm", "addmm", "baddbmm"}
COPY_NAMES = {"_to_copy", "copy_", "clone", "cat", "index", "index_select", "zeros", "zero_", "fill_", "_foreach_copy_"}

Batches = Callable[[int], Iterable[MicroBatch]]
"""Returns the micro-batches of a step."""


@dataclass(frozen=True)
class PartTime:
    """Milliseconds of one step that a part takes, by kind, in the order of `KINDS`."""

    part: str
    by_kind: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.by_kind)


class PartClock(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class is not annotated
    """Sums the CPU time of this thread by part and kind: other programs on the core do not change it much.

    It knows the parts from the ranges that it is given. As a dispatch mode it also sees each operator. Those of the
    backward pass belong to the part in which their node was made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._entered: list[tuple[str, str]] = []
        self._part_of_node: dict[int, str] = {}
        self._since = time.thread_time()

    @contextlib.contextmanager
    def measure(self, part: str, kind: str = PYTHON) -> Iterator[None]:
        """Count the time of the block for ``part``, without that of the ranges inside it."""
        self._count()
        self._entered.append((part, kind))
        first_node = _next_node()
        try:
            yield
        finally:
            self._count()
            self._entered.pop()
            for node in range(first_node, _next_node()) if kind == PYTHON else ():
                self._part_of_node.setdefault(node, part)  # inner ranges end first

    def parts(self, steps: int) -> list[PartTime]:
        """Return the parts of one of ``steps``, the longest first."""
        names = {part for part, _ in self.seconds}
        found = [PartTime(name, tuple(1000 * self.seconds[name, kind] / steps for kind in KINDS)) for name in names]
        return sorted(found, key=lambda each: -each.total)

    def _count(self) -> None:
        now = time.thread_time()
        if self._entered:
            self.seconds[self._entered[-1]] += now - self._since
        self._since = now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        kind = PRODUCTS if name in PRODUCT_NAMES else COPIES if name in COPY_NAMES else OTHER
        with self.measure(self._part(), kind):
            return func(*args, **(kwargs or {}))

    def _part(self) -> str:
        node: Any = torch._C._current_autograd_node()  # noqa: SLF001 - it has no public name
        if node is None:
            return self._entered[-1][0] if self._entered else REST
        if node.name().endswith("AccumulateGrad"):
            return ACCUMULATION
        return self._part_of_node.get(node._sequence_nr(), BACKWARD)  # noqa: SLF001


def _next_node() -> int:
    autograd: Any = torch.autograd
    return int(autograd._get_sequence_nr())  # noqa: SLF001


def child(root: Path, *, compiled: bool) -> None:
    """Profile the steps of the benchmark `trainer`, and print the table."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    state, loader = build(root, compiled=compiled)
    if compiled:
        state.train_step.warm_up(loader.dummy())
    seconds = [run_step(state, loader.microbatches, step) for step in range(1, STEPS + 1)][WARMUP_STEPS:]
    steps = range(STEPS + 1, 2 * STEPS + 1 - WARMUP_STEPS)
    parts = profile_steps(state, loader.microbatches, steps, compiled=compiled)
    print(f"\n{'compiled' if compiled else 'eager'}: {min(seconds):.2f} s of CPU time a step, on one thread")
    print(table(parts))


def packed_dataset(root: Path) -> PackedDataset:
    """Return the packed sequences of the corpus that `benchmarks.trainer.prepare` wrote."""
    tokenizer = tokenizers.load_tokenizer(str(root / "tokenizer"))
    corpus = open_corpus(root / "corpus.jsonl", tokenizer, cache=root / "cache", text_field="text", max_bad_lines=0.01)
    return PackedDataset.open(corpus, max_seq_len=LENGTH, packing="document")


def build(root: Path, *, compiled: bool) -> tuple[TrainState, MicroBatchLoader]:
    """Return what the worker builds for the spec of the benchmark `trainer`."""
    described = JobSpec.model_validate(spec(root, compiled=compiled))
    training, dataset = described.training, packed_dataset(root)
    ranks = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    model = initial_model(described.model.with_vocab_size(VOCABULARY), training.seed, ranks.device)
    loader = MicroBatchLoader(
        dataset,
        StepSampler(len(dataset), BATCH, training.seed),
        ranks,
        BATCH,
        training.loss_normalization,
        min_rows=BATCH if compiled else 1,
        fixed_shape=compiled,
    )
    return build_train_state(model, training, 0.0, ranks), loader


def run_step(state: TrainState, batches: Batches, step: int) -> float:
    """Run a step, and return its CPU seconds."""
    began = time.thread_time()
    state.train_step.run(batches(step), LEARNING_RATE, lambda _: None).read()
    return time.thread_time() - began


def profile_steps(state: TrainState, batches: Batches, steps: Sequence[int], *, compiled: bool) -> list[PartTime]:
    """Run ``steps``; return the parts of one step, the longest first. A compiled model is one part."""
    clock = PartClock()
    marks = mark_compiled_parts(clock) if compiled else mark_parts(clock, state.model)
    with marks, clock.measure(REST):
        for step in steps:
            run_step(state, lambda number: _marked_batches(clock, batches(number)), step)
    return clock.parts(len(steps))


@contextlib.contextmanager
def mark_parts(clock: PartClock, model: nn.Module) -> Iterator[None]:
    """Give ``clock`` a range for each part of an eager step, and all operators, until the block ends."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_mark_step(clock))
        stack.enter_context(_marked(clock, layers, "varlen_attention", ATTENTION))
        stack.enter_context(_marked(clock, layers.RotaryTables, "rotate", "rotary positions"))
        stack.enter_context(_marked(clock, decoder, "cross_entropy_sum", "head and loss"))
        for name, module in model.named_modules():
            block = RESIDUAL if isinstance(module, decoder.TransformerBlock) else None
            if part := block or MODULES.get(name.rpartition(".")[2]):
                stack.enter_context(_marked(clock, module, "forward", part))
        stack.enter_context(clock)
        yield


@contextlib.contextmanager
def mark_compiled_parts(clock: PartClock) -> Iterator[None]:
    """Measure a compiled step with ``clock`` in two parts: the operators that the graph calls, and the rest of it."""
    from torch._inductor.select_algorithm import extern_kernels

    with contextlib.ExitStack() as stack:
        stack.enter_context(_mark_step(clock))
        stack.enter_context(_marked(clock, train_step, "forward", "forward pass: fused operators", OTHER))
        for name in ("_grouped_forward", "_grouped_backward"):
            stack.enter_context(_marked(clock, cpu_attention, name, ATTENTION, OTHER))
        for name in sorted(PRODUCT_NAMES):
            stack.enter_context(_marked(clock, extern_kernels, name, "projections, head", PRODUCTS))
        yield


@contextlib.contextmanager
def _mark_step(clock: PartClock) -> Iterator[None]:
    with (
        _marked(clock, train_step.TrainStep, "_update", OPTIMIZER),
        _marked(clock, train_step.TrainStep, "_gradient_norm", CLIPPING),
        _marked(clock, nn.utils, "clip_grads_with_norm_", CLIPPING),
        _marked(clock, torch.Tensor, "backward", BACKWARD),
    ):
        yield


def _marked(
    clock: PartClock, owner: Any, name: str, part: str, kind: str = PYTHON
) -> contextlib.AbstractContextManager[Any]:
    original: Callable[..., Any] = getattr(owner, name)

    def marked(*arguments: Any, **options: Any) -> Any:
        with clock.measure(part, kind):
            return original(*arguments, **options)

    return mock.patch.object(owner, name, marked)


def _marked_batches(clock: PartClock, microbatches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    batches = iter(microbatches)
    while True:
        with clock.measure("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def table(parts: Sequence[PartTime]) -> str:
    """Return the parts as a table in Markdown, with the share of each and the sums of all."""
    whole = sum(part.total for part in parts)
    every = PartTime("all", tuple(sum(part.by_kind[kind] for part in parts) for kind in range(len(KINDS))))
    lines = [f"| part | share | ms | {' | '.join(KINDS)} |", "|---|---" + "|---" * (1 + len(KINDS)) + "|"]
    for part in (*parts, every):
        kinds = " | ".join(f"{milliseconds:.0f}" for milliseconds in part.by_kind)
        lines.append(f"| {part.part} | {100 * part.total / whole:.1f} % | {part.total:.0f} | {kinds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    child(Path(sys.argv[1]), compiled=sys.argv[2] == "compiled")
