"""The terminal: answers go to OUT, everything else to ERR."""

import sys
from typing import Final

from rich.console import Console

# Into a file or a pipe, tables are written as wide as they are: nothing is cut off.
OUT: Final = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
ERR: Final = Console(stderr=True, highlight=False)
