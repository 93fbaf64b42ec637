"""Values: the problems that `verify` finds in an output, as messages, and the exit code that they give."""

from __future__ import annotations

from dataclasses import dataclass, field

from imgbatch.errors import AuditError, ImgbatchError, OutputError

_SHOWN = 3


@dataclass
class Findings:
    """Problems of an output."""

    foreign: list[str] = field(default_factory=list)
    """Problems of parts of another model or another writer: exit code 5."""
    wrong: list[str] = field(default_factory=list)
    """All other problems: exit code 6."""

    def add(self, error: ImgbatchError) -> None:
        """Add the message of an error."""
        (self.foreign if isinstance(error, OutputError) else self.wrong).append(str(error))

    def require_none(self, uri: str) -> None:
        """Raise an error that lists all problems, if there are any.

        Args:
            uri: of the output.

        Raises:
            OutputError: there are foreign parts or files.
            AuditError: there are other problems.
        """
        problems = [*self.foreign, *self.wrong]
        if problems:
            listed = f"{len(problems)} problems in {uri}:\n- " + "\n- ".join(problems)
            text = problems[0] if len(problems) == 1 else listed
            raise OutputError(text) if self.foreign else AuditError(text)


@dataclass
class RowProblem:
    """A problem of rows: the number of rows with it, and their parts."""

    text: str
    count: int = 0
    parts: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, part: str, count: int, example: str = "") -> None:
        """Add rows of a part that have the problem."""
        self.count += count
        self.parts += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(f"{part}{f' ({example})' if example else ''}")

    def __str__(self) -> str:
        ellipsis = ", …" if self.parts > len(self.examples) else ""
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        return f"{rows} {self.text}, in {', '.join(self.examples)}{ellipsis}"
