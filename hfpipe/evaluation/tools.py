"""Tools that an evaluation or a chat carries out when a model calls them: the calculator."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> int | float:
    """The value of an arithmetic expression of numbers, + - * / and brackets; ValueError for anything else."""

    def value(node: ast.AST) -> int | float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError(f"not arithmetic: {expression[:80]!r}")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"not arithmetic: {expression[:80]!r}") from error


def calculator(arguments: Any) -> str:
    """The tool `calculator`: an expression, as text or as `{"expression": text}`; an error is told as the result."""
    expression = next(iter(arguments.values()), "") if isinstance(arguments, dict) else arguments
    try:
        return str(calculate(str(expression)))
    except ValueError as error:
        return f"error: {error}"


TOOLS: dict[str, Callable[[Any], str]] = {"calculator": calculator}
