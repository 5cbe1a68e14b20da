"""A bar on the terminal for work whose size is known in bytes and whose speed is told in samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


@contextmanager
def progress(name: str, size: int, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A function that takes what has been done since: bytes of the source, and samples."""
    columns = (
        TextColumn(name),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %, {task.fields[samples]} samples,"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=size, samples=0)
        total = 0

        def advance(num_bytes: int, num_samples: int) -> None:
            nonlocal total
            total += num_samples
            bar.update(task, advance=num_bytes, samples=total)

        yield advance


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['samples'] / task.elapsed if task.elapsed else 0:.0f}/s")
