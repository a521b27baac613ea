r"""Finding the final answer in a response, and writing it so that math-verify reads all of it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from asd_megatron.data.answers import marked_answer, outside_thinking

MAX_ANSWER_CHARS = 2_000  # a longer "answer" is none
TAIL_CHARS = 2_000  # where a response without a marked answer is searched

# Spaces, as LaTeX and Unicode write them, and colours. `{,}` is a comma without a space after it;
# zero-width characters are dropped.
SPACE = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:thinspace|medspace|thickspace|enspace|enskip|quad|qquad|space|nobreakspace)(?![A-Za-z]))"
    r"|(?<!\\)\\(?:[hm]space\*?|(?:text)?color|colorbox)\{[^{}]*\}"
    r"|(?<!\\)\\(?:[hm]skip|m?kern) ?-?[\d.]{1,9} ?(?:pt|mu|em|ex|cm|mm|in)(?![A-Za-z])"
    r"|~(?!=)|[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"
)
NOTHING = re.compile(r"(?<!\\)\\(?:!|negthinspace(?![A-Za-z]))\s*|[\u00ad\u200b-\u200f\u2060\ufeff]")
BRACED_SPACE = re.compile(r"(?<=\d)\{ *\}(?=\d)")
DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)(?!\d{3}(?!\d))")  # 3{,}14, but not 10{,}000
CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\u2010": "-",
        "\u2011": "-",
        "\u2012": "-",
        "\u2013": "-",
        "\ufe63": "-",
        "\uff0d": "-",
        "\uff0b": "+",
    }
    | {"\u221e": r"\infty "}
    | {chr(0xFF10 + i): str(i) for i in range(10)}
)

LEADING_DASH = re.compile(r"^\s*\u2014(?=[\d.\\])")  # elsewhere a dash of prose
VULGAR = "\u00bd\u2153\u2154\u00bc\u00be\u2155\u2156\u2157\u2158\u2159\u215a\u215b\u215c\u215d\u215e"
VULGAR_FRACTION = re.compile(rf"(?:(?<=\d) ?|(?<![\w.^}})]))([{VULGAR}])(?![\w^])|(?<![\w.^}})])([{VULGAR}])(?=[a-z])")
ROOT = re.compile(r"\u221a ?(?:(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))|\(([^()]*)\)|(?=\{))")
DEGREES = re.compile(r"(?<=\d) ?\u00b0(?! ?[A-Za-z])")
EMPTY_SET = re.compile(r"\\varnothing(?![A-Za-z])")

# Digits in groups of three: 12 345 (not the mixed number 12 345/346), 1'234'567, 10_000; 0.123 456; 1,234.
GROUPS = re.compile(r"(?<![\w.,])\d{1,3}(?:(?: {1,3}\d{3})+(?! ?/)|(?:['\u2019]\d{3})+|(?:_\d{3})+)(?!['\u2019_]?\d)")
DECIMAL_GROUPS = re.compile(r"(?<=\d)\.\d{3}(?: \d{3})+(?! ?\d)")
THIN = r"(?:\\[,;:]|[\u2006\u2009\u202f])"  # leaves no doubt: 0.000\,01 has an incomplete last group
THIN_DECIMAL_GROUPS = re.compile(rf"(?<=\d)\.\d{{3}}(?:{THIN}\d{{3}})*{THIN}\d{{1,3}}(?!\d)")
COMMA_GROUPS = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+(?:\.\d*)?)")
# 3e6, and 1.5 \times 10^{8}, 3*10^8, 3 x 10^8, 10^{23}. Not part of a longer number, power or fraction.
ALONE = r"(?<![\w.^/*})\]\\])(?<![\^/*] )"
MANTISSA = r"(?P<mantissa>\d{1,100}(?:\.\d{0,100})?|\.\d{1,100})"
SCIENTIFIC = re.compile(ALONE + MANTISSA + r"[eE](?P<exponent>[-+]?\d{1,3})(?!\w|\.\d)")
TIMES = r"\s*(?:\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|\\ast(?![A-Za-z])|[*\u00d7\u00b7\u22c5\u2217xX])\s*"
POWER = (
    r"(?:(?:\^|\*\*)\s*(?:\{\s*(?P<e1>[-+]?\s*\d{1,3})\s*\}|\(\s*(?P<e2>[-+]?\s*\d{1,3})\s*\)|(?P<e3>[-+]?\d{1,3}))"
    r"|(?P<e4>[\u207b\u207a]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,3}))"
)
POWER_OF_TEN = re.compile(ALONE + rf"(?:{MANTISSA}{TIMES})?10{POWER}(?![\w^!]|\.\d| *\^)")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
PLUS = re.compile(r"(?:^|(?<=[=:(,$])|(?<=[=:,] )|(?<=\bis )|(?<=\bequals ))\+(?=\.?\d)")  # `x = +2`, not `x +2`
WHOLE_DECIMAL = re.compile(r"(?<=\d)\.(?=[/*])")  # -1./3

# What stands around an answer without being part of it.
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
MARKDOWN = (
    ("**", "**"),
    ("__", "__"),
    ("```", "```"),
    ("`", "`"),
    ("*", "*"),
    ("_", "_"),
    ('"', '"'),
    ("\u201c", "\u201d"),
)
WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|md|up|sl)?|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|pmb|mbox|hbox|emph"
    r"|underline|ensuremath|operatorname|displaystyle|textstyle|bf|rm|it)(?![A-Za-z])\s*"
)
BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])([^*\n]+?)(?<=[^\s*])\*\*(?![\w(*])")
PARENTHESES = re.compile(r"(?:\\left)?\(\s*([-+]?[\d.]+|[A-Za-z])\s*(?:\\right)?\)")
ANSWER_IS = r"(?:so|thus|therefore|hence)?,?\s*(?:the|my|our)?\s*(?:final|correct)?\s*answer\s*(?:(?:is|=)\s*:?|:)\s*"
LEAD_IN = re.compile(rf"#+\s*|{ANSWER_IS}|\\(?:text(?:bf|it|rm)?|mbox)\{{\s*{ANSWER_IS}\}}", re.IGNORECASE)
# A line that states the answer: `**Answer:** 34`, `The answer is: $\frac12$`, and Minerva's `Final Answer: The final
# answer is $X$. I hope it is correct.` What follows a formula is then a remark, unless it holds another number.
STATEMENT = re.compile(
    r"[^\w$\\]{0,9}(?:(?:(?:so|thus|therefore|hence),? )?(?:(?:the|my|our) )?(?:final |correct )?answer"
    r"[*_]{0,3} ?(?:is ?:?|[:=\uff1a])[*_]{0,3} ?)+",
    re.IGNORECASE,
)
FORMULA_AND_REMARK = re.compile(r"([*_]{0,3}(?:\$[^$]+\$|\$\$[^$]+\$\$|\\\(.+?\\\)|\\\[.+?\\\])[*_]{0,3})[^\d$\\]*")
FORMULA = re.compile(r"\$([^$\n]{1,200})\$")
HOPE = re.compile(r"\.? ?I hope (?:it|this) is correct\.?$")
PROSE = re.compile(r"(?<![\\A-Za-z{])(?!(?:or|and|pi|ln)(?![A-Za-z]))[A-Za-z]{2,}")
WORD = re.compile(r"[A-Za-z]+")
MAX_STATEMENT = 300
CONJUNCTION = re.compile(r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\text ?\{ ?(?:and|or) ?\}")
BRACKETS_OR_COMMA = re.compile(r"\\?(?P<open>[\[({])|\\?(?P<close>[\])}])|\\.|(?P<comma>[,;])", re.DOTALL)
CURRENCY = r"(?:US|A|C)?\\?\$|[\u00a3\u00a5\u20a0-\u20cf]|\\(?:pounds|euro|yen)(?:\{\})?(?![A-Za-z])"
CURRENCY_FIRST = re.compile(rf"([-+]?)\s*(?:{CURRENCY})\s*(?=[-+\d.])")
CURRENCY_LAST = re.compile(rf"(?<=\d)\s*(?:{CURRENCY})$")
LAST_MARK = re.compile(r"(?<!\.)[.,;:]$")

INTEGER = re.compile(r"[-+]?\d{1,1200}")
NUMBER = re.compile(r"[-+]?(?:\d{1,1200}(?:\.\d{0,1200})?|\.\d{1,1200})")
MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
QUANTITY = re.compile(r"([-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?)\s+((?:[A-Za-z]{3,})(?: [A-Za-z]+){0,2})\.?")
NOT_UNITS = frozenset(
    ("and", "or", "half", "third", "quarter", "percent", "dozen", "hundred", "thousand", "million", "billion")
) | {"trillion", "to", "times", "plus", "minus"}


@dataclass(frozen=True)
class Candidate:
    """`text` is the marked answer, tidied, or (marked False) the end of a response that marks none."""

    text: str
    marked: bool


def final_answer(response: str, *, several: bool = False) -> Candidate | None:
    r"""The response's answer, or None if it gives none.

    Think blocks do not count; a response that ends inside one has no answer. Then the last `<answer>...</answer>`,
    else the last `\boxed{...}` or `\fbox{...}` (with `several`, all boxes of the list that it ends), else what follows
    the last `####`, else the last line `Answer: X`, else the tail. A response that ends inside its last tag or box has
    no answer either: it was about to take an earlier one back.
    """
    text = outside_thinking(response)
    if text is None:
        return None
    marked = marked_answer(text, several=several)
    if marked is None:
        marked = _stated(text[-TAIL_CHARS:])
    if marked is None:
        tail = plain_numbers(text[-TAIL_CHARS:]).replace("`", "")
        return Candidate(tail, False) if tail else None
    if not marked or len(marked) > MAX_ANSWER_CHARS:
        return None
    return Candidate(tidy(marked), True)


def gold_answer(answer: str) -> str:
    r"""A problem's answer, tidied; `\boxed{5}` and `#### 5` are read as 5."""
    return tidy(marked_answer(answer, several=True) or answer)


def is_list(answer: str) -> bool:
    r"""Whether a tidied answer is several values: `1, 2`, `\{1, 2\}`, `1 and 2`, not the point `(1, 2)`."""
    text = CONJUNCTION.sub(",", answer).strip()
    braced = text.removeprefix(r"\left")
    if braced.startswith(r"\{") and braced.endswith(r"\}"):
        text = braced[2:-2].removesuffix(r"\right")
    depth = 0
    for m in BRACKETS_OR_COMMA.finditer(text):
        depth += bool(m["open"]) - bool(m["close"])
        if m["comma"] and depth == 0:
            return True
    return False


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Equality where it needs no algebra: the same text, the same number, two integers. None: not decided."""
    if gold == answer:
        return True
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    if NUMBER.fullmatch(gold) and NUMBER.fullmatch(answer) and Fraction(gold) == Fraction(answer):
        return True
    return None


def _stated(text: str) -> str | None:
    """What the last line that states an answer says; None if there is no such line, or if it goes on in words."""
    lines = (" ".join(line.split()) for line in reversed(text.splitlines()))
    found = next(((line, m) for line in lines if (m := STATEMENT.match(line))), None)
    if found is None:
        return None
    line, statement = found
    rest = HOPE.sub("", line[statement.end() :])
    if remark := FORMULA_AND_REMARK.fullmatch(rest):
        rest = remark[1]
    rest = FORMULA.sub(r"\1", rest)
    if not rest or len(rest) > MAX_STATEMENT:
        return None
    answer = tidy(rest)
    return answer if WORD.fullmatch(answer) or not PROSE.search(answer) else None


def tidy(answer: str) -> str:
    r"""The answer alone, plain spellings as LaTeX.

    `**$1,234**` is 1234, `10\,000` is 10000, `1.5e5` is 150000, `\textbf{(073)}` is 073, `50%` is `50\%`, `17 apples`
    is 17, `3 1/2` is `3\frac{1}{2}`.
    """
    text, previous = " ".join(plain_numbers(LEADING_DASH.sub("-", answer)).split()), ""
    while text != previous:
        previous, text = text, _without_surroundings(text)
    if m := COMMA_GROUPS.fullmatch(text):
        return m[1] + m[2].replace(",", "")
    if m := MIXED.fullmatch(text):
        return rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}"
    if (m := QUANTITY.fullmatch(text)) and not NOT_UNITS & set(m[2].lower().split()):
        return tidy(m[1])
    return re.sub(r"(?<!\\)%", r"\\%", text)


def plain_numbers(text: str) -> str:
    r"""`text` with ordinary spaces, and with numbers that math-verify would misread written out: `10\,000` as 10000,
    `3e6` and `3 \times 10^{6}` as 3000000."""
    text = _as_latex(text.translate(CHARACTERS))
    text = DECIMAL_COMMA.sub(".", NOTHING.sub("", text)).replace("{,}", ",")
    text = THIN_DECIMAL_GROUPS.sub(lambda m: re.sub(r"[^.\d]", "", m[0]), text)
    text = BRACED_SPACE.sub(" ", SPACE.sub(" ", text))
    text = GROUPS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = DECIMAL_GROUPS.sub(lambda m: m[0].replace(" ", ""), text)
    text = WHOLE_DECIMAL.sub("", PLUS.sub("", text))
    return SCIENTIFIC.sub(_written_out, POWER_OF_TEN.sub(_written_out, text)).strip()


def _as_latex(text: str) -> str:
    """Unicode's fractions, roots and degrees as LaTeX."""

    def fraction(m: re.Match[str]) -> str:
        value = Fraction(unicodedata.numeric(m[1] or m[2])).limit_denominator(10)
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    text = ROOT.sub(lambda m: r"\sqrt" + (f"{{{m[1] or m[2]}}}" if m[1] or m[2] else ""), text)
    text = DEGREES.sub(lambda m: r"^\circ", VULGAR_FRACTION.sub(fraction, text))
    return EMPTY_SET.sub(lambda m: r"\emptyset", text)


def _written_out(m: re.Match[str]) -> str:
    groups = m.groupdict()
    exponent = next(v for k, v in groups.items() if k.startswith("e") and v is not None)
    shift = int(re.sub(r"\s", "", exponent.translate(SUPERSCRIPTS)))
    mantissa = Decimal(groups["mantissa"] or "1").as_tuple()
    assert isinstance(mantissa.exponent, int)
    return format(Decimal((mantissa.sign, mantissa.digits, mantissa.exponent + shift)), "f")


def _without_surroundings(text: str) -> str:
    """One layer less of delimiters, markdown, text macros, brackets, currency, `the answer is`."""
    text = text.strip()
    for left, right in DELIMITERS + MARKDOWN:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) and left not in inner:
            return inner
    text = BOLD.sub(r"\1", text)
    if m := PARENTHESES.fullmatch(text):
        return m[1]
    macro = WRAPPER.match(text)
    body = text[macro.end() :] if macro else text
    if body and _is_one_group(body):
        return body[1:-1]
    if macro and not body.startswith("{") and body:  # \displaystyle 5, \bf 5
        return body
    if (m := LEAD_IN.match(text)) and m.end() < len(text):
        return text[m.end() :]
    text = CURRENCY_LAST.sub("", CURRENCY_FIRST.sub(r"\1", text)) if len(text) < 100 else text
    text = text.replace(r"\$", "").replace("$", "")
    for mark in ("**", "`"):  # `**#### 5**` leaves its second half
        text = text.removesuffix(mark).removeprefix(mark) if text.count(mark) == 1 else text
    return LAST_MARK.sub("", text)


def _is_one_group(text: str) -> bool:
    """Whether `text` is `{...}` whose first brace closes at the end."""
    if not (text.startswith("{") and text.endswith("}")):
        return False
    depth = 0
    for m in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (m[0] == "{") - (m[0] == "}")
        if depth == 0:
            return m.end() == len(text)
    return False
