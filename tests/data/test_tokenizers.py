"""Text to ids and back: control tokens in a text are text; training is deterministic; foreign tokenizers load."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.data.texts import docstrings, write_jsonl
from trainyard.contract.tokenizer_info import SPECIAL_TOKENS, TokenizerInvalid, vocabulary_size
from trainyard.worker.checkpoint.export import byte_level_tokenizer
from trainyard.worker.data import corpus as corpus_module
from trainyard.worker.data import tokenization
from trainyard.worker.data import tokenizers as module
from trainyard.worker.data.tokenizers import (
    MAX_WORD,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    main,
    split_long_words,
    train_tokenizer,
)

NASTY = (
    "<|im_end|>",
    "before<|im_start|>after",
    "<|endoftext|>" * 3,
    "  <|im_end|>\n",
    "a<|im_end|",
    "\0 nul",
    "emoji \U0001f600 and \u4e2d\u6587",
    " leading and trailing ",
    "\u2028",
)


def round_trip(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode_batch(texts)]


def test_byte_tokenizer_is_bytes_behind_three_control_tokens() -> None:
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 259)
    assert [ids.tolist() for ids in tokenizer.encode_batch(["Az", "é"])] == [[68, 125], [198, 172]]
    assert tokenizer.decode([1, 68, 125, 2, 0, 0]) == "Az"
    assert tokenizer.decode([198, 68, 999, -1]) == "\ufffdA"


@settings(deadline=None)
@given(st.text())
def test_byte_tokenizer_round_trip(text: str) -> None:
    clean = text.encode(errors="replace").decode()
    assert round_trip(ByteTokenizer(), [clean]) == [clean]


def test_trained_tokenizer_round_trip_on_real_text(trained: Path) -> None:
    texts = list(docstrings(10))
    assert round_trip(load_tokenizer(str(trained)), texts) == texts


@pytest.mark.parametrize("text", NASTY)
def test_control_tokens_in_a_text_are_text(text: str, trained: Path) -> None:
    tokenizer = load_tokenizer(str(trained))
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids)
    assert not set(ids.tolist()) & {0, 1, 2}
    assert tokenizer.decode(ids.tolist()) == text


def test_decode_leaves_control_tokens_out(trained: Path) -> None:
    tokenizer = load_tokenizer(str(trained))
    (ids,) = tokenizer.encode_batch(["a text"])
    assert tokenizer.decode([1, *ids.tolist(), 2, 0, 0, 10**6]) == "a text"


def test_trained_files_are_what_transformers_reads(trained: Path) -> None:
    described = json.loads((trained / "tokenizer.json").read_text())
    assert [(t["id"], t["content"], t["special"]) for t in described["added_tokens"]] == [
        (i, name, True) for i, name in enumerate(SPECIAL_TOKENS)
    ]
    assert described["model"]["type"] == "BPE"
    config = json.loads((trained / "tokenizer_config.json").read_text())
    assert [config[f"{name}_token"] for name in ("pad", "bos", "eos")] == list(SPECIAL_TOKENS)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert vocabulary_size(str(trained)) == load_tokenizer(str(trained)).vocab_size == 600


def test_every_byte_has_a_token(tmp_path: Path) -> None:
    assert train_tokenizer(["aaaa"], 6400, tmp_path) < 6400
    tokenizer = load_tokenizer(str(tmp_path))
    text = "".join(map(chr, range(1, 0x250))) + "\U0001f9ea"
    assert round_trip(tokenizer, [text]) == [text]


def test_training_is_deterministic_over_processes(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", docstrings(15))
    outs = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [
            sys.executable,
            "-m",
            "trainyard.worker.data.tokenizers",
            "train",
            str(corpus),
            "--vocab-size",
            "400",
        ]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*command, "--out", str(out)], check=True, env=environment, capture_output=True)
        outs.append({file.name: file.read_bytes() for file in sorted(out.iterdir())})
    assert outs[0] == outs[1]
    assert set(outs[0]) == {"tokenizer.json", "tokenizer_config.json"}


def test_fingerprint_follows_the_files(trained: Path, tmp_path: Path) -> None:
    first = load_tokenizer(str(trained)).fingerprint
    assert load_tokenizer(str(trained)).fingerprint == first != load_tokenizer("byte").fingerprint
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_tokenizer(str(tmp_path)).fingerprint == first
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    other = load_tokenizer(str(tmp_path))
    assert other.eos_id == 0
    assert other.fingerprint != first


def saved(tokenizer: tokenizers.Tokenizer, out: Path, config: dict[str, Any] | None = None) -> Tokenizer:
    (out / "tokenizer.json").write_text(tokenizer.to_str())
    if config is not None:
        (out / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(out))


def unigram() -> tokenizers.Tokenizer:
    """A model that would find its control tokens in its own vocabulary."""
    scored = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "abcs<>/ \u2581")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_unigram_never_turns_text_into_control(tmp_path: Path) -> None:
    tokenizer = unigram()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    assert 2 in tokenizer.encode("ab</s>").ids  # as it would have been
    loaded = saved(tokenizer, tmp_path, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 2)
    (ids,) = loaded.encode_batch(["ab</s>"])
    assert not set(ids.tolist()) & {1, 2}
    assert loaded.decode(ids.tolist()) == "ab</s>"


def test_word_model_keeps_its_unknown_token_out_of_reach(tmp_path: Path) -> None:
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "cat": 4}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    loaded = saved(tokenizer, tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 0)
    assert [ids.tolist() for ids in loaded.encode_batch(["cat [SEP] dog"])] == [[4, 3, 3]]


def bpe(*added: str) -> tokenizers.Tokenizer:
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def test_one_end_token_serves_for_both_as_in_gpt2(tmp_path: Path) -> None:
    loaded = saved(bpe("<|endoftext|>"), tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (256, 256, 256)
    assert loaded.vocab_size == 257


def test_added_tokens_that_are_not_special_always_match(tmp_path: Path) -> None:
    tokenizer = bpe("<|endoftext|>")
    tokenizer.add_tokens(["    ", "<think>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    text = "a    <think>b</think><|endoftext|>"
    for mode, special in (("text", False), ("tokens", True)):
        loaded = load_tokenizer(str(tmp_path), mode)  # type: ignore[arg-type]
        (ids,) = loaded.encode_batch([text])
        assert ids.tolist().count(257) == ids.tolist().count(258) == 1
        assert (256 in ids.tolist()) is special
        # What is decoded is the text, without the special tokens.
        assert loaded.decode(ids.tolist()) == (text.removesuffix("<|endoftext|>") if special else text)


MARKED = (
    "<|im_start|>a text<|im_end|> <|im_start|>another one<|im_end|>",
    "<|im_start|><|im_start|><|endoftext|>",
    " <|im_end|>\n<|im_end|> <think>\n\n</think> gradient gradients ungradient <|im_end",
    "<|im_start|>\u4e2d\u6587 \U0001f600<|im_end|>",
    "plain text, no mark",
    "",
)


def minimind_like(out: Path) -> Path:
    """A tokenizer as MiniMind's: three special tokens, words that were added, one of which merges also make."""
    train_tokenizer([*docstrings(10), "gradient\ngradients\n" * 500], 600, out)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.token_to_id("gradient") is not None
    tokenizer.add_tokens(["<think>", "</think>", "gradient"])
    (out / "tokenizer.json").write_text(tokenizer.to_str())
    return out


def test_ids_are_those_of_the_library_and_of_minimind(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = minimind_like(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    minimind = transformers.AutoTokenizer.from_pretrained(folder)
    chooser = random.Random(7)
    words = [*MARKED, *docstrings(10)[:40], "<|im_start|>", "<|im_end|>", "<|endoftext|>", " ", "\n"]
    texts = [*MARKED, *("".join(chooser.choices(words, k=6)) for _ in range(200))]
    ids = [found.tolist() for found in load_tokenizer(str(folder), "tokens").encode_batch(texts)]
    assert ids == [library.encode(text, add_special_tokens=False).ids for text in texts]
    # MiniMind's PretrainDataset: the ids of the text, between BOS and EOS.
    assert ids == [minimind(text, add_special_tokens=False).input_ids for text in texts]
    assert {1, 2} < set(ids[0])


def test_a_tokenizer_whose_merges_make_an_added_word_loads(tmp_path: Path) -> None:
    loaded = load_tokenizer(str(minimind_like(tmp_path)))
    assert round_trip(loaded, list(MARKED)) == list(MARKED)
    assert loaded.matching == "added"
    for ids in loaded.encode_batch(MARKED):
        assert not {0, 1, 2} & set(ids.tolist())


def test_a_special_token_that_merges_make_stays_out_of_reach(tmp_path: Path) -> None:
    train_tokenizer([*docstrings(10), "gradient\ngradients\n" * 500], 600, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["gradient"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    number = tokenizer.token_to_id("gradient")
    texts = ["gradient", "gradients ungradient", "a gradient"]
    hidden = load_tokenizer(str(tmp_path))
    assert number not in {i for ids in hidden.encode_batch(texts) for i in ids.tolist()}
    assert round_trip(hidden, texts) == texts
    as_token = load_tokenizer(str(tmp_path), "tokens")
    assert [ids.tolist() for ids in as_token.encode_batch(texts)] == [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("text", MARKED)
def test_the_byte_tokenizer_reads_special_tokens_as_its_export_does(text: str) -> None:
    (ids,) = load_tokenizer("byte", "tokens").encode_batch([text])
    assert ids.tolist() == byte_level_tokenizer().encode(text, add_special_tokens=False).ids


def test_what_is_added_around_texts_and_cut_or_padded_is_not(tmp_path: Path) -> None:
    tokenizer = bpe("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    loaded = saved(tokenizer, tmp_path)
    assert [len(ids) for ids in loaded.encode_batch(["a", "a longer text"])] == [1, 13]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json in"),
        ({"tokenizer.json": "{"}, "is not a tokenizer.json"),
        ({"tokenizer.json": "[]"}, "is not a tokenizer.json"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}}}'}, "is not a tokenizer.json"),
        ({"tokenizer.json": bpe().to_str()}, "neither a beginning nor an end token"),
        ({"tokenizer.json": bpe("<s>").to_str(), "tokenizer_config.json": "{"}, "cannot be read"),
        ({"tokenizer.json": bpe("<s>").to_str(), "tokenizer_config.json": "[]"}, "must hold a JSON object"),
        (
            {"tokenizer.json": bpe("<s>").to_str(), "tokenizer_config.json": '{"eos_token": "<gone>"}'},
            "eos_token of tokenizer_config.json is not in the vocabulary",
        ),
    ],
)
def test_what_cannot_be_used_is_said(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerInvalid, match=message):
        load_tokenizer(str(tmp_path))


def test_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"body": "some text of some words"}\nbroken\n')
    out = tmp_path / "new" / "tokenizer"
    assert main(["train", str(corpus), "--vocab-size", "300", "--out", str(out), "--text-field", "body"]) == 0
    printed = capsys.readouterr()
    assert "tokens from 1 document\n" in printed.out
    assert "1 bad line: line 2: not JSON" in printed.err
    assert "300 were requested" in printed.err
    assert load_tokenizer(str(out)).vocab_size < 300


def test_an_unbroken_word_is_trained_on_in_parts() -> None:
    random = Random(1)
    word = "".join(random.choices("abcdefghij", k=100_000))
    parts = list(split_long_words(f"a {word} b"))
    assert "".join(parts) == f"a {word} b"
    assert max(len(run) for part in parts for run in part.split()) <= MAX_WORD
    assert list(split_long_words("a b\n")) == ["a b\n"], "an ordinary text stays whole, so its tokenizer is that of 0.1"
    gap = list(split_long_words(" " * 2500))
    assert [len(part) for part in gap] == [1000, 1000, 500]


def test_command_prints_its_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "some text of some words"}\n' * 3)
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["train", str(corpus), "--vocab-size", "300", "--out", str(tmp_path / "t")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("read 1 document")
    assert "read 3 documents, 100 % of the file" in lines
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("", "holds no document"), ('{"words": "a"}\n', "no 'text' in the object")],
)
def test_command_fails_with_one(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    if content is not None:
        corpus.write_text(content)
    assert main(["train", str(corpus), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["train", "f"], ["train", "f", "--out", "o", "--vocab-size", "258"], ["learn", "f", "--out", "o"]],
)
def test_wrong_usage_ends_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def backtracking(folder: Path, pattern: str) -> Path:
    """A tokenizer whose pre-tokenizer splits by ``pattern``."""
    tokenizer = bpe("<s>")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def test_an_expression_that_backtracks_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(backtracking(tmp_path, r"(x+x+)+y")))
    assert len(tokenizer.encode_batch(["xy"])) == 1
    with pytest.raises(TokenizerInvalid, match=r"the regular expression '\(x\+x\+\)\+y' of .*json backtracks: .*retry"):
        tokenizer.encode_batch(["x" * 3000])


def test_a_batch_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(backtracking(tmp_path, r"(x+x+)+y")))
    ended = threading.Event()
    monkeypatch.setattr(tokenization, "ENCODE_SECONDS", 0.0)
    monkeypatch.setattr(type(tokenizer), "encode_batch", lambda *_: ended.wait(60) and [])
    file = write_jsonl(tmp_path / "c.jsonl", ["a", "b"])
    with pytest.raises(TokenizerInvalid, match=r"'\(x\+x\+\)\+y' of the tokenizer backtracks: lines 1 to 2 took more"):
        corpus_module.open_corpus(file, tokenizer, cache=tmp_path / "cache")
    ended.set()
