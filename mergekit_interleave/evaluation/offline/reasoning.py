"""Make items of arithmetic and logic by reasoning-gym, with answers that are solved again here.

Release 0.1.25 calls one syllogism in eight valid that is not. Items whose answer differs from the
one found here are left out. Items with the same seed and count are the same; those of two seeds
come from different random numbers.
"""

from __future__ import annotations

import calendar
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

LONGEST = 300
"""The maximum number of characters in a question."""

DRAWS = 1_000_000
"""How many questions of a kind are tried; question `i` of a seed comes from `seed * DRAWS + i`."""

YES_NO = ("Yes", "No")


def numbers(text: str) -> list[int]:
    """Return the whole numbers in a text."""
    return [int(found) for found in re.findall(r"\d+", text)]


def value(expression: str) -> int:
    """Return the value of a sum of products of whole numbers."""
    terms = re.findall(r"([+-]?)\s*(\d+(?:\s*\*\s*\d+)*)", expression)
    return sum((-1 if sign == "-" else 1) * math.prod(numbers(term)) for sign, term in terms)


def solve_expression(question: str) -> str:
    """Compute what follows a colon."""
    return str(value(question.partition(":")[2]))


def solve_equation(question: str) -> str | None:
    """Find the whole number below 1000 that satisfies a linear equation."""
    left, _, right = question.partition(":")[2].partition("=")
    for number in range(1000):
        if value(re.sub(r"[a-z]", str(number), left)) == value(right):
            return str(number)
    return None


def solve_primes(question: str) -> str:
    """Count the primes from the first number to the second."""
    first, last = numbers(question)
    primes = [n for n in range(max(first, 2), last + 1) if all(n % d for d in range(2, n))]
    return str(len(primes))


def solve_date(question: str) -> str | None:
    """Name the weekday of a date, or say whether a year is a leap year."""
    if "leap" in question:
        (year,) = numbers(question)
        return "Yes" if calendar.isleap(year) else "No"
    date = re.search(r"[A-Z][a-z]+ \d+, \d{4}", question)
    if date is None:
        return None
    return f"{datetime.strptime(date[0], '%B %d, %Y'):%A}"  # noqa: DTZ007 - a day, not a time


def solve_kinship(question: str) -> str | None:
    """Count the sisters of a brother, or the female friends of a male friend; she is one of them.

    Only questions with one woman and her brothers and sisters, or friends, are solved.
    """
    one_family = len(numbers(question)) == 2  # noqa: PLR2004 - of women and of men
    counted = re.search(r"(\d+) (sisters|female friends)", question)
    asked = re.search(r"How many (.*) does .*\b(brother|a male friend)\b", question)
    if not one_family or counted is None or asked is None or counted[2] != asked[1]:
        return None
    return str(int(counted[1]) + 1)


Statement = tuple[str, str, str, str]
"""A quantifier, a term, `not ` or nothing, and a term."""


def solve_syllogism(question: str) -> str:
    """Try all worlds in which each term has a member."""
    statements: list[Statement] = re.findall(r"(All|No|Some) (\w+) are (not )?(\w+)", question)
    terms = sorted({term for _, first, _, last in statements for term in (first, last)})
    kinds = [frozenset(c) for n in range(4) for c in itertools.combinations(terms, n)]
    worlds = (
        [kind for kind, exists in zip(kinds, bits, strict=True) if exists]
        for bits in itertools.product((False, True), repeat=len(kinds))
    )
    *premises, conclusion = statements
    for world in worlds:
        complete = all(any(term in kind for kind in world) for term in terms)
        true = complete and all(holds(premise, world) for premise in premises)
        if true and not holds(conclusion, world):
            return "No"
    return "Yes"


def holds(statement: Statement, world: list[frozenset[str]]) -> bool:
    """Whether a statement is true in a world, which is a list of the kinds of its members."""
    quantifier, first, negated, last = statement
    found = [last in kind for kind in world if first in kind]
    if quantifier == "All":
        return all(found)
    if quantifier == "No":
        return not any(found)
    return not all(found) if negated else any(found)


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: The name of the data set of reasoning-gym.
        solve: Returns the answer of a question, or None.
        settings: The settings of the data set.
        choices: The possible answers, in groups; none if they are not few.
    """

    name: str
    solve: Callable[[str], str | None]
    settings: dict[str, Any] = field(default_factory=dict)
    choices: tuple[tuple[str, ...], ...] = ()


ARITHMETIC = (
    Kind("chain_sum", solve_expression, {"max_terms": 4, "max_digits": 2}),
    Kind("products", solve_expression, {"max_digits": 2}),
    Kind("gcd", lambda question: str(math.gcd(*numbers(question))), {"max_value": 100}),
    Kind("lcm", lambda question: str(math.lcm(*numbers(question))), {"max_value": 50}),
    Kind("simple_equations", solve_equation, {"max_terms": 3, "max_value": 20}),
    Kind("count_primes", solve_primes, {"max_n": 100}),
)

LOGIC = (
    Kind(
        "calendar_arithmetic",
        solve_date,
        {"tasks": ["weekday_of_date", "is_leap_year"]},
        (YES_NO, tuple(calendar.day_name)),
    ),
    Kind("aiw", solve_kinship),
    Kind("syllogism", solve_syllogism, choices=(YES_NO,)),
)

KINDS = (*ARITHMETIC, *LOGIC)


def items_of(kind: Kind, seed: int, wrong: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the items of a kind, each once, and count those with a wrong answer."""
    import reasoning_gym  # noqa: PLC0415 - only this function needs it

    data = reasoning_gym.create_dataset(kind.name, seed=seed * DRAWS, size=DRAWS, **kind.settings)
    seen = set()
    for index in range(DRAWS):
        entry = data[index]
        question, answer = entry["question"].strip(), entry["answer"]
        if len(question) > LONGEST or question in seen:
            continue
        seen.add(question)
        solution = kind.solve(question)
        if solution == answer:
            choices = [list(group) for group in kind.choices if answer in group]
            yield {
                "kind": kind.name,
                "prompt": f"Question: {question}\nAnswer: ",
                **({"choices": choices[0]} if choices else {}),
                "answer": answer,
            }
        elif solution is not None:
            wrong[kind.name] += 1


def make(
    count: int, seed: int, kinds: Sequence[Kind] = KINDS
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return items, of each kind in turn, and how many of each kind had a wrong answer."""
    wrong: Counter[str] = Counter()
    rounds = itertools.zip_longest(*(items_of(kind, seed, wrong) for kind in kinds))
    items = (item for one in rounds for item in one if item is not None)
    return list(itertools.islice(items, count)), wrong
