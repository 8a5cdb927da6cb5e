"""Trackers of runs, if they are installed: what metrics.jsonl gets, and some responses now and
then.
"""

import warnings
from functools import cached_property
from importlib import import_module
from pathlib import Path

from minictrl.files import markdown
from minictrl.messages import first_line

EVERY, SHOWN = 10, 20  # steps between tables of responses, and their rows
COLUMNS = ["prompt", "response", "reward"]


def check_tracker(name: str | None):
    """Raises ValueError if it is not installed."""
    if name is None:
        return
    try:
        import_module(name)
    except ImportError:
        raise ValueError(f"--track {name}: it is not installed; pip install {name}") from None


class Tracker:
    """`--track`: wandb, trackio or tensorboard. What fails while a run trains is warned of once,
    and the run goes on without."""

    def __init__(self, name: str, out: Path, settings: dict):
        self.name, self.board, self.failed = name, name == "tensorboard", False
        self.folder = out / "tensorboard"
        if self.board:
            return
        try:
            self.module = import_module(name)
            self.run = self.module.init(project="minictrl", name=out.name, config=settings)
        except Exception as error:  # no account, no network
            why = first_line(error)
            raise ValueError(f"--track {name}: can't start ({why}); leave it out") from None

    @cached_property
    def writer(self):
        """TensorBoard's, which writes into the run: so it is made with the first row."""
        return import_module("torch.utils.tensorboard").SummaryWriter(str(self.folder))

    def log(self, row: dict, step: int):
        self._try(self._log, {key: value for key, value in row.items() if value is not None}, step)

    def table(self, rows: list[tuple], step: int):
        """Rows of COLUMNS."""
        self._try(self._table, rows, step)

    def close(self):
        self._try(lambda: self.writer.close() if self.board else self.run.finish())

    def _try(self, function, *arguments):
        if self.failed:
            return
        try:
            function(*arguments)
        except Exception as error:
            warnings.warn(
                f"--track {self.name} fails ({error}): the run goes on without it", stacklevel=3
            )
            self.failed = True

    def _log(self, row: dict, step: int):
        if not self.board:
            return self.run.log(row, step=step)
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)

    def _table(self, rows: list[tuple], step: int):
        if not self.board:
            table = self.module.Table(columns=COLUMNS, data=[list(row) for row in rows])
            return self.run.log({"responses": table}, step=step)
        cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        self.writer.add_text("responses", markdown(COLUMNS, cells), step)
