"""One row for each request, journalled before it is dispatched and kept in SQLite."""

from tokenworks.gateway.ledger.books import Books
from tokenworks.gateway.ledger.journal import LedgerError
from tokenworks.gateway.ledger.ledger import Ledger, default_folder
from tokenworks.gateway.ledger.row import Row, kept, receipt, tpot_ns
from tokenworks.gateway.ledger.table import insert_row

__all__ = [
    "Books",
    "Ledger",
    "LedgerError",
    "Row",
    "default_folder",
    "insert_row",
    "kept",
    "receipt",
    "tpot_ns",
]
