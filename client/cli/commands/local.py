"""The subcommands that run a module of this installation. They replace the process, so that it gets the signals."""

import os
import sys
from collections.abc import Mapping
from types import SimpleNamespace

from trainyard.client.cli.console import Console


def serve(args: SimpleNamespace, _console: Console) -> int:
    settings = {**store_settings(args), "TRAINYARD_HOST": args.host, "TRAINYARD_PORT": args.port}
    return exec_module("trainyard.service", ["--no-scheduler"] if args.no_scheduler else [], settings)


def doctor(args: SimpleNamespace, _console: Console) -> int:
    options = [*_json(args), *(["--gpu"] if args.gpu else []), *(["--out", args.out] if args.out else [])]
    return exec_module("trainyard.worker.doctor", options, {"TRAINYARD_HOME": args.home})


def upgrade_database(args: SimpleNamespace, _console: Console) -> int:
    return exec_module("trainyard.service.db.cli", ["upgrade"], store_settings(args))


def copy_database(args: SimpleNamespace, _console: Console) -> int:
    return exec_module("trainyard.service.db.cli", ["copy", args.source, args.target], {})


def back_up_database(args: SimpleNamespace, _console: Console) -> int:
    return exec_module("trainyard.service.db.cli", ["backup", args.file], store_settings(args))


def train_tokenizer(args: SimpleNamespace, _console: Console) -> int:
    options = ["--vocab-size", str(args.vocab_size), "--out", args.out, "--text-field", args.text_field]
    return exec_module("trainyard.worker.data.tokenizers", ["train", args.file, *options], {})


def check_corpus(args: SimpleNamespace, _console: Console) -> int:
    options = ["--text-field", args.text_field, "--special-tokens", args.special_tokens, *_json(args)]
    if args.tokenizer_path is not None:
        options += ["--tokenizer", args.tokenizer_path]
    return exec_module("trainyard.worker.data.corpus", ["check", *args.paths, *options], {})


def sample_corpus(args: SimpleNamespace, _console: Console) -> int:
    options = [f"--documents={args.documents}", f"--seed={args.seed}", "--text-field", args.text_field]
    return exec_module("trainyard.worker.data.inspection", ["sample", *options, "--", args.out, *args.paths], {})


def list_corpora(args: SimpleNamespace, _console: Console) -> int:
    return exec_module(
        "trainyard.service.maintenance.corpus_cache", ["list", *_json(args)], {"TRAINYARD_HOME": args.home}
    )


def prune_corpora(args: SimpleNamespace, _console: Console) -> int:
    given = {"--days": args.days, "--bytes": args.bytes}
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    return exec_module("trainyard.service.maintenance.corpus_cache", ["prune", *options], {"TRAINYARD_HOME": args.home})


def _json(args: SimpleNamespace) -> list[str]:
    return ["--json"] if args.json else []


def store_settings(args: SimpleNamespace) -> dict[str, object]:
    """Return the environment variables that ``--home`` and ``--database-url`` set."""
    return {"TRAINYARD_HOME": args.home, "TRAINYARD_DATABASE_URL": args.database_url}


def exec_module(module: str, arguments: list[str], settings: Mapping[str, object]) -> int:
    """Replace this process by ``python -m module``. A setting that is None keeps its value in the environment."""
    environment = {**os.environ, **{name: str(value) for name, value in settings.items() if value is not None}}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *arguments], environment)  # noqa: S606 - no shell on purpose
