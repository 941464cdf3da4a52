import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from loramux_server.errors import Reason, Unavailable
from loramux_server.tenancy.database import Database, RegistryError, SchemaTooNew
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.schema import SCHEMA_VERSION
from tests.support.lifecycle_doubles import new_version


def set_schema(path: Path, version: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE state SET schema_version = ?", (version,))
    connection.commit()
    connection.close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    Database(path).close()
    set_schema(path, SCHEMA_VERSION + 1)
    with pytest.raises(SchemaTooNew, match="run the newer release"):
        Database(path)
    set_schema(path, SCHEMA_VERSION)
    Database(path).close()


def test_an_unknown_older_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    Database(path).close()
    set_schema(path, SCHEMA_VERSION - 1)
    with pytest.raises(RegistryError):
        Database(path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(RegistryError, match="cannot be opened"):
        Database(path)


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    with pytest.raises(RegistryError, match="something else"):
        Database(path)


def test_a_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError):
        Database(tmp_path / "missing" / "r.sqlite")


def test_an_exception_rolls_the_transaction_back(tmp_path: Path) -> None:
    database = Database(tmp_path / "r.sqlite")
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        connection.execute(text("UPDATE state SET revision = 7"))
        raise ZeroDivisionError
    with database.read() as connection:
        assert connection.execute(text("SELECT revision FROM state")).scalar_one() == 0
    database.close()


def test_a_failing_database_is_unavailable_without_a_path(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r.sqlite")
    registry.commit_version(new_version())
    blocker = sqlite3.connect(tmp_path / "r.sqlite")
    blocker.execute("DROP TABLE adapters")
    blocker.commit()
    blocker.close()
    with pytest.raises(Unavailable) as caught:
        registry.get_adapter("default", "bot")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert str(tmp_path) not in caught.value.message
    registry.close()
