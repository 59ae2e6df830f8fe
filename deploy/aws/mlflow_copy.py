"""`mlflow_copy.py save|restore DATABASE STORAGE`: MLflow's SQLite database to the bucket, and back where there is none.

Of any other database nothing is done: its server keeps copies of its own.
"""

import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from workers.storage import Storage

COPY = "mlflow-copy/mlflow.db"


def save(database: Path, storage: Storage) -> None:
    """SQLite's own online copy: whole, while the server goes on writing."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "mlflow.db")
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        storage.write(COPY, copy.read_bytes())


def restore(database: Path, storage: Storage) -> None:
    if not database.exists() and storage.exists(COPY):
        partial = database.with_suffix(".partial")
        partial.write_bytes(storage.read(COPY))
        partial.replace(database)


def main(verb: str, uri: str, storage: str) -> None:
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and (verb == "restore" or database.exists()):
        {"save": save, "restore": restore}[verb](database, Storage(storage))


if __name__ == "__main__":
    main(*sys.argv[1:])
