"""The judge of `reasoning_gym.py`'s workers (`worker_program.py`): regenerates a problem's item and scores an
answer with the task's own verifier.

From `{"task", "parameters", "seed", "size", "index", "digest", "answer"}` to `{"score": NUMBER}`, or to
`{"changed": true}` when the item is not the one that the problem was made from.

Some of those verifiers run an answer as Python (`eval`, directly or inside sympy's `parse_expr`), where it could read
the expected answer or touch the machine. Here `eval` of an answer takes literals alone, `parse_expr` arithmetic alone,
and a worker that has loaded writes no file, starts no process and opens no connection.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

EVALUATED = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
ARITHMETIC = re.compile(r"(?:[^\W_]|[\s+\-*/^().,!|])*")
NOT_ARITHMETIC = re.compile(r"\.\s*[^\W\d]|\)\s*\(")  # an attribute, a call of what an expression gives
CALLED = re.compile(r"([^\W\d]\w*)\s*\(")
FUNCTIONS = re.compile(r"abs|Abs|exp|ln|log|sqrt|cbrt|a?(?:sin|cos|tan|cot|sec|csc)h?")
FORBIDDEN = (
    *("os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn", "os.remove"),
    *("os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system", "pty.", "shutil.", "socket.", "subprocess."),
)


def load() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The judge, in a process that can no longer write files, start processes or open connections."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would use up the bounded address space
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    _guard_sympy()
    tasks = importlib.import_module("asd_megatron.gym.tasks")
    tasks.registry()
    for module in EVALUATED:
        vars(importlib.import_module(module))["eval"] = ast.literal_eval
    dataset_of = lru_cache(maxsize=8)(
        lambda task, parameters, seed, size: tasks.make_dataset(task, json.loads(parameters), seed=seed, size=size)
    )
    item_of = lru_cache(maxsize=512)(lambda *key: tasks.make_item(dataset_of(*key[:-1]), key[-1]))

    def judge(request: dict[str, Any]) -> dict[str, Any]:
        key = (request["task"], json.dumps(request["parameters"]), request["seed"], request["size"])
        item = item_of(*key, request["index"])
        if tasks.digest(item) != request["digest"]:
            return {"changed": True}
        # a copy: the verifier might change what it is shown
        return {"score": float(dataset_of(*key).score_answer(request["answer"], copy.deepcopy(item)))}

    sys.addaudithook(_audit)
    return judge


def _guard_sympy() -> None:
    modules = [importlib.import_module(name) for name in ("sympy.parsing.sympy_parser", "sympy.parsing", "sympy")]
    parse = modules[0].parse_expr

    def parse_arithmetic(text: str, *args: Any, **kwargs: Any) -> Any:
        if not is_arithmetic(text):
            raise ValueError("not an expression of numbers, names, operators and known functions")
        return parse(text, *args, **kwargs)

    for module in modules:
        vars(module)["parse_expr"] = parse_arithmetic


def is_arithmetic(text: str) -> bool:
    """Whether `text` can be given to sympy, which runs it as Python, without being a program."""
    if ARITHMETIC.fullmatch(text) is None or NOT_ARITHMETIC.search(text) is not None:
        return False
    return all(FUNCTIONS.fullmatch(name) for name in CALLED.findall(text))


def _audit(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"{event} in a reward worker")
