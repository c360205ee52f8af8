"""What became of the rows of a run, in the same words wherever it is said."""

from __future__ import annotations

from typing import NamedTuple

from ..text import plural

__all__ = ["Counts", "took"]


class Counts(NamedTuple):
    """Rows of a run, or of a part of it. All but ``skipped`` and ``cut`` are apart from each other.

    Attributes
    ----------
    rows, answered, reused, stored, kept, failed, skipped, cut : int
        As in ``RunStats``.
    time_s : float
        Seconds.

    Examples
    --------
    >>> Counts(rows=300, answered=298, failed=2, skipped=1, time_s=12.1).line("scatter")
    'scatter: 300 rows, 298 answered, 2 failed (1 without a prompt), 12.1 s'
    """

    rows: int = 0
    answered: int = 0
    reused: int = 0
    stored: int = 0
    kept: int = 0
    failed: int = 0
    skipped: int = 0
    cut: int = 0
    time_s: float = 0.0

    @property
    def known(self) -> int:
        """Rows that have an answer, wherever it came from."""
        return self.answered + self.reused + self.stored + self.kept

    @property
    def left(self) -> int:
        """Rows that have neither an answer nor an error."""
        return self.rows - self.known - self.failed

    def since(self, earlier: Counts) -> Counts:
        """What came after an earlier state."""
        return Counts._make(now - then for now, then in zip(self, earlier, strict=True))

    def words(self) -> list[str]:
        """Each count that is not 0, and that of the answered rows."""
        without = f" ({self.skipped:,} without a prompt)" if self.skipped else ""
        counts = {
            "reused": self.reused,
            "stored": self.stored,
            "kept": self.kept,
            f"failed{without}": self.failed,
            "left": self.left,
            "cut off": self.cut,
        }
        return [f"{self.answered:,} answered", *(f"{count:,} {what}" for what, count in counts.items() if count)]

    def line(self, what: str, noun: str = "row") -> str:
        """The whole of it."""
        return f"{what}: {', '.join([plural(self.rows, noun), *self.words(), took(self.time_s)])}"


def took(seconds: float) -> str:
    """A time in readable units.

    Examples
    --------
    >>> took(8.26), took(95), took(3 * 3600 + 120)
    ('8.3 s', '1 min 35 s', '3 h 02 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 or not seconds else "0.1 s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"
