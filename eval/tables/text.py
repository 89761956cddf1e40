"""Tables of text."""

from collections.abc import Sequence


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal, the first one to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)


def markdown(rows: Sequence[Sequence[str]], right: int | None = None) -> list[str]:
    """A table in Markdown; its first row is the head. right: the first column that is aligned to the right."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    left = len(rows[0]) if right is None else right
    return [lines[0], "|---" * left + "|---:" * (len(rows[0]) - left) + "|", *lines[1:]]
