"""Tables on the terminal: what a run found, beside what is true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

RESEARCH_ONLY = "Research only, not for clinical use."


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, footer: str = ""
) -> None:
    """Prints a table to stdout; the first column is text, the others are aligned to the right.

    On a pipe it is as wide as it needs to be, so that nothing is cut off in a log.
    """
    from rich.console import Console
    from rich.table import Table

    rows = [list(map(str, row)) for row in rows]
    table = Table(title=title, title_justify="left", caption=footer, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.measure(table).maximum, 40))
    console.print(table, markup=False, highlight=False)
