"""Text of many tasks at once: no text depends on the others, and no part of it breaks a character."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.conftest import Make
from tests.interop.conftest import make as make
from tests.model.shapes import small_decoder
from trainyard.contract.generation import ChatMessage, GenerationTask
from trainyard.model.decoder import Decoder
from trainyard.worker.checkpoint.export import ExportError, find_export_source
from trainyard.worker.data.tokenizers import ByteTokenizer, Tokenizer, train_tokenizer
from trainyard.worker.generation.chat import TemplateFailed, read_template, render
from trainyard.worker.generation.engine import MAX_ROWS, NOT_FINITE, Engine
from trainyard.worker.generation.loading import CannotGenerate, load_engine
from trainyard.worker.generation.text import TextStream

VOCABULARY = ByteTokenizer.vocab_size


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Lines(list[dict[str, Any]]):
    """The lines of an engine."""

    def of(self, task: str, event: str) -> list[dict[str, Any]]:
        return [line for line in self if line["id"] == task and line["event"] == event]

    def text(self, task: str, choice: int = 0) -> str:
        return "".join(line["text"] for line in self.of(task, "text") if line["choice"] == choice)

    def end(self, task: str, choice: int = 0) -> tuple[str, int]:
        [end] = [line for line in self.of(task, "finished") if line["choice"] == choice]
        return end["reason"], end["tokens"]

    def logprobs(self, task: str, choice: int = 0) -> list[dict[str, Any]]:
        texts = [line for line in self.of(task, "text") if line["choice"] == choice]
        return [entry for line in texts for entry in line.get("logprobs", ())]


@pytest.fixture(scope="module")
def model() -> Decoder:
    made = small_decoder(seed=3, vocab_size=VOCABULARY, max_position_embeddings=700)
    with torch.no_grad():
        # Logits far apart, so that the likeliest token is the same in any batch.
        made.model.norm.weight.mul_(20)
    return made.eval()


def engine(model: Decoder, max_positions: int = 100_000, template: str | None = None) -> tuple[Engine, Lines]:
    lines = Lines()
    return Engine(model, ByteTokenizer("tokens"), lines.append, max_positions, template), lines


def finish(engine: Engine) -> None:
    for _ in range(5000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("it does not end")


def generated(model: Decoder, **task: Any) -> Lines:
    made, lines = engine(model)
    made.submit(GenerationTask(**{"id": "t", "prompts": ["one"], **task}))
    finish(made)
    return lines


def reference(model: Decoder, prompt: str, tokens: int) -> str:
    """By the simple loop of the model."""
    tokenizer = ByteTokenizer("tokens")
    ids = [1, *map(int, tokenizer.encode_batch([prompt])[0])]
    output = model.generate(torch.tensor([ids]), max_new_tokens=tokens, eos_token_id=2)[0, len(ids) :].tolist()
    return tokenizer.decode([token for token in output if token != 2])


def test_many_at_once_get_the_text_that_each_gets_alone(model: Decoder) -> None:
    prompts = ["a", "two words", "x" * 600, "\u4e2d\u6587", "", *(f"prompt {n}" for n in range(40))]
    made, lines = engine(model)
    for n, prompt in enumerate(prompts):
        made.submit(GenerationTask(id=str(n), prompts=[prompt], max_new_tokens=5 + n, temperature=0))
        made.step()
    finish(made)
    for n, prompt in enumerate(prompts):
        assert lines.text(str(n)) == reference(model, prompt, 5 + n), prompt
        assert lines.of(str(n), "accepted")[0]["prompt_tokens"] == [1 + len(prompt.encode())]


def test_a_seed_gives_the_same_text_whatever_else_is_computed(model: Decoder) -> None:
    task = {"prompts": ["seeded"], "max_new_tokens": 60, "temperature": 1.3, "top_p": 0.9, "seed": 11, "n": 3}
    alone = generated(model, **task)
    made, lines = engine(model)
    for n in range(6):
        made.submit(GenerationTask(id=f"other{n}", prompts=["other"], max_new_tokens=30 + n))
        made.step()
    made.submit(GenerationTask(id="t", **task))
    made.submit(GenerationTask(id="last", prompts=["x"], max_new_tokens=3, seed=11))
    finish(made)
    for choice in range(3):
        assert lines.text("t", choice) == alone.text("t", choice)
    assert len({alone.text("t", choice) for choice in range(3)}) == 3
    assert generated(model, **{**task, "seed": 12, "n": 1}).text("t") == alone.text("t", 1), "choice i has seed + i"


def test_without_a_seed_each_text_is_another(model: Decoder) -> None:
    lines = generated(model, max_new_tokens=40, temperature=2.0, n=4)
    assert len({lines.text("t", choice) for choice in range(4)}) == 4


def test_top_k_1_is_greedy(model: Decoder) -> None:
    assert generated(model, max_new_tokens=20, top_k=1).text("t") == reference(model, "one", 20)


def test_a_stop_text_ends_the_text_and_is_never_shown_in_part(model: Decoder) -> None:
    whole = reference(model, "one", 60)
    stop = whole[20:24]
    lines = generated(model, max_new_tokens=60, temperature=0, stop=[stop, "never there"], logprobs=1)
    expected = whole[: whole.index(stop)]
    assert lines.text("t") == expected
    assert lines.end("t")[0] == "stop"
    shown = ""
    for line in lines.of("t", "text"):
        shown += line["text"]
        assert expected.startswith(shown)
    assert all(entry["offset"] < len(expected) for entry in lines.logprobs("t"))


def test_the_end_token_ends_the_text_and_is_not_part_of_it(model: Decoder) -> None:
    output = model.generate(torch.tensor([[1, 10]]), max_new_tokens=9)[0, 2:].tolist()
    tokenizer = ByteTokenizer("tokens")
    tokenizer.eos_id = output[5]
    lines = Lines()
    made = Engine(model, tokenizer, lines.append, 1000)
    made.submit(GenerationTask(id="t", prompts=[[1, 10]], max_new_tokens=9, temperature=0, logprobs=0))
    finish(made)
    length = output.index(output[5])
    assert lines.end("t") == ("stop", length)
    assert lines.text("t") == tokenizer.decode(output[:length])
    assert len(lines.logprobs("t")) == length


def test_prompts_are_continued_in_their_order_and_echoed(model: Decoder) -> None:
    lines = generated(model, prompts=["first", "second"], n=2, echo=True, max_new_tokens=4, temperature=0)
    for choice, prompt in enumerate(("first", "first", "second", "second")):
        assert lines.text("t", choice) == prompt + reference(model, prompt, 4)


def test_log_probabilities_are_those_of_the_model(model: Decoder) -> None:
    prompt = "x" * 150 + "\u4e2d"
    lines = generated(model, prompts=[prompt], echo=True, logprobs=2, max_new_tokens=5, temperature=0)
    entries = lines.logprobs("t")
    ids = [1, *(3 + byte for byte in prompt.encode())]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits is not None
    expected = logits[0].log_softmax(-1)
    assert len(entries) == len(ids) - 1 + lines.end("t")[1]
    for position, token in enumerate(ids[1:]):
        assert entries[position]["logprob"] == pytest.approx(float(expected[position, token]), abs=1e-3)
        top = expected[position].topk(2).values.tolist()
        assert sorted(entries[position]["top"].values(), reverse=True) == pytest.approx(top, abs=1e-3)
    assert [entry["offset"] for entry in entries[:3]] == [0, 1, 2]
    assert (entries[0]["token"], entries[150]["token"]) == ("x", f"token_id:{3 + 0xE4}")
    first_new = entries[len(ids) - 1]
    assert first_new["logprob"] == pytest.approx(float(expected[-1].max()), abs=1e-3)
    assert first_new["offset"] == len(prompt)


def test_a_text_is_scored_without_a_new_token(model: Decoder) -> None:
    lines = generated(model, prompts=[[1, 10, 11]], echo=True, logprobs=0, max_new_tokens=0)
    entries = lines.logprobs("t")
    assert [entry["logprob"] is None for entry in entries] == [True, False, False]
    assert [entry["top"] for entry in entries] == [None] * 3
    assert lines.end("t") == ("length", 0)


def test_what_cannot_be_done_is_rejected_with_its_field(model: Decoder) -> None:
    made, lines = engine(model, max_positions=500)
    tasks: dict[str, dict[str, Any]] = {
        "/prompt": {"prompts": ["x" * 701]},
        "/prompt/1": {"prompts": [[3], [VOCABULARY]]},
        "/max_new_tokens": {"prompts": ["x"], "max_new_tokens": 600},
    }
    for pointer, task in tasks.items():
        made.submit(GenerationTask(id=pointer, **task))
    assert not made.busy
    assert [line["pointer"] for line in lines] == [*tasks]
    made.submit(GenerationTask(id="fits", prompts=["x"], max_new_tokens=3))
    finish(made)
    assert lines.end("fits")[1] <= 3


def test_a_task_can_be_cancelled_at_any_point(model: Decoder) -> None:
    made, lines = engine(model)
    for n in range(MAX_ROWS + 3):
        made.submit(GenerationTask(id=f"{n}", prompts=["p"], max_new_tokens=500, seed=1 if n % 2 else None))
    made.submit(GenerationTask(id="kept", prompts=["kept"], max_new_tokens=12, temperature=0))
    for _ in range(MAX_ROWS + 3):
        made.step()
    assert lines.text("kept") == "", "there is no place"
    for n in range(MAX_ROWS + 3):
        made.cancel(f"{n}")
    finish(made)
    assert lines.text("kept") == reference(model, "kept", 12)


def test_a_diverged_model_is_an_error_of_the_task() -> None:
    diverged = small_decoder(vocab_size=VOCABULARY)
    with torch.no_grad():
        diverged.model.norm.weight.fill_(float("nan"))
    lines = generated(diverged)
    assert [line["message"] for line in lines.of("t", "error")] == [NOT_FINITE]


def test_memory_is_not_more_than_allowed(model: Decoder) -> None:
    made, lines = engine(model, max_positions=256)
    for n in range(9):
        made.submit(GenerationTask(id=f"{n}", prompts=["p" * 50], max_new_tokens=20, seed=n if n % 2 else None))
    most = 0
    while made.busy:
        made.step()
        most = max(most, made.cached_positions)
    assert 128 <= most <= 256
    assert all(lines.end(f"{n}")[1] <= 20 for n in range(9))


# Text


@pytest.mark.parametrize("trained", [False, True], ids=["byte", "bpe"])
def test_no_part_of_a_text_breaks_a_character(tmp_path: Path, trained: bool) -> None:
    tokenizer: Tokenizer = ByteTokenizer("tokens")
    if trained:
        from trainyard.worker.data.tokenizers import load_tokenizer

        train_tokenizer(["some text"], 260, tmp_path)
        tokenizer = load_tokenizer(str(tmp_path))
    text = "na\u00efve \u4e2d\u6587 \U0001f600 and then " * 9
    stream, parts = TextStream(tokenizer, ["\u6587\U0001f601"]), list[str]()
    for token in tokenizer.encode_batch([text])[0]:
        parts.append(stream.push(int(token)))
    parts.append(stream.finish())
    assert "".join(parts) == text
    assert "\ufffd" not in text
    assert not any("\ufffd" in part for part in parts)
    assert max(map(len, parts)) <= 8


def test_bytes_that_are_no_text_are_shown_and_do_not_hold_the_rest_back() -> None:
    stream = TextStream(ByteTokenizer(), [])
    shown = "".join(stream.push(3 + 0xE4) for _ in range(50))
    assert len(shown) >= 45
    assert "".join([shown, stream.push(3 + ord("a")), stream.finish()]) == "\ufffd" * 50 + "a"


# Conversations

TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="ho")]


def test_a_conversation_is_put_into_the_template(model: Decoder) -> None:
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n<|im_start|>assistant\n"
    assert render(TEMPLATE, TURNS, "<|im_start|>", "<|im_end|>") == expected
    assert render(None, TURNS, "<|im_start|>", "<|im_end|>") == "hi\nho"
    made, lines = engine(model, template=TEMPLATE)
    made.submit(GenerationTask(id="t", messages=TURNS, max_new_tokens=3))
    finish(made)
    [accepted] = lines.of("t", "accepted")
    # Special tokens are one token each, and no second one begins the prompt.
    assert accepted["prompt_tokens"] == [len("user\nhi\nassistant\nho\nassistant\n") + 5]
    assert accepted["chat_template"]


FAILING = ["{{ raise_exception('roles') }}", "{% if %}", "{{ 1 / 0 }}", "{{ messages.x.y }}"]


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_reported(model: Decoder, template: str) -> None:
    with pytest.raises(TemplateFailed):
        render(template, TURNS, "", "")
    made, lines = engine(model, template=template)
    made.submit(GenerationTask(id="t", messages=TURNS))
    assert lines.of("t", "rejected")[0]["pointer"] == "/messages"


def test_a_template_reaches_no_python_objects() -> None:
    with pytest.raises(TemplateFailed):
        render("{{ ''.__class__.__mro__[1].__subclasses__() }}", TURNS, "", "")


def test_the_template_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    train_tokenizer(["text"], 260, tmp_path)
    assert read_template("byte") is None
    assert read_template(str(tmp_path)) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    for given, expected in ((TEMPLATE, TEMPLATE), (named, "yes"), (7, None)):
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": given}))
        assert read_template(str(tmp_path)) == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_template(str(tmp_path)) == "file"


# Loading


def test_a_checkpoint_is_loaded_as_it_was_saved(make: Make) -> None:
    shapes: list[dict[str, Any]] = [{}, {"tie_word_embeddings": False}, {"use_moe": True, "num_experts": 4}]
    for step, changes in enumerate(shapes):
        run, trained = make(step=step, **changes)
        lines = Lines()
        path = run.artifacts(None).checkpoint(step)
        loaded = load_engine(path, "byte", 1 << 24, lines.append)
        loaded.submit(GenerationTask(id="t", prompts=["p"], max_new_tokens=12, temperature=0))
        finish(loaded)
        assert lines.text("t") == reference(trained, "p", 12)


def test_a_checkpoint_that_cannot_be_used_has_its_reason(make: Make, tmp_path: Path) -> None:
    run, _ = make()
    path = run.artifacts(None).checkpoint(3)
    train_tokenizer(["text"], 260, tmp_path / "other")
    with pytest.raises(CannotGenerate, match="not the one"):
        load_engine(path, str(tmp_path / "other"), 1 << 24, lambda _: None)
    with pytest.raises(CannotGenerate, match=r"no tokenizer\.json"):
        load_engine(path, str(tmp_path), 1 << 24, lambda _: None)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CannotGenerate, match="sha256"):
        load_engine(path, "byte", 1 << 24, lambda _: None)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"tie_word_embeddings": False}])
def test_weights_that_do_not_fit_their_config_are_an_export_error(make: Make, change: dict[str, Any]) -> None:
    run, _ = make()
    source = find_export_source(run.artifacts(None).checkpoint(3))
    identity = replace(source.state.identity, model={**source.state.identity.model, **change})
    with pytest.raises(ExportError, match="cannot be loaded"):
        replace(source, state=replace(source.state, identity=identity)).load_model(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_generates_on_a_gpu(make: Make) -> None:
    run, trained = make()
    lines = Lines()
    loaded = load_engine(run.artifacts(None).checkpoint(3), "byte", 1 << 24, lines.append)
    for n in range(3):
        loaded.submit(GenerationTask(id=f"{n}", prompts=["p" * (n + 1)], max_new_tokens=12, temperature=0))
    finish(loaded)
    for n in range(3):
        assert lines.text(f"{n}") == reference(trained, "p" * (n + 1), 12)
    assert loaded.device.type == "cuda"
