"""The progress bar of a training run."""

from __future__ import annotations

from types import TracebackType

from memtier.training.metrics import LogRow

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """A rich progress bar; rich is imported when the bar is first drawn."""

    def __enter__(self) -> TrainingProgress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=1.0, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tell(self, progress: float, state: str) -> None:
        """Draw a share of the run, 0 to 1, and a line about it."""
        self._bar.update(self._task, completed=progress, state=state)

    def show(self, row: LogRow) -> None:
        """Draw one row of nano's log."""
        state = (
            f"step {row.step}  level {row.level}  loss {row.loss:.3f}  text {row.text_bpb:.2f} bits/byte"
            f"  answers {row.answer_accuracy:.0%} (far {row.far_accuracy:.0%})  {row.tokens_per_second:.0f} bytes/s"
        )
        self.tell(row.progress, state)
