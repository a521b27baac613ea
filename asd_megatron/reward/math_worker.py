r"""The judge of `math.py`'s workers (`worker_program.py`): from `{"gold": LATEX, "text": TEXT}` to `{"equal": BOOL}`.

It imports math_verify, nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load() -> Callable[[dict[str, Any]], dict[str, Any]]:
    compare = load_compare()
    if not compare("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}") or compare("\\boxed{1}", "\\boxed{2}"):
        raise SystemExit("math_verify does not know that 1/2 is 0.5 and 1 is not 2: the installation is broken")
    return lambda request: {"equal": bool(compare(request["gold"], request["text"]))}


def load_compare() -> Any:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> Any:
        # math_verify's own limits need SIGALRM and would hide behind a silent []; the parent's bound replaces them
        return parse(text, configs, parsing_timeout=None, raise_on_error=True)

    def compare(gold: str, text: str) -> bool:
        answer = read(text)
        return bool(answer) and verify(read(gold), answer, timeout_seconds=None, raise_on_error=True)

    return compare
