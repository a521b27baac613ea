"""Tests of code problems in the one form that the code reward judges.

`tests` is a list of objects, each one of

    {"input": TEXT, "output": TEXT}                          standard input, expected standard output
    {"assert": PYTHON}                                       statements that raise for a wrong program
    {"function": NAME, "arguments": [...], "expected": VALUE}  a call of a function, or of a method of class Solution

`setup` is Python text that runs before the response's program.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from asd_megatron.data.jsonl import LineError, kind_of, parse_json

Test = dict[str, Any]
FORMS = ({"input", "output"}, {"assert"}, {"function", "arguments", "expected"})
SOLUTION_SETUP = """\
from typing import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from bisect import *
from builtins import pow
import bisect, collections, functools, heapq, itertools, math, random, re, string
"""
"""What LeetCode imports before a class Solution, whose stub has names like List."""
MAX_UNPACKED_BYTES = 256 << 20  # of one problem's packed tests
TEXT_ONLY = {
    *("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
}
"""Operations of a pickle that is a text and nothing else."""


def check_tests(value: Any) -> None:
    """Raise LineError unless `value` is a list of tests in the form above, or a number of tests (for rewards of a
    user's own)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return
    if not isinstance(value, list):
        raise LineError(f"`tests` must be a list of tests, found {kind_of(value)}")
    for number, test in enumerate(value, start=1):
        form = next((f for f in FORMS if isinstance(test, dict) and set(test) == f), None)
        if form is None:
            raise LineError(
                f"test {number} of `tests` must have the fields `input` and `output`, or `assert`, or `function`,"
                " `arguments` and `expected`"
            )
        texts = form - {"arguments", "expected"}
        wrong = next((name for name in sorted(texts) if not isinstance(test[name], str)), None)
        if wrong is not None:
            raise LineError(f"`{wrong}` of test {number} must be text, found {kind_of(test[wrong])}")
        if "arguments" in form and not isinstance(test["arguments"], list):
            raise LineError(f"`arguments` of test {number} must be a list, found {kind_of(test['arguments'])}")


def is_judged(value: Any) -> bool:
    """Whether `value` is a list of tests in the form above, at least one."""
    if not isinstance(value, list) or not value:
        return False
    try:
        check_tests(value)
    except LineError:
        return False
    return True


def from_json(value: Any, name: str) -> Any:
    """The JSON value of a field that holds it as text; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except LineError as e:
        raise LineError(f"`{name}` is {e}") from e


def read_tests(value: Any, name: str, function: str | None = None) -> list[Test]:
    """Tests given as `{"inputs": [...], "outputs": [...], "fn_name": NAME}` (APPS, TACO, verl; `function` if there is
    no `fn_name`), as a list of `{"input": ..., "output": ...}` (DeepCoder, PrimeIntellect, LiveCodeBench), or as a list
    of assert statements; as JSON text too. Raises LineError."""
    value = from_json(value, name)
    if isinstance(value, Mapping) and isinstance(value.get("test_cases"), list):  # PrimeIntellect
        value = value["test_cases"]
    if isinstance(value, Mapping) and "inputs" in value:
        inputs, outputs = value["inputs"], value.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise LineError(f"`inputs` and `outputs` of `{name}` must be lists of the same length")
        function = _function(value, function)
        rows = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
        tests = _calls(rows, function) if function else [_program(row, name) for row in rows]
    elif isinstance(value, list):
        tests = _listed(value, name, function)
    else:
        raise LineError(f"`{name}` must hold tests, found {kind_of(value)}")
    if not tests:
        raise LineError(f"`{name}` holds no tests")
    return tests


def _listed(rows: Sequence[Any], name: str, function: str | None) -> list[Test]:
    if all(isinstance(row, str) for row in rows):
        return [{"assert": row.strip()} for row in rows]
    if not all(isinstance(row, Mapping) and "input" in row and "output" in row for row in rows):
        raise LineError(f"`{name}` must be a list of tests with `input` and `output`, or of assert statements")
    named = {_function(row, function) for row in rows}
    kinds = {str(row.get("testtype") or row.get("type") or "stdin") for row in rows}
    if kinds <= {"stdin", "stdin_stdout"}:
        return [_program(row, name) for row in rows]
    if kinds == {"functional"}:  # LiveCodeBench: one JSON value a line for each argument, as text
        return [_functional(row, _function(row, function), name) for row in rows]
    if kinds == {"function_call"} and len(named) == 1 and None not in named:
        return _calls(rows, str(named.pop()))
    raise LineError(f"`{name}` holds tests of the kinds {', '.join(sorted(kinds))}, which are not read together")


def _function(row: Mapping[str, Any], default: str | None) -> str | None:
    """The function that a test calls; `default` where the test names none."""
    name = row.get("fn_name") or default
    if name is not None and not isinstance(name, str):
        raise LineError(f"`fn_name` must be text, found {kind_of(name)}")
    return name


def _program(row: Mapping[str, Any], name: str) -> Test:
    """A test by standard input and output; lists are lines, as in APPS."""
    texts = {key: _lines(row[key]) for key in ("input", "output")}
    wrong = next((key for key, text in texts.items() if text is None), None)
    if wrong is not None:
        raise LineError(f"`{wrong}` of a test of `{name}` must be text, found {kind_of(row[wrong])}")
    return texts


def _lines(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def _calls(rows: Sequence[Mapping[str, Any]], function: str) -> list[Test]:
    """Calls of a function. Some sets wrap each expected value in a list: if all are lists of one, these are removed."""
    expected = [row["output"] for row in rows]
    wrapped = all(isinstance(value, list) and len(value) == 1 for value in expected)
    values = [value[0] if wrapped else value for value in expected]
    arguments = [row["input"] for row in rows]
    if not all(isinstance(given, list) for given in arguments):
        raise LineError(f"the arguments of {function} must be lists")
    return [
        {"function": function, "arguments": given, "expected": value}
        for given, value in zip(arguments, values, strict=True)
    ]


def _functional(row: Mapping[str, Any], function: str | None, name: str) -> Test:
    if not function:
        raise LineError(f"`{name}` calls a function that `metadata` does not name (`func_name`)")
    lines = [line for line in str(row["input"]).split("\n") if line.strip()]
    arguments = [from_json(line, name) for line in lines]
    return {"function": function, "arguments": arguments, "expected": from_json(row["output"], name)}


def unpack(text: Any, name: str) -> Any:
    """Tests as LiveCodeBench packs them: JSON text, or base64 of zlib of a pickled JSON text. The pickle is read as a
    list of operations, never run, and refused if it is more than one text. Raises LineError."""
    if not isinstance(text, str) or text.lstrip()[:1] in ("[", ""):
        return from_json(text, name) if text else []
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text, validate=True), MAX_UNPACKED_BYTES)
        if inflate.unconsumed_tail:
            raise LineError(f"`{name}` unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
        operations = [(operation.name, argument) for operation, argument, _ in pickletools.genops(data)]
    except (binascii.Error, zlib.error, ValueError, KeyError, IndexError) as e:
        raise LineError(f"`{name}` is neither JSON nor packed as LiveCodeBench's: {e}") from e
    texts = [argument for operation, argument in operations if "UNICODE" in operation]
    if len(texts) != 1 or {operation for operation, _ in operations} - TEXT_ONLY:
        raise LineError(f"`{name}` holds a pickle that is more than a text: it is not read")
    return from_json(texts[0], name)


def before_function(code: str, function: str) -> str:
    """What stands before `def function` in a stub: imports and helper functions."""
    found = list(re.finditer(rf"^[ \t]*def[ \t]+{re.escape(function)}\b", code, re.MULTILINE))
    return code[: found[-1].start()] if found else ""


def as_key(tests: Any) -> str:
    """A text that is equal for equal tests."""
    return json.dumps(tests, sort_keys=True, ensure_ascii=False)
