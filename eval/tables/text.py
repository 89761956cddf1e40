"""Tables of text."""

from collections.abc import Sequence


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal, the first one to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
