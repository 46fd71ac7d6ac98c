"""The commands of `trainyard` and their options. Nothing heavy is imported here, so that ``--help`` is quick.

Each command names the function that runs it as "module:function". That module is imported when the command runs.
"""

import math
from collections.abc import Callable
from importlib import import_module
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from trainyard.client.cli.options import Option, option_names
from trainyard.contract.scopes import Scope

if TYPE_CHECKING:
    from trainyard.client.cli.console import Console

SUBMIT = "submit"
PLAN = "plan"


class Command(click.Command):
    """A command whose function takes the parsed options and a console, and returns the exit code."""

    def __init__(self, name: str, run: str, explained: str, *params: click.Parameter, **settings: Any) -> None:
        super().__init__(name, help=explained, short_help=explained, params=list(params), **settings)
        self._run = run

    def runner(self) -> Callable[[SimpleNamespace, "Console"], int]:
        """Import and return the function of this command."""
        module, _, name = self._run.partition(":")
        function: Callable[[SimpleNamespace, Console], int] = getattr(import_module(f"trainyard.client.{module}"), name)
        return function

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words. Raises click.UsageError, always with its context: click's parser omits it for some."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: click.Context) -> int:
        """Run the command."""
        return self.runner()(SimpleNamespace(**ctx.params), ctx.obj)


class SpecCommand(Command):
    """`submit` or `plan`: has one more option for each leaf of the job spec."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the options. Those of the spec need pydantic, which is too slow for completion."""
        own = super().get_params(ctx)
        if ctx.resilient_parsing:
            return own
        from trainyard.client.cli.spec_flags import spec_options

        return [*own, *spec_options()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse MiniMind's command line as well: with ``torchrun`` in front, and several values after one flag."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        from trainyard.client.cli.minimind import PastedLine
        from trainyard.client.cli.spec_flags import repeat_flags, unknown_flag

        line = PastedLine.parse(args)
        try:
            rest = super().parse_args(ctx, repeat_flags(line.words))
            ctx.params["pasted"] = line
            return rest
        except click.NoSuchOption as error:
            # click names the option with underscores; the message names it as it was typed.
            names = [word.partition("=")[0] for word in args]
            typed = next((name for name in names if error.option_name[2:] == _underscores(name[2:])), error.option_name)
            raise unknown_flag(typed, option_names(ctx)) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in the groups of the spec."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for section, below in groupby(options, lambda option: getattr(option, "section", "Options")):
            records = [record for record in (option.get_help_record(ctx) for option in below) if record]
            with formatter.section(section):
                formatter.write_dl(records)


class CommandGroup(click.Group):
    """Commands in the order in which they were given, not of the alphabet."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)


def seconds(text: str | float) -> float:
    """Convert to a finite time in seconds, 0 or more. Raises click.BadParameter."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise click.BadParameter("must be seconds: a number, 0 or more")
    return value


def rank(text: str) -> int | str:
    """Convert to a rank's number, or ``agent``. Raises ValueError."""
    return text if text == "agent" else int(text)


def _jobs(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from trainyard.client.cli.job_names import jobs

    return [name for name in jobs() if name.startswith(incomplete)]


COMPLETE_VARIABLE = "_TRAINYARD_COMPLETE"
FILE = click.Path()
POSITIVE = click.IntRange(min=1)


def _remote(name: str, run: str, explained: str, *params: click.Parameter, **settings: Any) -> Command:
    return Command(name, run, explained, *params, JSON, *SERVICE, **settings)


def _of_job(name: str, run: str, explained: str, *params: click.Parameter, **settings: Any) -> Command:
    return _remote(name, run, explained, JOB, *params, **settings)


def _group(name: str, explained: str, *commands: click.Command) -> CommandGroup:
    return CommandGroup(name, help=explained, short_help=explained, commands=commands)


def _spec_command(name: str, explained: str, *params: click.Parameter) -> SpecCommand:
    own = (
        _argument("spec", "[SPEC.json | -]", "job spec; - reads it from stdin", type=FILE, required=False),
        Option("--name", help="of the job"),
        _several("--labels", "K=V ...", "one label or more; may be repeated"),
        Option("--description", help="what is tried and why"),
        Option("--group", help="set of jobs that it belongs to"),
        _several("--set", "GROUP.FIELD=JSON", "any field, as JSON; may be repeated"),
    )
    sources = (
        "The spec comes from a file, from MiniMind's flags, or from both: flags override the file. "
        "Relative paths start at the working directory."
    )
    settings = {"context_settings": BOTH_SPELLINGS, "epilog": sources}
    return SpecCommand(name, f"cli.commands.{name}:{name}", explained, *own, *params, JSON, *SERVICE, **settings)


def _token(name: str, explained: str, *params: click.Parameter) -> Command:
    return _remote(name, f"cli.commands.tokens:{name}", explained, _argument("name", "NAME", "of the token"), *params)


def _webhook(name: str, explained: str, *params: click.Parameter) -> Command:
    return _remote(name, f"cli.commands.webhooks:{name}", explained, _argument("webhook", "WEBHOOK", "its id"), *params)


def _argument(name: str, metavar: str, explained: str, **settings: Any) -> click.Argument:
    return click.Argument([name], metavar=metavar, help=explained, **settings)


def _flag(*names: str, help: str) -> Option:  # noqa: A002 - as click calls it
    return Option(*names, is_flag=True, help=help)


def _several(name: str, metavar: str, explained: str) -> Option:
    return Option(name, multiple=True, metavar=metavar, help=explained)


def _timeout(explained: str, default: float | None = None) -> Option:
    return Option("--timeout", type=seconds, metavar="SECONDS", help=explained, default=default)


def _step(explained: str) -> Option:
    return Option("--step", type=int, help=explained)


def _underscores(name: str) -> str:
    return name.replace("-", "_")


BOTH_SPELLINGS = {"token_normalize_func": _underscores}
"""Makes ``--batch-size`` the same as ``--batch_size``."""

# fmt: off
JOB = _argument("job", "JOB", "id or name of the job; if several have the name, the newest", shell_complete=_jobs)
JOB_AT_STEP = _argument("job", "JOB[@STEP]", "job, and the step of a checkpoint (latest)", shell_complete=_jobs)
SAMPLING = (
    Option("--max-new-tokens", type=click.IntRange(min=0), metavar="N", help="maximum number of new tokens (128)"),
    Option("--temperature", type=float, help="0: always the most likely token (0.85)"),
    Option("--top-p", type=float, metavar="P", help="sample from the most likely tokens up to this probability (0.95)"),
    Option("--top-k", type=click.IntRange(min=0), metavar="K", help="sample from the K most likely tokens (all)"),
    Option("--seed", type=click.IntRange(min=0), help="the same seed gives the same text"),
    _several("--stop", "TEXT", "end before this text; may be repeated"),
)
CORPUS = _argument("file", "FILE", "corpus: JSONL, text, gzip, zstandard or parquet", type=FILE)
CORPUS_PATHS = _argument("paths", "PATH...", "files, directories or quoted globs", type=FILE, nargs=-1, required=True)
TOKENIZER = Option("--tokenizer_path", "--tokenizer-path", metavar="DIR", help="tokenizer of the job (byte)")
SPECIAL_TOKENS = Option("--special_tokens", "--special-tokens", type=click.Choice(["text", "tokens"]), default="text",
    help="as in the job spec (text)")
TEXT_FIELD = Option("--text-field", default="text", help="key of the text (text)")
TEXT_FIELD_OF_JOB = Option("--text_field", "--text-field", metavar="KEY", help="key of the text (text)")
JSON = _flag("--json", help="print JSON")
YES = _flag("-y", "--yes", help="do not ask; required without a terminal")
SERVICE = (
    Option("--url", help="of the service (TRAINYARD_URL, else http://127.0.0.1:8000)"),
    Option("--token", help="bearer token (TRAINYARD_TOKEN)"),
)
HOME = Option("--home", type=FILE, help="folder of everything the service keeps (./trainyard-home)")
STORE = (HOME, Option("--database-url", help="default: SQLite in the home"))
IDEMPOTENCY_KEY = Option("--idempotency-key", "--idempotency_key", metavar="KEY",
    help="the same command again with the same key finds the job, and starts no second one")
LIMIT = Option("--limit", type=POSITIVE, default=20, help="at most this many (20)")
EXPIRES_IN = Option("--expires-in", metavar="TIME", help="lifetime of the secret: 12h, 90d")
QUOTAS = (
    Option("--max-jobs", type=int, metavar="N", help="at most N jobs queued or running (no limit)"),
    Option("--max-devices", type=int, metavar="N", help="at most N devices for them together (no limit)"),
)
DATABASE = "URL of a database, a SQLite file, or a home"
RULES = "nonfinite, no_progress=MINUTES, plateau=STEPS, eval_loss_below=VALUE; may be repeated"

COMMANDS = (
    Command("demo", "demo.story:run", "train a small model on this machine, from nothing",
        Option("--home", type=FILE, help="folder for the demo (default: a new one in ./trainyard-home)"),
        _flag("--keep", help="leave the service running at the end")),
    Command("serve", "cli.commands.local:serve", "run the service in the foreground",
        Option("--host", help="address to bind (127.0.0.1)"),
        Option("--port", type=int, help="port to bind (8000)"),
        _flag("--no-scheduler", help="only answer requests: another service here schedules"), *STORE),
    Command("doctor", "cli.commands.local:doctor", "check what this host can do; each line says what to do about it",
        _flag("--gpu", help="also test training on the GPU, in about four minutes; exit 2 without one"),
        Option("--out", type=FILE, metavar="DIR", help="write the report there, as text and JSON"), JSON, HOME),
    _spec_command(SUBMIT, "launch a run: SPEC.json, or MiniMind's flags",
        _flag("-y", "--yes", help="do not ask, and submit in spite of warnings"),
        IDEMPOTENCY_KEY,
        _flag("--watch", help="follow the run; its end decides the exit code"),
        _timeout("with --watch: stop following after this time")),
    _spec_command(PLAN, "show what a run would be, and launch nothing: the same arguments as submit",
        Option("--depth", type=click.IntRange(1, 128), metavar="LAYERS",
            help="print a spec for a model of this depth, by published rules, to be edited")),
    _remote("list", "cli.commands.show:list_jobs", "list the jobs, newest first or by score",
        Option("--status", help="only jobs with this status"),
        _several("--label", "K=V", "only jobs with this label"),
        Option("--name", help="only jobs with this name"),
        Option("--group", help="only jobs of this group"),
        Option("--owner", help="only jobs that this token submitted; local: without a token"),
        Option("--order", type=click.Choice(["newest", "oldest", "score", "-score"]),
            help="score: best score first; jobs without one are last"),
        _flag("--discarded", help="only discarded jobs, which are left out otherwise"), LIMIT),
    _of_job("show", "cli.commands.show:show", "show one job: its state, the reason, and what you can do"),
    _of_job("watch", "cli.watch.watcher:watch", "follow a run until it ends",
        _timeout("stop after this time; exit 124")),
    _of_job("metrics", "cli.commands.show:metrics", "print the points of the curve",
        _flag("--csv", help="every field, comma-separated"),
        Option("--after-step", type=int, default=0, metavar="STEP", help="only points after this step"),
        Option("--attempt", type=POSITIVE, help="only points of this attempt"),
        _flag("--lineage", help="for a fork: its ancestors' points first")),
    _of_job("logs", "cli.commands.logs:logs", "print what a rank wrote",
        _flag("-f", "--follow", help="continue until the run ends"),
        Option("--rank", type=rank, metavar="RANK|agent", help="which rank (0); agent: the output of torchrun"),
        Option("--attempt", type=POSITIVE, help="which attempt (the newest)"),
        Option("--tail", type=POSITIVE, metavar="LINES", help="only the last lines"),
        _timeout("with --follow: stop after this time; exit 124")),
    _of_job("events", "cli.commands.show:events", "list what happened to the job, and who asked for it"),
    _of_job("checkpoints", "cli.commands.checkpoints:checkpoints",
        "list the checkpoints, newest first; download or delete one",
        Option("--download", type=int, metavar="STEP", help="download the files of this checkpoint"),
        Option("--out", type=FILE, metavar="DIR", help="with --download: folder for them (./JOB-step-STEP)"),
        Option("--delete", type=int, metavar="STEP", help="remove this checkpoint; never the last valid one"),
        _flag("-y", "--yes", help="with --delete: do not ask; required without a terminal")),
    _of_job("attempts", "cli.commands.show:attempts", "list the launches of the job and how they ended"),
    _of_job("samples", "cli.commands.show:samples", "print texts that the model wrote"),
    _of_job("evaluations", "cli.commands.evaluations:evaluations", "list the scores on tasks, by step",
        _step("only scores of this step"), Option("--task", help="only scores on this task")),
    _remote("devices", "cli.commands.show:devices", "list the devices and the jobs that hold them",
        Option("--clear", metavar="DEVICE", help="clear the XID errors of this GPU, which may be leased again")),
    _of_job("pause", "cli.commands.actions:pause", "save and stop; can be resumed"),
    _of_job("resume", "cli.commands.actions:resume", "continue from the newest valid checkpoint",
        Option("--epochs", type=int, help="raise the number of epochs"),
        Option("--max_steps", type=int, help="raise the number of steps"),
        Option("--max_tokens", type=int, help="raise the number of trained tokens"),
        Option("--max_minutes", metavar="MINUTES", help="another limit of training time; none: no limit"),
        Option("--target_loss", metavar="LOSS", help="another loss at which the run ends; none: no target"),
        Option("--schedule", type=click.Choice(["extend", "continue"]),
            help="learning rate of a longer run: schedule of the new length, or decay from the current rate"),
        Option("--save_dir", type=FILE, metavar="DIR", help="move the checkpoints and weights there, and save there"),
        _step("go back to the checkpoint of this step; newer ones are set aside"),
        _several("--set", "resources.FIELD=JSON", "also checkpoint.save_dir or training.gradient_checkpointing"),
        context_settings=BOTH_SPELLINGS),
    _of_job("save", "cli.commands.actions:save", "write a checkpoint at the next step, and continue"),
    _of_job("fork", "cli.commands.actions:fork", "start a new job from a checkpoint of this one",
        _step("the checkpoint to start from (the newest full one)"),
        _several("--set", "GROUP.FIELD=JSON", "change a field of the spec"), Option("--name", help="of the new job"),
        _flag("--restart-data", help="start data and schedule from the beginning (else they continue)"),
        IDEMPOTENCY_KEY,
        Option("--decay", type=POSITIVE, metavar="STEPS", help="a decay branch: decay the rate over this many steps")),
    _of_job("export", "cli.commands.actions:export", "write a checkpoint in the format of another program",
        _step("which checkpoint (the newest); JOB@STEP means the same"),
        Option("--out", type=FILE, metavar="DIR", help="download the files into this folder"),
        Option("--format", type=click.Choice(["hf", "minimind"]), default="hf", help="Hugging Face (hf) or MiniMind")),
    _of_job("evaluate", "cli.commands.evaluations:evaluate", "score a checkpoint on tasks, while the runs continue",
        _several("--task", "NAME=FILE", "a task file; may be repeated (the tasks of the job's spec)"),
        _step("which checkpoint (the newest); JOB@STEP means the same"),
        Option("--kind", type=click.Choice(["choice", "continuation"]), help="of the tasks (by their first line)"),
        _flag("--no-wait", help="return at once"), _timeout("stop waiting after this time; exit 124")),
    _remote("generate", "cli.commands.generation:generate", "continue a text with a checkpoint", JOB_AT_STEP,
        _argument("prompt", "TEXT", "the text to continue; - reads it from stdin"), *SAMPLING,
        context_settings=BOTH_SPELLINGS),
    _remote("chat", "cli.commands.generation:chat", "chat with a checkpoint, turn by turn", JOB_AT_STEP,
        Option("--system", metavar="TEXT", help="instruction before the conversation"), *SAMPLING,
        context_settings=BOTH_SPELLINGS),
    _of_job("cancel", "cli.commands.actions:cancel", "save and end the job; can be resumed"),
    _of_job("kill", "cli.commands.actions:kill", "stop now, without saving", YES),
    _of_job("describe", "cli.commands.actions:describe", "write down what was tried and why",
        _argument("text", "TEXT", "replaces the description"),
        Option("--group", help="put the job into this group; none: into no group")),
    _of_job("discard", "cli.commands.actions:discard", "hide a job from lists; its record and files stay",
        _flag("--undo", help="show the job in lists again")),
    _of_job("delete", "cli.commands.actions:delete", "remove a job that has ended, with its files", YES),
    _group("tokenizer", "train a tokenizer",
        Command("train", "cli.commands.local:train_tokenizer", "train a byte-level BPE on a corpus", CORPUS,
            Option("--vocab-size", type=int, default=6400, help="tokens, special ones included (6400)"),
            Option("--out", required=True, type=FILE, metavar="DIR", help="folder for tokenizer.json"), TEXT_FIELD)),
    _group("corpus", "tokenize, describe, check or sample a corpus; list or remove the tokenized ones",
        _remote("build", "cli.commands.corpora:build", "tokenize a corpus on the service's CPUs, without a job",
            _argument("paths", "PATH...", "files, directories or quoted globs", type=FILE, nargs=-1),
            Option("--spec", type=FILE, metavar="SPEC.json", help="a job spec: its data is tokenized, also a mixture"),
            TEXT_FIELD_OF_JOB, TOKENIZER,
            Option("--special_tokens", "--special-tokens", type=click.Choice(["text", "tokens"]),
                help="as in the job spec (text)"),
            _flag("--no-wait", help="return at once; `GET /corpora/ID` has the progress"),
            _timeout("stop waiting after this time; exit 124")),
        Command("check", "cli.commands.local:check_corpus", "count the texts, and name every line that cannot be read",
            CORPUS_PATHS, TEXT_FIELD, TOKENIZER, SPECIAL_TOKENS, JSON),
        _remote("show", "cli.commands.corpus_show:show",
            "describe a corpus: of the service by its id, or files of this host; tokenizes them if they are not cached",
            _argument("corpus", "CORPUS|PATH...", "an id, a key of `corpus list`, or files, directories, quoted globs",
                type=FILE, nargs=-1, required=True),
            TEXT_FIELD, TOKENIZER, SPECIAL_TOKENS, HOME),
        Command("sample", "cli.commands.local:sample_corpus", "write a random sample of the documents as JSONL",
            _argument("out", "OUT.jsonl", "must not exist yet", type=FILE), CORPUS_PATHS, TEXT_FIELD,
            Option("--documents", type=POSITIVE, default=1000, metavar="N", help="how many (1000)"),
            Option("--seed", type=int, default=42, metavar="N", help="the same seed gives the same sample (42)")),
        Command("list", "cli.commands.local:list_corpora", "list this host's cache of tokenized corpora", JSON, HOME),
        Command("prune", "cli.commands.local:prune_corpora", "remove tokenized corpora that no run has open", HOME,
            Option("--days", metavar="N", help="first those unused for N days; 0: none by age (TRAINYARD_CORPUS_DAYS)"),
            Option("--bytes", metavar="N", help="then the least recently used, until the cache has at most N bytes; "
                "0: any size (TRAINYARD_CORPUS_BYTES)"))),
    _group("db", "the service's database",
        Command("upgrade", "cli.commands.local:upgrade_database", "bring the tables to this version", *STORE),
        Command("copy", "cli.commands.local:copy_database", "copy everything into another, empty database",
            _argument("source", "FROM", DATABASE, type=FILE), _argument("target", "TO", DATABASE, type=FILE)),
        Command("backup", "cli.commands.local:back_up_database", "copy the SQLite database while it is in use",
            _argument("file", "FILE", "the copy; must not exist yet", type=FILE), *STORE)),
    _group("token", "named tokens of the service, for admins",
        _token("create", "make a token; its secret is printed once",
            Option("--scope", type=click.Choice([*map(str, Scope)]), default="read", help="what it may do (read)"),
            EXPIRES_IN, *QUOTAS),
        _remote("list", "cli.commands.tokens:list_tokens", "list the tokens and their running jobs"),
        _token("limit", "change the quotas of a token; a quota that is left out is removed", *QUOTAS),
        _token("rotate", "replace the secret of a token; the new one is printed once",
            Option("--overlap", default="0", metavar="TIME", help="how long the old secret stays valid: 1h, 2d (0)"),
            EXPIRES_IN),
        _token("revoke", "make a token invalid for good", YES)),
    _group("webhook", "URLs that are called when jobs change, and what was delivered",
        _remote("create", "cli.commands.webhooks:create", "send events to a URL; prints the secret, once",
            _argument("to", "URL", "http, https, or Apprise's: slack://..., mailto://...; - reads it from stdin"),
            _several("--event", "TYPE", "job.failed, ..., or * (every change of status)"),
            _several("--rule", "RULE", RULES), _several("--label", "K=V", "only for jobs with this label"),
            Option("--job", metavar="JOB", help="only for this job: its id, or a name that only one job has"),
            Option("--description", help="free text")),
        _remote("list", "cli.commands.webhooks:list_webhooks", "list all, newest first"),
        _webhook("show", "show one"),
        _webhook("deliveries", "list what was sent and what waits, newest first",
            Option("--state", type=click.Choice(["pending", "delivered", "failed"]), help="only those"), LIMIT),
        _webhook("test", "send webhook.test, and print the result", _timeout("wait no longer (20)", default=20.0)),
        _webhook("redeliver", "send an event again, under the same id",
            _argument("delivery", "DELIVERY", "its id: `trainyard webhook deliveries` lists them")),
        _webhook("rotate", "replace the secret; the new one is printed once; for a day both sign"),
        _webhook("enable", "switch it on again"),
        _webhook("disable", "switch it off"),
        _webhook("delete", "remove it, with its log", YES)),
    Command("mcp", "cli.commands.mcp:serve", "offer tools to an AI agent that starts this, over stdio (MCP)", *SERVICE),
    _remote("version", "cli.commands.show:version", "print the versions of this command and of the service"),
    Command("completion", "cli.completion:completion", "print the script with which a shell completes on Tab",
        click.Argument(["shell"], type=click.Choice(["bash", "zsh", "fish"]), help="which shell")),
)
# fmt: on


def _print_version(ctx: click.Context, _param: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        from importlib.metadata import version

        ctx.obj.data(f"trainyard {version('trainyard')}")
        ctx.exit()


VERSION = Option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="print the version"
)

trainyard = CommandGroup(
    "trainyard",
    params=[VERSION],
    help="Launch, watch, interrupt and resume pretraining runs.",
    epilog="Exit codes: 0 succeeded, 1 the service rejected the request, 2 wrong usage, 3 no service at the URL, "
    "4 not authorised, 10 the run failed, 11 cancelled, 12 paused or interrupted, 124 --timeout passed, 130 detached. "
    "Settings: TRAINYARD_URL, TRAINYARD_TOKEN, TRAINYARD_HOME, TRAINYARD_DATABASE_URL.",
    commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
