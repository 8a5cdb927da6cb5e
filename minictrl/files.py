"""Files that are written in one step: a reader never sees half of one."""

import csv
import json
from pathlib import Path


def write_json(path: Path, value):
    """JSON in one step: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def write_csv(path: Path, rows: list[dict]):
    """A table of rows with the same keys, in one step likewise; floats to 8 digits."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(
            {key: f"{x:.8g}" if isinstance(x, float) else x for key, x in row.items()}
            for row in rows
        )
    temporary.replace(path)
