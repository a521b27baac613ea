r"""The judge of `math.py`'s workers (`worker_program.py`): from `{"gold": LATEX, "text": TEXT}` to `{"equal": BOOL}`.

It imports math_verify (and sympy, which math_verify is made of), nothing of ours.

Numbers are compared more strictly than math_verify does, which calls any two numbers equal that agree to 6 decimals
(0.0000001 and 0, 2^-99 and 2^-98):

* two exact numbers (integers, fractions, roots, pi) are equal if they are equal exactly: 1/3 is not 333333/1000000;
* a decimal (0.333333, 1.6e-19) equals another number if they agree to 6 decimals and, below 0.1, to 6 significant
  digits: 0.333333 is 1/3, 0.3333 is not, and 1.6e-19 is neither 0 nor 9.1e-31;
* an infinity, however written, equals only the same infinity, and what has no value (0/0, 1/0) equals nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

DECIMALS = 6
DIGITS = 30  # of a number that is not rational; equal if they agree to 20
SELF_CHECK = (
    (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", True),
    (r"\boxed{1}", r"\boxed{2}", False),
    (r"\boxed{\frac{1}{3}}", r"\boxed{0.333333}", True),
    (r"\boxed{0.0000001}", r"\boxed{0.0000004}", False),
    (r"\boxed{\infty}", r"\boxed{2\infty}", True),
    (r"\boxed{5}", r"\boxed{\infty}", False),
    (r"\boxed{(1,2)}", r"\boxed{(-\infty,\infty)}", False),
)


def load() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The judge, after a check of the installed math_verify."""
    compare = load_compare()
    for gold, text, equal in SELF_CHECK:
        if compare(gold, text) != equal:
            raise SystemExit(
                f"math_verify compares {gold} and {text} wrongly: the installation is broken, or this release of"
                " math-verify is another than asd_megatron knows. Install the one of constraints.txt"
            )
    return lambda request: {"equal": compare(request["gold"], request["text"])}


def load_compare() -> Callable[[str, str], bool]:
    """The comparison of an expected answer with a text."""
    import math_verify.grader
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import nan, zoo

    math_verify.grader.sympy_numeric_eq = numeric_equality(math_verify.grader.sympy_numeric_eq)
    math_verify.grader.sympy_symbolic_eq = symbolic_equality(math_verify.grader.sympy_symbolic_eq)
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]

    def read(text: str) -> list[Any]:
        """The expressions read from a text, and the text itself, by which math_verify compares what it cannot read.

        `12:00` is read as a division by zero: such values are left out, so that the text decides.
        """
        # math_verify's own time limits need SIGALRM and would hide behind a silent []; the worker is limited instead
        found = parse(text, configs, parsing_timeout=None, raise_on_error=True)
        return [value for value in found if value is not nan and value is not zoo]

    def compare(gold: str, text: str) -> bool:
        """Whether any reading of `text` equals one of `gold`. Raises what math_verify raises if none does."""
        error: Exception | None = None
        for pair in product(read(gold), read(text)):
            try:
                if verify(*pair, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception as e:
                error = e
        if error is not None:
            raise error
        return False

    return compare


def numeric_equality(original: Callable[[Any, Any, int, int], bool]) -> Callable[[Any, Any, int, int], bool]:
    """`original`, math_verify's comparison of two sympy expressions, with numbers compared as said above.

    Matrices are left to `original` (it comes back here with their elements), and so is its convention that 9% is 9
    where both sides are integers.
    """
    from math_verify.grader import is_atomic_or_pct_atomic
    from sympy import Float, Integer, MatrixBase, MatrixExpr

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        matrices = any(isinstance(x, MatrixBase | MatrixExpr) for x in (a, b))
        if matrices or all(is_atomic_or_pct_atomic(x, Integer) for x in (a, b)):
            return original(a, b, float_rounding, numeric_precision)
        decimal = any(is_atomic_or_pct_atomic(x, Float) for x in (a, b))
        try:
            left, right = exact(a), exact(b)
            if any(has_no_value(x) for x in (left, right)):
                return False
            if left == right:
                return True
            if not (left.is_number and right.is_number):  # equal coefficients that are not tiny, and tiny ones alike
                equal = original(left, right, float_rounding, numeric_precision)
                return equal and agree(*at_one_point(left, right), decimal=False)
            return agree(left, right, decimal=decimal)
        except (AttributeError, TypeError, ValueError):  # not numbers: math_verify then compares symbolically
            return original(a, b, float_rounding, numeric_precision)

    return numeric_eq


def symbolic_equality(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    r"""`original`, math_verify's comparison of two sympy expressions by simplifying their difference, with infinite
    numbers compared as they are: sympy draws points at random to simplify 5 - \sqrt{\infty}, and found 0 at times."""
    from sympy import Expr, oo

    def symbolic_eq(a: Any, b: Any) -> bool:
        if isinstance(a, Expr) and isinstance(b, Expr) and a.is_number and b.is_number:
            left, right = exact(a), exact(b)
            if any(x.has(oo, -oo) for x in (left, right)):
                return bool(left == right)
        return original(a, b)

    return symbolic_eq


def exact(value: Any) -> Any:
    """The expression evaluated, its decimals as fractions: 1.6 * 10^(-19) becomes 16/10^20."""
    from sympy import Float, Rational

    return value.xreplace({f: Rational(str(f)) for f in value.atoms(Float)}).doit()


def has_no_value(value: Any) -> bool:
    """Whether the expression holds a quotient like 0/0 or 1/0."""
    from sympy import nan, zoo

    return bool(value.has(nan, zoo))


def at_one_point(a: Any, b: Any) -> tuple[Any, Any]:
    """Two expressions with the same values, all different, in place of their variables."""
    from sympy import Rational

    variables = sorted(a.free_symbols | b.free_symbols, key=str)
    values = {v: Rational(17 + 12 * i, 13) for i, v in enumerate(variables)}
    return a.subs(values), b.subs(values)


def agree(a: Any, b: Any, *, decimal: bool) -> bool:
    """Whether two numbers are equal: exactly, to 20 digits if they are not rational, or as a decimal is.

    Every comparison of a difference holds where both sides of it are infinite, so infinities are told apart first.
    """
    from sympy import Rational, floor, log

    if not (a.is_Rational and b.is_Rational):
        a, b = a.evalf(DIGITS), b.evalf(DIGITS)
        if not (a.is_comparable or (a.is_complex and a.is_number)):
            return False
    if has_no_value(a) or has_no_value(b):
        return False
    if not (a.is_finite and b.is_finite):
        return bool(a == b)
    gap, size = abs(a - b), max(abs(a), abs(b))
    if not decimal:
        exactly = bool(a.is_Rational and b.is_Rational)
        return gap == 0 if exactly else bool(gap <= size * Rational(1, 10**20))
    half_a_unit = Rational(1, 2 * 10**DECIMALS)
    if 10 * size < 1 and size > 0:
        half_a_unit *= Rational(10) ** (int(floor(log(size.evalf(), 10))) + 1)
    return bool(gap <= half_a_unit)
