"""What was measured, as a table for people and as JSON for programs: every figure is a list, one entry a round."""

import json
import statistics


def spread(values, digits=0):
    """Median and range of the rounds."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f}..{high:,.{digits}f})"


def ratios(above, below):
    """Round by round, so that what the machine did meanwhile is in both."""
    return [a / b for a, b in zip(above, below) if b]


class Report:
    """Figures by part and name, collected over the rounds."""

    def __init__(self):
        self.figures = {}

    def add(self, part, name, value):
        self.figures.setdefault(part, {}).setdefault(name, []).append(value)

    def get(self, part, name):
        return self.figures.get(part, {}).get(name, [])

    def write(self, path, facts):
        path.write_text(json.dumps({**facts, "rounds": self.figures}, indent=1) + "\n")


def table(title, head, rows):
    """Prints columns as wide as they need to be; the first to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [str(cell).ljust(width) if i == 0 else str(cell).rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  " + "   ".join(cells))
