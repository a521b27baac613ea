r"""Readers of rows as published sets have them: one function for each schema (`schemas` declares which rows it reads).

A reader takes a row and returns a canonical one, with `prompt` or `messages`, and `answer` or `tests`; it raises
LineError for a row that the schema does not allow, and NoAnswer for one that is left out because its set, as published,
has such rows.
"""

from __future__ import annotations

import re
from typing import Any

from asd_megatron.data import code_tests
from asd_megatron.data.answers import HASHES, last_boxed, last_hashes
from asd_megatron.data.jsonl import Line, LineError, kind_of, optional_text_field, scalar_field, text_field

CALCULATOR = re.compile(r"<<[^<>\n]*>>")
PROGRAM = (
    "Read the input from standard input and write the answer to standard output. Give the complete Python program in"
    " one fenced code block."
)
COMPLETE = "Complete this code, and give it completely in one fenced code block.\n\n```python\n{code}\n```"
FUNCTION = "Write the Python function `{name}`, and give it in one fenced code block."
DAPO_BEFORE = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form Answer:"
    r"[^\n]{0,200}\n\n"
)
DAPO_AFTER = re.compile(r'\n\nRemember to put your answer on its own line after "Answer:"[^\n]{0,200}\Z')
UNANSWERED = ("proof", "notfound")  # in NuminaMath-1.5's `answer`


class NoAnswer(LineError):
    """The row has no final answer that could be judged."""


# ---------------------------------------------------------------- mathematics


def canonical(line: Line) -> Line:
    """The row as it is."""
    return line


def competition(line: Line) -> Line:
    """A row with a problem, and an answer or a solution that holds one."""
    given = first(line, "problem", "Problem")
    solution = optional_text_field({"solution": first(line, "solution", "Solution")}, "solution")
    problem = text_field({"problem": given}, "problem")
    if problem is None:
        raise LineError("`problem` is missing (the first line of this file has it)")
    out = _without(line, "problem", "Problem", "Solution", "Answer", "expected_answer", "ID", "messages", "generations")
    out |= {"prompt": problem, "solution": solution, "answer": first(line, "answer", "Answer", "expected_answer")}
    identity = first(line, "id", "ID", "idx", "problem_idx", "unique_id", "uuid")
    if identity is not None:
        out["id"] = identity
    answer = out["answer"]
    if answer is None or isinstance(answer, str) and answer.strip().lower() in ("", *UNANSWERED):
        boxed = last_boxed(solution or "")
        if boxed is None or not boxed.content:
            raise NoAnswer("no `answer`, and no `\\boxed{...}` in `solution` to take it from")
        out["answer"] = boxed.content
    return out


def gsm8k(line: Line) -> Line:
    """A row with `question`, and an `answer` that ends in `#### N`."""
    question, worked = text_field(line, "question"), text_field(line, "answer")
    if question is None or worked is None:
        raise LineError("`question` or `answer` is missing (the first line of this file is in GSM8K's schema)")
    answer = last_hashes(worked)
    if not answer:
        raise LineError(
            f"`answer` has no final line `{HASHES} N`; to give a plain answer name the fields `prompt` and `answer`"
        )
    out = _without(line, "question", "answer", "solution", "messages")
    return out | {"prompt": question, "answer": answer, "solution": CALCULATOR.sub("", worked).strip()}


def question(line: Line) -> Line:
    """A row with `question` and a plain `answer`, or OlympiadBench's `final_answer`."""
    text = text_field(line, "question")
    if text is None:
        raise LineError("`question` is missing (the first line of this file has it)")
    answer = first(line, "answer", "final_answer")
    if isinstance(answer, list):
        if not answer or not all(isinstance(part, str) for part in answer):
            raise NoAnswer("`final_answer` holds no text")
        answer = ", ".join(answer)
    if answer is None:
        raise NoAnswer("no `answer`")
    solution = line.get("solution")
    solution = "\n\n".join(map(str, solution)) if isinstance(solution, list) else solution
    out = _without(line, "question", "final_answer", "messages")
    return out | {"prompt": text, "answer": answer, "solution": solution}


def verl(line: Line) -> Line:
    """A row of verl: turns, and the ground truth in `reward_model`."""
    model = line.get("reward_model")
    if not isinstance(model, dict) or model.get("ground_truth") is None:
        raise LineError("`reward_model.ground_truth` is missing")
    given = line.get("extra_info")
    info: Line = given if isinstance(given, dict) else {}
    out = _asked(line, line.get("prompt"), "prompt") | _judged(model["ground_truth"], _is_code(line), "ground_truth")
    worked = info.get("solution") or info.get("answer")
    if isinstance(worked, str) and (HASHES in worked or "\\boxed" in worked):
        out["solution"] = CALCULATOR.sub("", worked).strip()
    if isinstance(info.get("index"), str):  # a number counts within one source and one split
        out["id"] = info["index"]
    return out


def verl_bare(line: Line) -> Line:
    """As `verl`, without the instruction that DAPO-Math-17k puts around every problem."""
    out = verl(line)
    if isinstance(out.get("prompt"), str):
        out["prompt"] = DAPO_AFTER.sub("", DAPO_BEFORE.sub("", out["prompt"]))
    return out


def labelled(line: Line) -> Line:
    """A row of slime: a prompt, as text or turns, and `label`."""
    return _asked(line, line.get("prompt"), "prompt") | {"answer": line.get("label")}


def ground_truth(line: Line) -> Line:
    """A row of open-instruct (Dolci): `prompt` or `messages`, and `ground_truth`: an answer, or tests."""
    name = "prompt" if line.get("prompt") is not None else "messages"
    truth = line["ground_truth"] if line.get("ground_truth") is not None else ""
    return _asked(line, line.get(name), name) | _judged(truth, _is_code(line), "ground_truth")


# ---------------------------------------------------------------- code


def apps(line: Line) -> Line:
    """A row of APPS or TACO."""
    starter, identity = line.get("starter_code"), first(line, "id", "problem_id")
    out = _code(line, text_field(line, "question"), line.get("input_output"), "input_output", starter=starter)
    return out if identity is None else out | {"id": identity}


def deepcoder(line: Line) -> Line:
    """A row of DeepCoder-Preview, whose `tests` are JSON text."""
    return _code(
        line, text_field(line, "problem"), line.get("tests"), "tests", starter=line.get("starter_code"), called=line
    )


def prime(line: Line) -> Line:
    """A row of PrimeIntellect's verifiable-coding-problems or open-r1's, whose prompts are complete."""
    problem = text_field(line, "prompt") or text_field(line, "problem")
    return _code(line, problem, line.get("verification_info"), "verification_info", complete=True)


def livecodebench(line: Line) -> Line:
    """A row of LiveCodeBench, with its public and its private tests."""
    tests: list[Any] = []
    for name in ("public_test_cases", "private_test_cases"):
        part = code_tests.unpack(line.get(name), name)
        if not isinstance(part, list):
            raise LineError(f"`{name}` must hold a list of tests, found {kind_of(part)}")
        tests += part
    out = _without(line, "public_test_cases", "private_test_cases")
    problem, starter = text_field(line, "question_content"), line.get("starter_code")
    out = _code(out, problem, tests, "public_test_cases", starter=starter, called=line)
    return out if line.get("question_id") is None else out | {"id": line["question_id"]}


def humaneval(line: Line) -> Line:
    """A row of HumanEval: a stub to complete, and a function `check`."""
    stub, test, name = (text_field(line, field) for field in ("prompt", "test", "entry_point"))
    if stub is None or test is None or name is None:
        raise LineError("`prompt`, `test` or `entry_point` is missing (the first line of this file has them)")
    out = _without(line, "prompt", "test", "canonical_solution", "task_id")
    solution = line.get("canonical_solution")
    return out | {
        "prompt": COMPLETE.format(code=stub.strip("\n")),
        "tests": [{"assert": f"{test}\n\ncheck({name})"}],
        "setup": code_tests.before_function(stub, name),
        "solution": _fenced(f"{stub}{solution}") if isinstance(solution, str) else None,
        **({"id": line["task_id"]} if line.get("task_id") is not None else {}),
    }


def mbpp(line: Line) -> Line:
    """A row of MBPP, complete or sanitized; the student is shown its assert statements, as is usual."""
    task, asserts = first(line, "text", "prompt"), line.get("test_list")
    if not isinstance(task, str) or not isinstance(asserts, list) or not all(isinstance(a, str) for a in asserts):
        raise LineError("`text` or `test_list` is missing (the first line of this file has them)")
    shown = "\n".join(asserts)
    out = _without(line, "text", "code", "test_list", "test_setup_code", "test_imports", "task_id")
    imports = line.get("test_imports")
    setup = "\n".join(imports) if isinstance(imports, list) else line.get("test_setup_code")
    return out | {
        "prompt": f"{task}\n\nGive the Python code in one fenced code block. It must pass these tests:\n\n{shown}",
        "tests": [{"assert": text} for text in asserts],
        "setup": setup or None,
        "solution": _fenced(line["code"]) if isinstance(line.get("code"), str) else None,
        **({"id": line["task_id"]} if line.get("task_id") is not None else {}),
    }


# ---------------------------------------------------------------- parts


def first(line: Line, *names: str) -> Any:
    """The first of these fields that is not null."""
    return next((line[name] for name in names if line.get(name) is not None), None)


def _without(line: Line, *names: str) -> Line:
    return {name: value for name, value in line.items() if name not in names}


def _fenced(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _asked(line: Line, given: Any, name: str) -> Line:
    """The row without the fields of question and ground truth, with `prompt` (a text, or a single user turn) or
    `messages`. Turns after the last user turn are dropped."""
    out = _without(line, "prompt", "messages", "reward_model", "ground_truth", "label")
    if isinstance(given, str):
        return out | {"prompt": given}
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise LineError(f"`{name}` must be text or a list of turns, found {kind_of(given)}")
    turns = [{key: turn.get(key) for key in ("role", "content")} for turn in given]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns:
        raise LineError(f"`{name}` has no user turn")
    return out | ({"prompt": turns[0]["content"]} if len(turns) == 1 else {"messages": turns})


def _is_code(line: Line) -> bool:
    kinds = [line.get("ability"), line.get("data_source"), line.get("dataset")]
    texts = [kind for value in kinds for kind in (value if isinstance(value, list) else [value])]
    return any(isinstance(text, str) and re.search(r"cod(?:e|ing)", text, re.IGNORECASE) for text in texts)


def _judged(truth: Any, code: bool, name: str) -> Line:
    """`answer` or `tests` from a ground truth: tests where the row says that it is code, or each text of a list is an
    assert statement."""
    asserts = isinstance(truth, list) and bool(truth) and all(isinstance(t, str) and "assert" in t for t in truth)
    if asserts or code:
        return {"answer": None, "tests": code_tests.read_tests(truth, name)}
    if isinstance(truth, str) and truth.startswith('["') and truth.endswith('"]'):  # a list as JSON text (Skywork-OR1)
        truth = code_tests.from_json(truth, name)
    if isinstance(truth, list):  # open-instruct writes an answer as a list of one
        if len(truth) != 1:
            raise NoAnswer(f"`{name}` must hold one answer, found {len(truth)}")
        truth = truth[0]
    answer = scalar_field({name: truth}, name)
    if answer is None:
        raise LineError(f"`{name}` is empty")
    return {"answer": truth}


def _code(
    line: Line,
    problem: str | None,
    tests: Any,
    name: str,
    *,
    starter: Any = None,
    called: Line | None = None,
    complete: bool = False,
) -> Line:
    """A code problem with what the student has to know to answer it. called: a row whose `metadata` may name the
    function (`func_name`). complete: the problem's text says everything."""
    if problem is None or tests is None:
        raise LineError(f"the problem or `{name}` is missing (the first line of this file has them)")
    metadata = code_tests.from_json((called or {}).get("metadata") or {}, "metadata")
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    found = code_tests.read_tests(tests, name, function)
    calls = next((test["function"] for test in found if "function" in test), None)
    if isinstance(starter, str) and starter.strip():
        problem = f"{problem.strip()}\n\n{COMPLETE.format(code=starter.strip())}"
    elif not complete:
        problem = f"{problem.strip()}\n\n{PROGRAM if calls is None else FUNCTION.format(name=calls)}"
    asked = ("question", "question_content", "problem", "prompt", "messages", "starter_code", "metadata", name)
    out = _without(line, *asked, "solutions", "solution", "answer", "gold_standard_solution")
    if calls is not None and "class Solution" in problem:
        out.setdefault("setup", code_tests.SOLUTION_SETUP)
    return out | {"prompt": problem, "tests": found}
