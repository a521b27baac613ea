"""Asserts whose right results do not enter the process of the tested program.

    assert f(3) == [1, 2]                 ->  RECORD(0, f(3))            and [1, 2] is kept here
    def check(candidate):
        assert candidate("a") == "b"      ->  RECORD(1, candidate("a"))  and "b" is kept here
        assert abs(candidate(2)) < 1e-6       stays an assert
    check(f)

An assert that compares with a literal, alone at the top or directly in the body of a function at the top, becomes a
record of the other side: the program can neither see the literal nor pass by an object that equals everything. Other
asserts stay as they are and run beside the program.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asd_megatron.sandbox.supervisor import RECORD


@dataclass(frozen=True)
class Asserts:
    """`text` records values by index; `expected` holds what they have to be, and `required` the indices that every
    complete run records."""

    text: str
    expected: Mapping[int, Any]
    required: frozenset[int]


def rewritten(text: str) -> Asserts:
    """The statements `text` with its comparisons taken out. Raises SyntaxError."""
    module = ast.parse(text)
    called = {
        s.value.func.id
        for s in module.body
        if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) and isinstance(s.value.func, ast.Name)
    }
    expected: dict[int, Any] = {}
    required: set[int] = set()

    def record(statement: ast.stmt, always: bool) -> ast.stmt:
        found = _comparison(statement)
        if found is None:
            return statement
        index = len(expected)
        expression, expected[index] = found
        if always:
            required.add(index)
        call = ast.Call(ast.Name(RECORD, ast.Load()), [ast.Constant(index), expression], [])
        return ast.copy_location(ast.Expr(call), statement)

    module.body = [record(statement, True) for statement in module.body]
    for function in module.body:
        if isinstance(function, ast.FunctionDef):
            returns = any(isinstance(node, ast.Return) for node in ast.walk(function))
            always = function.name in called and not function.decorator_list and not returns
            function.body = [record(statement, always) for statement in function.body]
    if not expected:
        return Asserts(text, {}, frozenset())
    return Asserts(ast.unparse(ast.fix_missing_locations(module)), expected, frozenset(required))


def _comparison(statement: ast.stmt) -> tuple[ast.expr, Any] | None:
    """(expression, literal) of `assert expression == literal`, either way round."""
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)):
        return None
    compare = statement.test
    if len(compare.ops) != 1 or not isinstance(compare.ops[0], ast.Eq):
        return None
    left, right = compare.left, compare.comparators[0]
    for expression, literal in ((left, right), (right, left)):
        try:
            value = ast.literal_eval(literal)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if value is not Ellipsis:
            return expression, value
    return None
