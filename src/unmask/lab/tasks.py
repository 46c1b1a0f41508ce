"""Synthetic tasks with known answers, on which parallel decoding errors show at a million parameters.

A problem is a line of words that says everything: "reverse b a d > " has the answer "d a b", and `check` needs no more
than the problem to judge any text. Where several answers are right (shuffle, plan), `check` takes them all; these are
the tasks in which tokens that are each likely can be wrong together (ParallelBench 2510.04767).

Splits are disjoint by construction: a hash of the problem's canonical form decides where it belongs, so no number of
draws, and no other seed, puts a test problem into training data. Knows no model and no torch.

Notation: an item is one of 16 letters. Results of `chain` are taken modulo 10. Words are what stands between spaces.
LONG_TASKS have answers of 16 to 48 words, in a vocabulary of their own (LONG_WORDS): there parallel decoding has more
to win.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from unmask.plain_json import to_json
from unmask.run_folder import write_text

SPLITS = ("train", "valid", "test")
ITEMS = "abcdefghijklmnop"
SIGN = " > "
"""What ends a problem."""

WORDS = (*["copy", "reverse", "replace", "shuffle", "chain", "plan", ":", ">"], *ITEMS, *map(str, range(-26, 37)),
         *(f"+{digit}" for digit in range(1, 10)))  # fmt: skip
"""Every word of every problem and answer: the vocabulary of a word-level tokenizer."""

FIELDS = {
    "name": ("is called", ("ada", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo", "ida", "jon")),
    "age": ("is aged", tuple(map(str, range(20, 60)))),
    "city": ("lives in", ("bern", "cairo", "delhi", "lima", "oslo", "paris", "rome", "tokyo", "turin", "quito")),
    "job": ("works as", ("baker", "cook", "judge", "nurse", "painter", "pilot", "poet", "smith", "tailor", "vet")),
    "pet": ("keeps a", ("cat", "crow", "dog", "fish", "goat", "hen", "horse", "mouse", "newt", "owl")),
    "drink": ("drinks", ("beer", "cider", "cocoa", "coffee", "juice", "milk", "rum", "tea", "water", "wine")),
}
"""Of `record`: each field, how a sentence says it, and its values."""

LONG_WORDS = (*["sort", "sum", "record", ">", "+", "=", ",", ":", ";", "{", "}", '"'], *map(str, range(100)), *FIELDS,
              *dict.fromkeys(word for says, values in FIELDS.values() for word in (*says.split(" "), *values)
                             if not word.isdigit()))  # fmt: skip
"""Every word of the long problems and their answers."""


@dataclass(frozen=True)
class Problem:
    """prompt: the text that is given. answer: one right continuation of it."""

    prompt: str
    answer: str

    @property
    def task(self) -> str:
        return self.prompt.split(" ", 1)[0]

    def check(self, text: str) -> bool:
        return check(self.prompt, text)


# --- the tasks: each draws a problem and judges an answer


def _draw_items(rng: random.Random, task: str) -> Problem:
    items = rng.sample(ITEMS, rng.randint(3, 6) if task == "shuffle" else rng.randint(4, 10))
    given = " ".join(items)
    if task == "copy":
        answer = items
    elif task == "reverse":
        answer = items[::-1]
    elif task == "shuffle":
        answer = rng.sample(items, len(items))
    else:
        old, new = rng.choice(items), rng.choice([item for item in ITEMS if item not in items])
        answer = [new if item == old else item for item in items]
        given = f"{old} {new} : {given}"
    return Problem(f"{task} {given}{SIGN}", " ".join(answer))


def _check_items(task: str, given: str, text: str) -> bool:
    """Order of the given items, or any order of them for shuffle."""
    said = text.split(" ")
    if task == "replace":
        change, _, given = given.partition(" : ")
        old, new = change.split(" ")
        return said == [new if item == old else item for item in given.split(" ")]
    items = given.split(" ")
    if task == "shuffle":
        return sorted(said) == sorted(items)
    return said == (items if task == "copy" else items[::-1])


def _draw_chain(rng: random.Random, _task: str) -> Problem:
    """A sum worked out: each step and what it comes to, modulo 10."""
    given = [str(rng.randint(0, 9))] + [rng.choice("+-") + str(rng.randint(1, 9)) for _ in range(rng.randint(3, 5))]
    return Problem(f"chain {' '.join(given)}{SIGN}", " ".join(_worked_out(given)))


def _worked_out(given: Sequence[str]) -> list[str]:
    total, lines = int(given[0]), []
    for step in given[1:]:
        total = (total + int(step)) % 10
        lines += [step, str(total)]
    return lines


def _check_chain(_task: str, given: str, text: str) -> bool:
    return text.split(" ") == _worked_out(given.split(" "))


def _draw_plan(rng: random.Random, _task: str) -> Problem:
    """Countdown in small: signs and an order that take the numbers to the target."""
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(3, 4))]
    signs = [1, *(rng.choice((1, -1)) for _ in numbers[1:])]
    order = rng.sample(numbers, len(numbers))
    target = sum(sign * number for sign, number in zip(signs, order, strict=True))
    given = f"{target} : {' '.join(map(str, numbers))}"
    # The one answer to learn: the numbers as they are given, the first admissible signs, if there are any.
    for tried in product((1, -1), repeat=len(numbers)):
        if sum(s * n for s, n in zip(tried, numbers, strict=True)) == target:
            answer = " ".join(("+" if s > 0 else "-") + str(n) for s, n in zip(tried, numbers, strict=True))
            return Problem(f"plan {given}{SIGN}", answer)
    raise AssertionError(given)


def _check_plan(_task: str, given: str, text: str) -> bool:
    """Every number once, in any order, with signs that add up to the target."""
    target, _, numbers = given.partition(" : ")
    terms = text.split(" ")
    if not all(re.fullmatch(r"[+-]\d", term) for term in terms):
        return False
    return sorted(term[1] for term in terms) == sorted(numbers.split(" ")) and sum(map(int, terms)) == int(target)


# --- tasks with long answers


def _draw_sort(rng: random.Random, _task: str) -> Problem:
    numbers = rng.sample(range(100), rng.randint(16, 32))
    return Problem(f"sort {' '.join(map(str, numbers))}{SIGN}", " ".join(map(str, sorted(numbers))))


def _check_sort(_task: str, given: str, text: str) -> bool:
    return text.split(" ") == sorted(given.split(" "), key=int)


def _draw_sum(rng: random.Random, _task: str) -> Problem:
    """Two numbers of 3 to 6 digits, most significant first."""
    digits = rng.randint(3, 6)
    a, b = (" ".join(str(rng.randint(0, 9)) for _ in range(digits)) for _ in "ab")
    return Problem(f"sum {a} + {b}{SIGN}", _added(f"{a} + {b}"))


def _added(given: str) -> str:
    """The sum written out: from the last column on, carry, digits and their sum; then the number."""
    a, b = (term.split(" ") for term in given.split(" + "))
    carry = 0
    columns: list[str] = []
    number: list[str] = []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x} {y} {carry} = {total}")
        carry, digit = divmod(total, 10)
        number.insert(0, str(digit))
    return f"{' ; '.join(columns)} ; {' '.join([str(carry), *number])}"


def _check_sum(_task: str, given: str, text: str) -> bool:
    return text == _added(given)


def _draw_record(rng: random.Random, _task: str) -> Problem:
    """A sentence of clauses in any order; the record names the fields in theirs."""
    fields = rng.sample(list(FIELDS), rng.randint(3, 6))
    given = " , ".join(f"{FIELDS[field][0]} {rng.choice(FIELDS[field][1])}" for field in fields)
    return Problem(f"record {given}{SIGN}", _filled(given))


def _filled(given: str) -> str:
    values = {}
    for clause in given.split(" , "):
        says, value = clause.rsplit(" ", 1)
        values[next(field for field, (words, _) in FIELDS.items() if words == says)] = value
    said = [f'" {field} " : ' + (values[field] if field == "age" else f'" {values[field]} "')
            for field in FIELDS if field in values]  # fmt: skip
    return f"{{ {' , '.join(said)} }}"


def _check_record(_task: str, given: str, text: str) -> bool:
    return text == _filled(given)


LONG_TASKS = ("sort", "sum", "record")

TASKS: dict[str, tuple[Callable[[random.Random, str], Problem], Callable[[str, str, str], bool]]] = {
    "copy": (_draw_items, _check_items),
    "reverse": (_draw_items, _check_items),
    "replace": (_draw_items, _check_items),
    "shuffle": (_draw_items, _check_items),
    "chain": (_draw_chain, _check_chain),
    "plan": (_draw_plan, _check_plan),
    "sort": (_draw_sort, _check_sort),
    "sum": (_draw_sum, _check_sum),
    "record": (_draw_record, _check_record),
}


def check(prompt: str, text: str) -> bool:
    """Whether `text` answers the problem `prompt`; white space around them does not count, anything else does."""
    task, _, given = prompt.strip().removesuffix(SIGN.rstrip()).partition(" ")
    if task not in TASKS or not prompt.rstrip().endswith(SIGN.rstrip()):
        raise ValueError(f"prompt {prompt!r} is no problem of a task: it begins with one of {', '.join(TASKS)} and "
                         f"ends with {SIGN!r}")  # fmt: skip
    return TASKS[task][1](task, given.rstrip(), text.strip())


# --- splits


def canonical(problem: Problem) -> str:
    """What makes two problems the same: the prompt; for `plan`, without the order of its numbers."""
    if problem.task != "plan":
        return problem.prompt
    target, _, numbers = problem.prompt.removesuffix(SIGN).partition(" : ")
    return f"{target} : {' '.join(sorted(numbers.split(' ')))}"


def split_of(problem: Problem) -> str:
    """train (80%), valid (10%) or test (10%), decided by a hash of the canonical problem."""
    share = int(hashlib.sha256(canonical(problem).encode()).hexdigest(), 16) % 10
    return "train" if share < 8 else SPLITS[share - 7]


def draw(task: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless problems of a task that belong to a split; the same ones for the same seed."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown: use one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    rng = random.Random(f"{task} {split} {seed}")
    while True:
        problem = TASKS[task][0](rng, task)
        if split_of(problem) == split:
            yield problem


def problems(tasks: Sequence[str], split: str, number: int, seed: int = 0) -> list[Problem]:
    """`number` problems, the tasks taking turns; different ones where a task has as many."""
    streams = [draw(task, split, seed) for task in tasks]
    found: dict[str, Problem] = {}
    repeated: list[Problem] = []
    for turn in range(number):
        for _ in range(20):
            problem = next(streams[turn % len(streams)])
            if problem.prompt not in found:
                found[problem.prompt] = problem
                break
        else:
            repeated.append(problem)
    return [*found.values(), *repeated]


def write_problems(path: Path, found: Sequence[Problem]) -> Path:
    """A .jsonl file of prompts and completions, as `adapt` and `study` take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(to_json({"prompt": p.prompt, "completion": p.answer}) + "\n" for p in found))
    return path
