"""Values: the expressions of `--where`: conditions on the columns of a table, in Python's syntax.

    label == 'tiger cat' and score < 0.5
    margin < 0.1 or answer is None
    label in ('cat', 'dog') and not uri.startswith('s3://old/')
    reason == 'truncated' and 'camera-7' in uri

Python's own parser reads them. Nothing is evaluated: comparisons of columns with constants become an expression of Arrow.
A comparison with null is neither true nor false, as in SQL, so that its negation does not select the row either.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import UsageError, did_you_mean

_MAX_LENGTH, _SHOWN = 10_000, 200

_ORDERED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_METHODS: dict[str, Callable[..., Any]] = {"startswith": pc.starts_with, "endswith": pc.ends_with}


class RowFilter:
    """A condition on rows.

    >>> rows = pa.table({"label": ["cat", "dog", "cup"], "score": [0.4, 0.9, None]})
    >>> RowFilter("score < 0.5 or label in ('dog',)").apply(rows)["label"].to_pylist()
    ['cat', 'dog']
    """

    def __init__(self, text: str) -> None:
        """Parse an expression.

        Raises:
            UsageError: it cannot be parsed, or has something other than conditions on columns.
        """
        self._text = text
        self.columns: dict[str, None] = {}
        """The columns that it names, in their order."""
        if len(text) > _MAX_LENGTH:
            raise UsageError(f"--where has {len(text):,} characters; the maximum is {_MAX_LENGTH:,}")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            self._expression = self._condition(tree)
        except SyntaxError as error:
            raise UsageError(
                f"--where {text[:_SHOWN]!r}: {error.msg}. Write conditions as in Python: == for equality, texts in quotes, "
                "and, or, not in lower case"
            ) from error
        except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            raise UsageError(f"--where {text[:_SHOWN]!r}: {error}") from error

    def apply(self, rows: pa.Table) -> pa.Table:
        """Return the rows that meet the condition.

        Raises:
            UsageError: a value does not have the type of its column.
        """
        try:
            return rows.filter(self._expression)
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"--where {self._text!r} compares a column with a value of another type, or is no condition: {reason}"
            ) from error

    def require_columns(self, names: Collection[str]) -> None:
        """Refuse an expression with a column that no part has.

        Raises:
            UsageError: with the existing columns.
        """
        for name in self.columns:
            if name not in names:
                hint = did_you_mean(name, names) or f"; there are: {', '.join(names)}"
                raise UsageError(f"--where {self._text!r}: there is no column {name!r} (a text needs quotes){hint}")

    def _condition(self, node: ast.expr) -> pc.Expression:
        if isinstance(node, ast.BoolOp):
            parts = [self._condition(value) for value in node.values]
            combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            result = parts[0]
            for part in parts[1:]:
                result = combine(result, part)
            return result
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._condition(node.operand)
        if isinstance(node, ast.Compare):
            return self._comparisons(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Name):
            return self._column(node)
        raise self._unsupported(node)

    def _comparisons(self, node: ast.Compare) -> pc.Expression:
        """Return a comparison, or several in one, such as `0.2 < score < 0.5`."""
        operands = [node.left, *node.comparators]
        result = None
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            part = self._comparison(left, op, right)
            result = part if result is None else result & part
        return result

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot):
            if self._constant(right) is not None:
                raise ValueError("`is` is for None alone; compare values with ==")
            is_null = self._column(left).is_null()
            return is_null if isinstance(op, ast.Is) else ~is_null
        if isinstance(op, ast.In | ast.NotIn):
            if isinstance(right, ast.Name):  # 'text' in column
                text = self._constant(left)
                if not isinstance(text, str):
                    raise self._unsupported(left)
                contained = pc.match_substring(self._column(right), text)
            else:
                column = self._column(left)
                # `isin` is false for null, so that its negation would be true.
                contained = pc.if_else(
                    column.is_valid(), column.isin(self._constants(right)), pa.scalar(None, pa.bool_())
                )
            return contained if isinstance(op, ast.In) else ~contained
        sides = [self._column(side) if isinstance(side, ast.Name) else self._constant(side) for side in (left, right)]
        if not any(isinstance(side, pc.Expression) for side in sides):
            raise self._unsupported(left)
        if None in [side for side in sides if not isinstance(side, pc.Expression)]:
            raise ValueError("write `is None` or `is not None`")
        operands = [side if isinstance(side, pc.Expression) else pc.scalar(side) for side in sides]
        return _ORDERED[type(op)](*operands)

    def _call(self, node: ast.Call) -> pc.Expression:
        function = node.func
        if not (isinstance(function, ast.Attribute) and function.attr in _METHODS and len(node.args) == 1):
            raise self._unsupported(node)
        text = self._constant(node.args[0])
        if node.keywords or not isinstance(text, str):
            raise self._unsupported(node)
        return _METHODS[function.attr](self._column(function.value), text)

    def _column(self, node: ast.expr) -> pc.Expression:
        if not isinstance(node, ast.Name):
            raise self._unsupported(node)
        self.columns[node.id] = None
        return pc.field(node.id)

    def _constant(self, node: ast.expr) -> Any:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._constant(node.operand)
            if isinstance(value, int | float):
                return -value
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
            return node.value
        raise self._unsupported(node)

    def _constants(self, node: ast.expr) -> list[Any]:
        if not isinstance(node, ast.Tuple | ast.List | ast.Set) or not node.elts:
            raise self._unsupported(node)
        values = [self._constant(element) for element in node.elts]
        if None in values:
            raise ValueError("null is in no list: write `or column is None`")
        return values

    def _unsupported(self, node: ast.AST) -> ValueError:
        return ValueError(
            f"`{ast.unparse(node)}` is not supported. Compare a column with a text in quotes or a number (==, !=, <, <=, >, "
            ">=, in, not in, is None, column.startswith('…'), 'text' in column), joined by and, or, not, and parentheses"
        )
