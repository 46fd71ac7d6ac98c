"""The subcommands that run a program of this installation: they become it, so signals and exit codes are its own."""

import os
import sys
from collections.abc import Mapping
from types import SimpleNamespace

from trainyard.client.cli.console import Console


def serve(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard serve`: ``python -m trainyard.service``."""
    settings = {**store_settings(args), "TRAINYARD_HOST": args.host, "TRAINYARD_PORT": args.port}
    return become("trainyard.service", ["--no-scheduler"] if args.no_scheduler else [], settings)


def upgrade_database(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard db upgrade`: ``python -m trainyard.service.db.cli upgrade``."""
    return become("trainyard.service.db.cli", ["upgrade"], store_settings(args))


def copy_database(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard db copy`: ``python -m trainyard.service.db.cli copy``."""
    return become("trainyard.service.db.cli", ["copy", args.source, args.target], {})


def back_up_database(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard db backup`: ``python -m trainyard.service.db.cli backup``."""
    return become("trainyard.service.db.cli", ["backup", args.file], store_settings(args))


def train_tokenizer(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard tokenizer train`: ``python -m trainyard.worker.data.tokenizers train``."""
    options = ["--vocab-size", str(args.vocab_size), "--out", args.out, "--text-field", args.text_field]
    return become("trainyard.worker.data.tokenizers", ["train", args.file, *options], {})


def check_corpus(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard corpus check`: ``python -m trainyard.worker.data.corpus check``."""
    return become(
        "trainyard.worker.data.corpus", ["check", args.file, "--text-field", args.text_field, *_json(args)], {}
    )


def list_corpora(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard corpus list`: ``python -m trainyard.service.maintenance.corpus_cache list``."""
    return become("trainyard.service.maintenance.corpus_cache", ["list", *_json(args)], {"TRAINYARD_HOME": args.home})


def prune_corpora(args: SimpleNamespace, _console: Console) -> int:
    """`trainyard corpus prune`: ``python -m trainyard.service.maintenance.corpus_cache prune``."""
    given = {"--days": args.days, "--bytes": args.bytes}
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    return become("trainyard.service.maintenance.corpus_cache", ["prune", *options], {"TRAINYARD_HOME": args.home})


def _json(args: SimpleNamespace) -> list[str]:
    return ["--json"] if args.json else []


def store_settings(args: SimpleNamespace) -> dict[str, object]:
    """The environment variables that the options stand for."""
    return {"TRAINYARD_HOME": args.home, "TRAINYARD_DATABASE_URL": args.database_url}


def become(module: str, arguments: list[str], settings: Mapping[str, object]) -> int:
    """Replace this process by ``python -m module``. Settings that are None keep what the environment says."""
    environment = {**os.environ, **{name: str(value) for name, value in settings.items() if value is not None}}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *arguments], environment)  # noqa: S606 - no shell on purpose
