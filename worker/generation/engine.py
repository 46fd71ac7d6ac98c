"""Generates for many tasks at once: one part of one prompt, then one token of every continuation, again and again.

Continuations without a seed are computed in one batch, which they join and leave at any time. The last bits of a sum
depend on the size of the batch, so the continuations of a prompt with a seed have a batch of their own: their text is
the same whatever else is computed.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainyard.contract.generation import GenerationTask, TokenLogprob
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.model.decoder import Decoder, SamplingParams
from trainyard.model.kv_cache import BatchKVCache, KVCache
from trainyard.worker.data.tokenizers import Tokenizer
from trainyard.worker.generation.chat import TemplateFailed, render
from trainyard.worker.generation.text import TextStream, decode, token_text

MAX_ROWS = 32
"""Continuations that are computed at once. Others wait."""

PREFILL_TOKENS = 512
"""Part of a prompt that is computed while the continuations wait."""

LOGPROBS_PREFILL_TOKENS = 64
"""The same if the logits of each position are needed: they take a vocabulary of memory each."""

NOT_FINITE = "the outputs of the model are not finite at this checkpoint: its training has diverged"

Emit = Callable[[dict[str, Any]], None]


@dataclass(eq=False)
class Continuation:
    """One choice of a task. ``last``: its newest token, which is not in the cache yet."""

    task: GenerationTask
    choice: int
    text: TextStream
    sampling: SamplingParams
    shown_before: int
    """Characters that come before the new text: those of an echoed prompt."""
    left: int
    tokens: int = 0
    last: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Those of tokens whose text was not emitted yet."""


@dataclass(eq=False)
class Prompt:
    """A prompt that waits, or is being computed. ``cache`` has its first ``done`` tokens."""

    task: GenerationTask
    number: int
    text: str | None
    ids: list[int]
    new_tokens: int
    has_bos: bool
    """Whether the first id was added to the text."""
    cache: KVCache | None = None
    done: int = 0
    shown: int = 0
    """Characters of its text whose log-probabilities were emitted."""

    @property
    def capacity(self) -> int:
        """Positions of a continuation."""
        return len(self.ids) + self.new_tokens


@dataclass(eq=False)
class DecodeBatch:
    """Continuations that are computed together; row i of the cache is that of ``rows[i]``."""

    cache: BatchKVCache
    rows: list[Continuation] = field(default_factory=list)


class Engine:
    """Generates with one model. ``emit`` takes the lines of `contract.generation`.

    ``max_positions``: how many positions of keys and values may be in memory. ``template``: the chat template, if any.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, emit: Emit, max_positions: int, template: str | None = None
    ) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._emit = emit
        self._max_positions = max_positions
        self._template = template
        self.device = model.lm_head.weight.device
        self._waiting: deque[Prompt] = deque()
        self._computed: Prompt | None = None
        self._shared = DecodeBatch(model.new_batch_cache())
        self._own: list[DecodeBatch] = []

    @property
    def cached_positions(self) -> int:
        """Positions of keys and values in memory, without those of a prompt that is being computed."""
        return sum(len(batch.rows) * batch.cache.capacity for batch in (self._shared, *self._own))

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._computed or self._shared.rows or self._own)

    def submit(self, task: GenerationTask) -> None:
        """Accept a task, or emit why it is rejected."""
        try:
            prompts = [self._prompt(task, number, given) for number, given in enumerate(self._given(task))]
        except TaskRejected as error:
            self._emit({"event": "rejected", "id": task.id, "pointer": error.pointer, "message": str(error)})
            return
        counts = [len(prompt.ids) for prompt in prompts]
        uses_template = task.messages is not None and self._template is not None
        accepted = {"event": "accepted", "id": task.id, "prompt_tokens": counts, "chat_template": uses_template}
        self._emit(accepted)
        self._waiting.extend(prompts)

    def cancel(self, task_id: str) -> None:
        """Cancel a task: its client has disconnected."""
        self._waiting = deque(prompt for prompt in self._waiting if prompt.task.id != task_id)
        if self._computed is not None and self._computed.task.id == task_id:
            self._computed = None
        for batch in (self._shared, *self._own):
            for row in reversed(range(len(batch.rows))):
                if batch.rows[row].task.id == task_id:
                    _remove(batch, row)
        self._own = [batch for batch in self._own if batch.rows]

    @torch.no_grad()
    def step(self) -> None:
        """Compute a part of one prompt, and one token of each continuation."""
        if self._computed is None and self._waiting and self._fits(self._waiting[0]):
            self._computed = self._waiting.popleft()
        if self._computed is not None:
            self._prefill(self._computed)
        for batch in (self._shared, *self._own):
            if batch.rows:
                self._decode(batch)
        self._own = [batch for batch in self._own if batch.rows]

    # Tasks

    def _given(self, task: GenerationTask) -> list[str | list[int]]:
        if task.messages is None:
            return task.prompts
        try:
            return [render(self._template, task.messages, self._tokenizer.bos, self._tokenizer.eos)]
        except TemplateFailed as error:
            raise TaskRejected("/messages", f"the chat template of the tokenizer rejects them: {error}") from error

    def _prompt(self, task: GenerationTask, number: int, given: str | list[int]) -> Prompt:
        pointer = "/messages" if task.messages is not None else "/prompt"
        pointer += f"/{number}" if len(task.prompts) > 1 else ""
        ids, has_bos = self._encode(given, pointer)
        limit = self._model.config.max_position_embeddings
        # The newest token is not in the cache: a prompt may fill all positions if one token is wanted.
        if len(ids) > limit - (task.max_new_tokens > 0):
            raise TaskRejected(pointer, f"has {len(ids):,} tokens, and the model has {limit:,} positions")
        new_tokens = min(task.max_new_tokens, limit - len(ids))
        if (len(ids) + new_tokens) * task.n > self._max_positions:
            message = f"{task.n} x {len(ids) + new_tokens:,} positions are needed, and the memory has room for "
            raise TaskRejected("/max_new_tokens", f"{message}{self._max_positions:,}")
        return Prompt(task, number, given if isinstance(given, str) else None, ids, new_tokens, has_bos)

    def _encode(self, given: str | list[int], pointer: str) -> tuple[list[int], bool]:
        vocabulary = self._model.config.vocab_size or 0
        if not isinstance(given, str):
            if any(token >= vocabulary for token in given):
                raise TaskRejected(pointer, f"has a token id of {vocabulary:,} or more, the size of the vocabulary")
            return given, False
        try:
            ids = [int(token) for token in self._tokenizer.encode_batch([given])[0]]
        except TokenizerInvalid as error:
            raise TaskRejected(pointer, f"cannot be tokenized: {str(error)[:200]}") from error
        # As in training, where each document begins with this token.
        has_bos = not ids or ids[0] != self._tokenizer.bos_id
        return ([self._tokenizer.bos_id, *ids] if has_bos else ids), has_bos

    def _fits(self, prompt: Prompt) -> bool:
        count = prompt.task.n if prompt.new_tokens else 0
        used = self.cached_positions
        if prompt.task.seed is None and count:
            # The rows of a batch have the capacity of its longest.
            rows = len(self._shared.rows)
            capacity = max(self._shared.cache.capacity, prompt.capacity)
            used += (rows + count) * capacity - rows * self._shared.cache.capacity
        else:
            used += max(1, count) * prompt.capacity
        rows = sum(len(batch.rows) for batch in (self._shared, *self._own))
        return rows == 0 or (rows + count <= MAX_ROWS and used <= self._max_positions)

    # Prompts

    def _prefill(self, prompt: Prompt) -> None:
        task = prompt.task
        if prompt.cache is None:
            prompt.cache = self._model.new_cache(1, len(prompt.ids))
            if task.echo:
                self._echo(prompt)
        wants_all = task.echo and task.logprobs is not None
        part = prompt.ids[prompt.done : prompt.done + (LOGPROBS_PREFILL_TOKENS if wants_all else PREFILL_TOKENS)]
        tokens = torch.tensor([part], device=self.device)
        if wants_all:
            logits = self._model(tokens, cache=prompt.cache, logits=True).logits[0]
            self._echo_logprobs(prompt, logits)
            newest = logits[-1:]
        else:
            newest = self._model.next_logits(tokens, prompt.cache)
        prompt.done += len(part)
        if prompt.done == len(prompt.ids):
            self._computed = None
            self._start(prompt, prompt.cache, newest)

    def _echo(self, prompt: Prompt) -> None:
        text = self._echoed(prompt)
        for choice in self._choices(prompt):
            self._emit({"event": "text", "id": prompt.task.id, "choice": choice, "text": text})

    def _echoed(self, prompt: Prompt) -> str:
        return prompt.text if prompt.text is not None else decode(self._tokenizer, prompt.ids)

    def _echo_logprobs(self, prompt: Prompt, logits: Tensor) -> None:
        """Emit the log-probabilities of the prompt's tokens that follow those of this part. ``logits`` [S, V]."""
        first = prompt.done + 1
        entries = []
        if prompt.done == 0 and not prompt.has_bos:
            entries.append(self._prompt_logprob(prompt, prompt.ids[0], None))
        for token, row in zip(prompt.ids[first : first + len(logits)], logits, strict=False):
            entries.append(self._prompt_logprob(prompt, token, row))
        for choice in self._choices(prompt):
            self._emit_text(prompt.task.id, choice, "", entries)

    def _prompt_logprob(self, prompt: Prompt, token: int, logits: Tensor | None) -> TokenLogprob:
        entry = self._logprob(prompt.task, token, logits, prompt.shown)
        prompt.shown += len(decode(self._tokenizer, [token]))
        return entry

    def _choices(self, prompt: Prompt) -> range:
        return range(prompt.number * prompt.task.n, (prompt.number + 1) * prompt.task.n)

    def _start(self, prompt: Prompt, cache: KVCache, logits: Tensor) -> None:
        """Choose the first token of each continuation after the prompt's ``logits`` [1, V]."""
        task = prompt.task
        shared = task.seed is None
        batch = self._shared if shared else DecodeBatch(self._model.new_batch_cache())
        before = len(self._echoed(prompt)) if task.echo else 0
        for choice in self._choices(prompt):
            generator = torch.Generator()
            if task.seed is None:
                generator.seed()
            else:
                generator.manual_seed((task.seed + choice) % (1 << 63))
            sampling = SamplingParams(task.temperature, task.top_p, task.top_k, generator)
            stream = TextStream(self._tokenizer, task.stop)
            row = Continuation(task, choice, stream, sampling, before, prompt.new_tokens)
            if prompt.new_tokens == 0:
                self._finish(row, "length")
            elif not torch.isfinite(logits).all():
                self._fail(row)
            elif not self._take(row, self._choose(row, logits[0]), logits[0]):
                batch.cache.add(cache, prompt.capacity)
                batch.rows.append(row)
        if not shared and batch.rows:
            self._own.append(batch)

    # Continuations

    def _decode(self, batch: DecodeBatch) -> None:
        tokens = torch.tensor([[row.last] for row in batch.rows], device=self.device)
        logits = self._model.decode_batch(tokens, batch.cache)
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        likeliest = logits.argmax(dim=-1).tolist()
        # From the last on: the last row takes the place of a removed one.
        for index in reversed(range(len(batch.rows))):
            row = batch.rows[index]
            if not finite[index]:
                self._fail(row)
                _remove(batch, index)
                continue
            greedy = row.sampling.temperature <= 0
            token = likeliest[index] if greedy else self._choose(row, logits[index])
            if self._take(row, token, logits[index]):
                _remove(batch, index)

    def _choose(self, row: Continuation, logits: Tensor) -> int:
        # On the CPU: its generator draws the same numbers on every host.
        return int(row.sampling.sample(logits[None].cpu()))

    def _take(self, row: Continuation, token: int, logits: Tensor) -> bool:
        """Add a token to the continuation, and return whether that ends it."""
        if token == self._tokenizer.eos_id:
            self._finish(row, "stop")
            return True
        row.last = token
        row.tokens += 1
        row.left -= 1
        if row.task.logprobs is not None:
            offset = row.shown_before + len(row.text.text)
            row.logprobs.append(self._logprob(row.task, token, logits, offset))
        piece = row.text.push(token)
        if row.text.stopped or row.left == 0:
            self._finish(row, "stop" if row.text.stopped else "length", piece)
            return True
        if piece:
            sent = row.shown_before + row.text.sent
            ready = list(itertools.takewhile(lambda entry: entry.offset < sent, row.logprobs))
            del row.logprobs[: len(ready)]
            self._emit_text(row.task.id, row.choice, piece, ready)
        return False

    def _finish(self, row: Continuation, reason: str, piece: str = "") -> None:
        piece += row.text.finish()
        if row.text.stopped:
            # The tokens of the stop string are not part of the text.
            end = row.shown_before + len(row.text.text)
            reason, row.logprobs = "stop", [entry for entry in row.logprobs if entry.offset < end]
        if piece or row.logprobs:
            self._emit_text(row.task.id, row.choice, piece, row.logprobs)
        finished = {"event": "finished", "choice": row.choice, "reason": reason, "tokens": row.tokens}
        self._emit({**finished, "id": row.task.id})

    def _fail(self, row: Continuation) -> None:
        self._emit({"event": "error", "id": row.task.id, "message": NOT_FINITE})

    def _emit_text(self, task_id: str, choice: int, text: str, logprobs: list[TokenLogprob]) -> None:
        line: dict[str, Any] = {"event": "text", "id": task_id, "choice": choice, "text": text}
        if logprobs:
            line["logprobs"] = [entry.model_dump() for entry in logprobs]
        self._emit(line)

    def _logprob(self, task: GenerationTask, token: int, logits: Tensor | None, offset: int) -> TokenLogprob:
        name = token_text(self._tokenizer, token)
        if logits is None:
            return TokenLogprob(token=name, logprob=None, top=None, offset=offset)
        logprobs = logits.log_softmax(dim=-1)
        values, ids = logprobs.topk(min(task.logprobs or 0, len(logprobs)))
        top = {token_text(self._tokenizer, int(one)): float(value) for one, value in zip(ids, values, strict=True)}
        return TokenLogprob(token=name, logprob=float(logprobs[token]), top=top or None, offset=offset)


class TaskRejected(ValueError):
    """The task cannot be done. ``pointer``: the field at fault."""

    def __init__(self, pointer: str, message: str) -> None:
        self.pointer = pointer
        super().__init__(message)


def _remove(batch: DecodeBatch, row: int) -> None:
    batch.cache.remove(row)
    batch.rows[row] = batch.rows[-1]
    batch.rows.pop()
