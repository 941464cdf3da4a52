"""The registry's SQLite database: pragmas, transactions, schema version.

WAL with `synchronous=FULL`: a committed transaction survives a power cut. One writer at a time inside the process (a
lock here), one process at a time (`DirectoryLock` of `store.py`).
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DatabaseError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection

from loramux_server.errors import Reason, Unavailable
from loramux_server.tenancy import schema
from loramux_server.tenancy.filesystem import network_type


class RegistryError(RuntimeError):
    """The registry cannot be used; raised at start, for the operator."""


class SchemaTooNew(RegistryError):
    """A newer release wrote this registry."""


class Database:
    """A SQLite file with the tables of `schema`, created when missing.

    Args:
        path: The file; its directory exists.

    Raises:
        RegistryError: It is no registry, cannot be opened, or is on a network file system.
        SchemaTooNew: It has a schema newer than this release knows.
    """

    def __init__(self, path: Path) -> None:
        self._writer = threading.Lock()
        network = network_type(path)
        if network is not None:
            raise RegistryError(
                f"{path} is on a network file system ({network}), where SQLite loses data; give a local directory"
            )
        try:
            # Made before SQLite does: the tenants' salts are for the server's own user only.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise RegistryError(f"{path} cannot be opened as a registry: {error.strerror}") from error
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10.0})
        # The driver's own transaction control commits around DDL behind SQLAlchemy's back: off, and begun by hand.
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        try:
            with self.write() as connection:
                self._open(connection, path)
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, Unavailable):
                raise RegistryError(f"{path} cannot be opened as a registry: {error.__cause__}") from error
            raise

    def _open(self, connection: Connection, path: Path) -> None:
        tables = set(inspect(connection).get_table_names())
        if not tables:
            schema.metadata.create_all(connection)
            connection.execute(insert(schema.state).values(id=1, schema_version=schema.SCHEMA_VERSION, revision=0))
            return
        if schema.state.name not in tables:
            raise RegistryError(f"{path} is a database of something else; choose another state directory")
        found = connection.execute(select(schema.state.c.schema_version)).scalar_one()
        if found > schema.SCHEMA_VERSION:
            raise SchemaTooNew(
                f"{path} has registry schema {found}, this release knows {schema.SCHEMA_VERSION}; "
                "run the newer release, or restore a backup made before the upgrade"
            )
        if found < schema.SCHEMA_VERSION:
            raise RegistryError(f"{path} has registry schema {found}, this release needs {schema.SCHEMA_VERSION}")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent read.

        Raises:
            Unavailable: STORE_UNAVAILABLE when the database fails.
        """
        with _converted(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, the only one at that time; an exception rolls it back.

        Raises:
            Unavailable: STORE_UNAVAILABLE when the database fails.
        """
        with self._writer, _converted(), self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


@contextmanager
def _converted() -> Iterator[None]:
    try:
        yield
    except (IntegrityError, ProgrammingError):
        # Bugs of ours: no retry helps.
        raise
    except (DatabaseError, NoConnection) as error:
        raise Unavailable(
            Reason.STORE_UNAVAILABLE,
            "the registry does not answer; nothing was changed, retry later",
            retry_after=1.0,
        ) from error


def _configure(connection: object, _record: object) -> None:
    """Set the pragmas of a new connection."""
    connection.isolation_level = None  # type: ignore[attr-defined]
    cursor = connection.cursor()  # type: ignore[attr-defined]
    try:
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
    finally:
        cursor.close()
