"""Migrations only add: what the release before writes and reads in the older tables is still valid in the newer ones.

So an upgrade never destroys what a person may want back, and a service that still runs on the older code while
another one migrates fails at nothing that it writes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import alembic.command
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from tests.service.test_db_engine import _tables_again, empty
from trainyard.service.db.engine import Database, alembic_config

__all__ = ["_tables_again", "empty"]


@dataclass
class Table:
    """What a statement of an older release depends on."""

    columns: dict[str, dict[str, Any]]
    primary_key: set[str]
    unique: list[set[str]] = field(default_factory=list)
    foreign_keys: list[set[str]] = field(default_factory=list)


Schema = dict[str, Table]


def read_schema(connection: sa.Connection) -> Schema:
    found = sa.inspect(connection)

    def table(name: str) -> Table:
        unique = [set(each["column_names"]) for each in found.get_unique_constraints(name)]
        unique += [set(map(str, each["column_names"])) for each in found.get_indexes(name) if each["unique"]]
        return Table(
            {str(column["name"]): dict(column) for column in found.get_columns(name)},
            set(found.get_pk_constraint(name)["constrained_columns"]),
            unique,
            [set(each["constrained_columns"]) for each in found.get_foreign_keys(name)],
        )

    return {name: table(name) for name in found.get_table_names() if name != "alembic_version"}


def breaking_changes(before: Schema, after: Schema) -> list[str]:
    """Return what an older release could not read, or could no longer write. A new table breaks nothing."""
    return [change for name in before for change in _breaking_in_table(name, before[name], after.get(name))]


def _breaking_in_table(name: str, old: Table, new: Table | None) -> Iterator[str]:
    if new is None:
        yield f"{name} is dropped"
        return
    for column, had in old.columns.items():
        has = new.columns.get(column)
        if has is None:
            yield f"{name}.{column} is dropped"
        else:
            yield from _narrower(f"{name}.{column}", had, has)
    for column, has in new.columns.items():
        if column not in old.columns and not has["nullable"] and has["default"] is None:
            yield f"{name}.{column} is new, NOT NULL and without a server default"
    yield from _stricter_keys(name, old, new)


def _stricter_keys(name: str, old: Table, new: Table) -> Iterator[str]:
    if not old.primary_key <= new.primary_key:
        yield f"{name}: the primary key is stricter"
    old_columns = set(old.columns)
    for columns in new.unique:
        if columns <= old_columns and not any(had <= columns for had in old.unique):
            yield f"{name}: {sorted(columns)} must now be unique"
    for columns in new.foreign_keys:
        if columns <= old_columns and columns not in old.foreign_keys:
            yield f"{name}: {sorted(columns)} must now refer to a row"


def _narrower(name: str, had: dict[str, Any], has: dict[str, Any]) -> Iterator[str]:
    if had["nullable"] and not has["nullable"]:
        yield f"{name} is no longer nullable"
    if type(had["type"]) is not type(has["type"]):
        yield f"{name} was {had['type']} and is {has['type']}"
    elif (getattr(has["type"], "length", None) or 10**9) < (getattr(had["type"], "length", None) or 10**9):
        yield f"{name} is shorter"


@pytest.mark.long
def test_every_migration_only_adds(empty: str) -> None:
    database = Database(empty)
    try:
        with database.engine.execution_options(writes=True).begin() as connection:
            config = alembic_config(connection)
            revisions = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()][::-1]
            assert len(revisions) >= 19
            before: Schema = {}
            for revision in revisions:
                alembic.command.upgrade(config, revision)
                after = read_schema(connection)
                assert breaking_changes(before, after) == [], f"migration {revision}"
                before = after
    finally:
        database.close()


JOBS = Table(
    {
        "id": {"type": sa.String(40), "nullable": False, "default": None},
        "owner": {"type": sa.String(20), "nullable": True, "default": None},
    },
    {"id"},
)


@pytest.mark.parametrize(
    "broken",
    [
        "jobs is dropped",
        "jobs.owner is dropped",
        "jobs.owner is no longer nullable",
        "jobs.owner was VARCHAR(20) and is INTEGER",
        "jobs.owner is shorter",
        "jobs.place is new, NOT NULL and without a server default",
        "jobs: the primary key is stricter",
        "jobs: ['owner'] must now be unique",
        "jobs: ['owner'] must now refer to a row",
    ],
)
def test_a_migration_that_breaks_the_release_before_is_found(broken: str) -> None:
    after: Schema = {"jobs": copy.deepcopy(JOBS), "new": copy.deepcopy(JOBS)}
    jobs = after["jobs"]
    match broken.split(" ", 1)[1] if broken.startswith("jobs.owner") else broken:
        case "jobs is dropped":
            del after["jobs"]
        case "is dropped":
            del jobs.columns["owner"]
        case "is no longer nullable":
            jobs.columns["owner"]["nullable"] = False
        case "was VARCHAR(20) and is INTEGER":
            jobs.columns["owner"]["type"] = sa.Integer()
        case "is shorter":
            jobs.columns["owner"]["type"] = sa.String(10)
        case "jobs.place is new, NOT NULL and without a server default":
            jobs.columns["place"] = {"type": sa.String(40), "nullable": False, "default": None}
        case "jobs: the primary key is stricter":
            jobs.primary_key = {"owner"}
        case "jobs: ['owner'] must now be unique":
            jobs.unique.append({"owner"})
        case _:
            jobs.foreign_keys.append({"owner"})
    assert breaking_changes({"jobs": JOBS}, after) == [broken]


def test_what_only_adds_breaks_nothing() -> None:
    after = {"jobs": copy.deepcopy(JOBS), "new": copy.deepcopy(JOBS)}
    jobs = after["jobs"]
    jobs.columns["place"] = {"type": sa.Text(), "nullable": False, "default": "''"}
    jobs.columns["owner"]["type"] = sa.String(64)
    jobs.primary_key = {"id", "owner"}
    jobs.unique.append({"place"})
    assert breaking_changes({"jobs": JOBS}, after) == []
