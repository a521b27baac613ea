"""Real text for models with a tokenizer: problems, their solutions, and other responses to them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from asd_megatron.checks.bfloat16 import Pair

TEXTS: tuple[tuple[str, str, str], ...] = (
    (
        "A shop sells pencils in boxes of 12. Mara buys 7 boxes and gives away 19 pencils. How many are left?",
        "7 boxes hold 7 * 12 = 84 pencils. 84 - 19 = 65. The answer is 65.",
        "Let me see. Each box has 12 pencils, so 7 boxes have 84. Wait, she gives away 19, so 84 - 19 = 65 are left.",
    ),
    (
        "What is the sum of all even numbers from 2 to 40?",
        "There are 20 of them, with a mean of 21. The sum is 20 * 21 = 420.",
        "The even numbers are 2, 4, ..., 40. I pair 2 with 40, 4 with 38 and so on: 10 pairs of 42 make 420.",
    ),
    (
        "A train leaves at 9:40 and arrives at 13:05. How long does it travel?",
        "From 9:40 to 13:00 are 3 hours and 20 minutes, and 5 more. It travels 3 hours and 25 minutes.",
        "From 9:40 to 12:40 are three hours. Then 25 minutes until 13:05. So it is 3 h 25 min.",
    ),
    (
        "Why does ice float on water?",
        "Ice is less dense than water: its molecules form an open lattice, so the same mass has a larger volume.",
        "Water expands when it freezes. Hmm, so a piece of ice weighs less than the water it displaces, and it floats.",
    ),
    (
        "Is 221 a prime number?",
        "No: 221 = 13 * 17.",
        "It is odd, 2 + 2 + 1 = 5, so not divisible by 3. Not by 7 (7 * 31 = 217), not by 11. But 13 * 17 = 221: no.",
    ),
    (
        "Write a Python function that returns the largest of three numbers.",
        "def largest(a, b, c):\n    return max(a, b, c)",
        "def largest(a, b, c):\n    result = a\n    if b > result:\n        result = b\n    return max(result, c)",
    ),
)


def text_pairs(folder: Path) -> list[Pair]:
    """The texts in the folder's chat template: the teacher is shown the solution too."""
    from asd_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def prompt(content: str) -> list[int]:
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(str(text), add_special_tokens=False))

    return [
        Pair(
            prompt(question),
            prompt(f"{question}\n\nA correct solution:\n{solution}\n\nAnswer in your own words."),
            list(tokenizer.encode(response, add_special_tokens=False)),
        )
        for question, solution, response in TEXTS
    ]


def text_sequences(folder: Path) -> list[Tensor]:
    """Prompts with their responses: int64 [n] each."""
    return [torch.tensor([*pair.prompt, *pair.response]) for pair in text_pairs(folder)]
