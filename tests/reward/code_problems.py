"""Small programming problems of all three forms of tests, each with programs and how many tests each of them passes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CodeProblem:
    """`programs`: text and the number of tests that it passes, the right one first."""

    name: str
    question: str
    tests: Sequence[Mapping[str, Any]]
    programs: Sequence[tuple[str, int]]
    setup: str = ""


def problem(
    name: str, question: str, tests: Sequence[Mapping[str, Any]], *programs: tuple[str, int], setup: str = ""
) -> CodeProblem:
    return CodeProblem(name, question, tests, [(textwrap.dedent(p).strip() + "\n", n) for p, n in programs], setup)


def stdin(*cases: tuple[str, str]) -> list[dict[str, str]]:
    return [{"input": given, "output": output} for given, output in cases]


def calls(function: str, *cases: tuple[list[Any], Any]) -> list[dict[str, Any]]:
    return [{"function": function, "arguments": arguments, "expected": value} for arguments, value in cases]


def asserts(*texts: str) -> list[dict[str, str]]:
    return [{"assert": textwrap.dedent(text).strip()} for text in texts]


PROBLEMS = (
    # ------------------------------------------------------------- stdin and stdout
    problem(
        "sum",
        "Read two integers, each on a line of its own. Print their sum.",
        stdin(("1\n2\n", "3\n"), ("-5\n5\n", "0\n"), ("10000000000000000000\n1\n", "10000000000000000001")),
        ("print(int(input()) + int(input()))", 3),
        ("print(int(input()) - int(input()))", 0),
        ("print(int(float(input()) + float(input())))", 2),
        ("a = int(input())\nprint(a + int(input()) + int(input()))", 0),
    ),
    problem(
        "average",
        "Read a line of numbers. Print their average.",
        stdin(("1 2\n", "1.5\n"), ("1 1 2\n", "1.3333333333\n"), ("3\n", "3.0")),
        ("x = list(map(float, input().split()))\nprint(sum(x) / len(x))", 3),
        ("x = list(map(float, input().split()))\nprint(f'{sum(x) / len(x):.7f}')", 3),
        ("x = list(map(float, input().split()))\nprint(round(sum(x) / len(x), 2))", 2),
        ("x = list(map(int, input().split()))\nprint(sum(x) // len(x))", 1),
    ),
    problem(
        "stairs",
        "Read n. Print n lines, the i-th of i stars, aligned to the right.",
        stdin(("1\n", "*\n"), ("3\n", "  *\n **\n***\n")),
        ("n = int(input())\nfor i in range(1, n + 1):\n    print(('*' * i).rjust(n))", 2),
        ("n = int(input())\nfor i in range(1, n + 1):\n    print(('*' * i).rjust(n) + '  ')\nprint()", 2),
        ("n = int(input())\nfor i in range(1, n + 1):\n    print('*' * i)", 1),
    ),
    problem(
        "words",
        "Read all lines. Print each word with its number of occurrences, in alphabetical order.",
        stdin(("b a\nb\n", "a 1\nb 2\n"), ("", ""), ("x x x", "x 3\n")),
        (
            """
            import sys
            from collections import Counter
            for word, n in sorted(Counter(sys.stdin.read().split()).items()):
                print(word, n)
            """,
            3,
        ),
        ("for word in sorted(set(input().split())):\n    print(word, 1)", 0),
        ("import sys\nwords = sys.stdin.read().split()\nfor w in sorted(words):\n    print(w, words.count(w))", 1),
    ),
    problem(
        "queries",
        "Read q, then q lines `l r`. Print for each line the sum of the integers from l to r.",
        stdin(("2\n1 3\n5 5\n", "6\n5\n"), ("1\n1 1000000000\n", "500000000500000000\n"), ("0\n", "")),
        (
            """
            import sys
            def main():
                lines = sys.stdin.buffer.read().split(b"\\n")
                for line in lines[1 : int(lines[0]) + 1]:
                    l, r = map(int, line.split())
                    print((l + r) * (r - l + 1) // 2)
            if __name__ == "__main__":
                main()
            """,
            3,
        ),
        (  # too slow for the second
            "for _ in range(int(input())):\n    l, r = map(int, input().split())\n    print(sum(range(l, r + 1)))",
            2,
        ),
    ),
    problem(
        "primes",
        "Read n. Print the primes below n on one line.",
        stdin(("10\n", "2 3 5 7\n"), ("2\n", "\n"), ("3\n", "2\n")),
        ("n = int(input())\nprint(*[p for p in range(2, n) if all(p % d for d in range(2, p))])", 3),
        ("n = int(input())\nprint(*[p for p in range(1, n) if all(p % d for d in range(2, p))])", 0),
        ("n = int(input())\nprint([p for p in range(2, n) if all(p % d for d in range(2, p))])", 0),
        ("n = int(input())\nassert n > 2\nprint(*[p for p in range(2, n) if all(p % d for d in range(2, p))])", 2),
    ),
    problem(
        "echo",
        "Print the input.",
        stdin(("a\nb\n", "a\nb\n"), ("é ∑\n", "é ∑\n")),
        ("import sys\nsys.stdout.write(sys.stdin.read())", 2),
        ("import atexit, sys\ntext = sys.stdin.read()\natexit.register(lambda: print(text))", 2),
        ("import threading\nthreading.Thread(target=lambda: print(open(0).read())).start()", 2),
        ("import sys\nsys.stdout.write(sys.stdin.read())\nsys.stdout.close()", 2),
        ("import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'utf-8')\nprint(sys.stdin.read())", 2),
        ("import io, sys\nout, sys.stdout = sys.stdout, io.StringIO()\nout.write(sys.stdin.read())", 2),
        ("import sys\nout = open(1, 'w')\nout.write(sys.stdin.read())\nsys.stdout = None", 2),
        ("print(input())\nexit()", 1),
        ("import sys\nprint(sys.stdin.read())\nsys.exit(1)", 0),
        ("print('a')\nprint('b')", 1),
    ),
    problem(
        "depth",
        "Read n. Print n, computed by recursion of depth n.",
        stdin(("10\n", "10\n"), ("20000\n", "20000\n")),
        (
            """
            import sys, threading
            sys.setrecursionlimit(10**6)
            def depth(n):
                return 0 if n == 0 else 1 + depth(n - 1)
            threading.stack_size(1 << 26)
            thread = threading.Thread(target=lambda: print(depth(int(input()))))
            thread.start()
            thread.join()
            """,
            2,
        ),
        ("def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\nprint(depth(int(input())))", 1),
        (
            """
            import sys
            from functools import cache
            sys.setrecursionlimit(10**6)
            @cache
            def depth(n):
                return 0 if n == 0 else 1 + depth(n - 1)
            print(depth(int(input())))
            """,
            2,
        ),
    ),
    # ------------------------------------------------------------- functions
    problem(
        "two_sum",
        "Write a class Solution with a method twoSum(nums, target): the indices of two numbers that add up to target.",
        calls("Solution().twoSum", ([[2, 7, 11], 9], [0, 1]), ([[3, 3], 6], [0, 1]))
        + calls("twoSum", ([[1, 2, 4], 6], [1, 2])),
        (
            """
            class Solution:
                def twoSum(self, nums: List[int], target: int) -> List[int]:
                    seen = {}
                    for i, n in enumerate(nums):
                        if target - n in seen:
                            return seen[target - n], i
                        seen[n] = i
            """,
            3,
        ),
        (
            """
            class Solution:
                def twoSum(self, nums, target):
                    return [nums.index(n) for n in nums if target - n in nums][:2]
            """,
            2,
        ),
        ("class Solution:\n    def two_sum(self, nums, target):\n        return [0, 1]", 0),
        ("class Solution:\n    def twoSum(self, nums, target):\n        return [0, 1]", 2),
        setup="from typing import List",
    ),
    problem(
        "gcd",
        "Write gcd(a, b).",
        calls("gcd", ([12, 18], 6), ([7, 0], 7), ([17, 5], 1), ([2**70, 2**65], 2**65)),
        ("from math import gcd", 4),
        ("def gcd(a, b):\n    return a if b == 0 else gcd(b, a % b)", 4),
        ("def gcd(a, b):\n    return max(d for d in range(1, min(a, b) + 1) if a % d == b % d == 0)", 2),
        ("def gcd(a, b):\n    while b > 17:\n        pass\n    return a", 1),
    ),
    problem(
        "roots",
        "Write roots(a, b, c): the real roots of a x^2 + b x + c, in order.",
        calls("roots", ([1, -3, 2], [1, 2]), ([1, 0, -2], [-1.4142135623, 1.4142135623]), ([1, 0, 1], [])),
        (
            """
            def roots(a, b, c):
                d = b * b - 4 * a * c
                return [] if d < 0 else sorted({(-b - d**0.5) / (2 * a), (-b + d**0.5) / (2 * a)})
            """,
            3,
        ),
        ("def roots(a, b, c):\n    d = b * b - 4 * a * c\n    return [(-b - d**0.5) / 2, (-b + d**0.5) / 2]", 2),
        ("def roots(a, b, c):\n    return None", 0),
    ),
    problem(
        "count",
        "Write count(words): how often each word occurs.",
        calls("count", ([["a", "b", "a"]], {"a": 2, "b": 1}), ([[]], {}), ([["x"] * 1000], {"x": 1000})),
        ("from collections import Counter as count", 3),
        ("from collections import defaultdict\ndef count(words):\n    return defaultdict(int)", 1),
        ("def count(words):\n    return {w: 1 for w in words}", 1),
    ),
    problem(
        "squares",
        "Write squares(n): a dictionary from 1 ... n to their squares.",
        calls("squares", ([2], {"1": 1, "2": 4}), ([0], {})),
        ("def squares(n):\n    return {i: i * i for i in range(1, n + 1)}", 2),
        ("def squares(n):\n    return {i: i * i for i in range(n)}", 1),
        ("def squares(n):\n    raise SystemExit(0)", 0),
    ),
    problem(
        "flag",
        "Write Text.upper_case(s): whether s has upper-case letters only. It is a static method.",
        calls("Text.upper_case", (["ABC"], True), (["aBC"], False)),
        ("class Text:\n    @staticmethod\n    def upper_case(s):\n        return s.isupper()", 2),
        ("class Text:\n    def upper_case(s):\n        return 'True'", 0),
        ("class Text:\n    upper_case = str.islower", 1),
        ("class Everything:\n    __eq__ = lambda a, b: True\nclass Text:\n    upper_case = lambda s: Everything()", 0),
    ),
    # ------------------------------------------------------------- asserts
    problem(
        "close_elements",
        "Write has_close_elements(numbers, threshold): whether two of the numbers are closer than the threshold.",
        asserts(
            """
            METADATA = {"kind": "test"}
            def check(candidate):
                assert candidate([1.0, 2.0, 3.9], 0.3) == False
                assert candidate([1.0, 2.0, 2.2], 0.3) == True
                assert candidate([], 0.3) == False
            check(has_close_elements)
            """
        ),
        (
            """
            def has_close_elements(numbers, threshold):
                return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])
            """,
            1,
        ),
        ("def has_close_elements(numbers, threshold):\n    return True", 0),
        ("class Yes:\n    __eq__ = lambda *a: True\ndef has_close_elements(*a):\n    return Yes()", 0),
        ("import os\ndef has_close_elements(*a):\n    os._exit(0)", 0),
    ),
    problem(
        "reverse",
        "Write reverse(items): a new list, in reverse order.",
        asserts(
            "assert reverse([1, 2]) == [2, 1]",
            "x = [1, 2, 3]\ny = reverse(x)\nassert x == [1, 2, 3], 'unchanged'\nassert [3, 2, 1] == y",
            "assert reverse(['a']) is not None and reverse([]) == []",
        ),
        ("def reverse(items):\n    return items[::-1]", 3),
        ("def reverse(items):\n    items.reverse()\n    return items", 2),
        ("def reverse(items):\n    return tuple(items[::-1])", 0),
        ("def reverse(items):\n    return sorted(items, reverse=True)", 3),
    ),
    problem(
        "halves",
        "Write half(x).",
        asserts(
            "import math\nassert math.isclose(half(3), 1.5)", "assert half(2) == 1", "assert abs(half(-1) + 0.5) < 1e-9"
        ),
        ("def half(x):\n    return x / 2", 3),
        ("from fractions import Fraction\ndef half(x):\n    return Fraction(x, 2)", 3),
        ("def half(x):\n    return x // 2", 1),
        ("import sys\nsys.exit(0)", 0),
    ),
    problem(
        "stack",
        "Write a class Stack with push, pop and __len__.",
        asserts(
            "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert len(s) == 1",
            "try:\n    Stack().pop()\nexcept IndexError:\n    pass\nelse:\n    raise AssertionError",
        ),
        (
            """
            class Stack(list):
                push = list.append
            """,
            2,
        ),
        (
            """
            class Stack:
                def __init__(self):
                    self.items = []
                def push(self, x):
                    self.items.append(x)
                def pop(self):
                    return self.items.pop() if self.items else None
                def __len__(self):
                    return len(self.items)
            """,
            1,
        ),
    ),
    problem(
        "unique",
        "Write unique(items): the set of the items that occur once.",
        asserts("assert unique([1, 2, 2]) == {1}", "assert unique('abca') == {'b', 'c'}", "assert unique([]) == set()"),
        ("def unique(items):\n    return {i for i in items if items.count(i) == 1}", 3),
        ("unique = set", 1),
        ("def unique(items):\n    return [i for i in items if items.count(i) == 1]", 0),
    ),
    problem(
        "parity",
        "Write parity(n): 'even' or 'odd'.",
        asserts(*(f"assert parity({n}) == {'odd' if n % 2 else 'even'!r}" for n in range(7))),
        ("def parity(n):\n    return 'odd' if n % 2 else 'even'", 7),
        ("def parity(n):\n    return 'even'", 4),
        ("def parity(n):\n    return 'odd' if n % 2 else 'even' if n else None", 6),
        ("def parity(n)\n    return 'even'", 0),
    ),
    problem(
        "lengths",
        "Write longest(words): the longest word, the first of several.",
        [
            *asserts("assert longest(['a', 'bb']) == 'bb'"),
            *calls("longest", ([["ab", "cd"]], "ab")),
            *stdin(("", "")),
        ],
        ("def longest(words):\n    return max(words, key=len)", 3),
        ("def longest(words):\n    return sorted(words, key=len)[-1]", 2),
        ("print('debugging')\ndef longest(words):\n    return max(words, key=len)", 2),
    ),
    problem(
        "memory",
        "Write table(n): the sum of the first n integers.",
        calls("table", ([10], 45), ([30_000_000], 449999985000000)),
        ("def table(n):\n    return n * (n - 1) // 2", 2),
        ("def table(n):\n    return sum([i for i in range(n)])", 1),  # needs more memory than a test has
    ),
)
