"""Multiple choice: which of several continuations does the model find most likely? HellaSwag, and users' own files.

The scores are those of llama.cpp. Each choice is tokenized together with the prompt. The tokens that all choices begin
with are the context, the others are scored. The choice with the highest mean log-probability per token wins
("normalized"); the choice with the highest sum is counted too. In a tie the first choice wins.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.engine.sequence import n_common
from gguf_run.runtime.evaluate.text import Scorer, check_finite, tokens_of
from gguf_run.runtime.model import Model

HELLASWAG_LINES = 6
Z_95 = 1.959963984540054  # 97.5th percentile of the normal distribution


@dataclass(frozen=True)
class Question:
    """A question as a file has it."""

    texts: tuple[str, ...]  # the prompt followed by each choice
    answer: int  # index of the right choice
    line: int  # number of its line in the file


@dataclass(frozen=True)
class Task:
    """A question in tokens."""

    choices: list[list[int]]  # the ids of each of Question.texts
    n_common: int  # the number of first ids that all choices share; each choice has at least one more
    answer: int  # index of the right choice

    @property
    def n_tokens(self) -> int:
        """The number of tokens; the common ones count once."""
        return self.n_common + sum(len(choice) - self.n_common for choice in self.choices)


@dataclass(frozen=True)
class Accuracy:
    """How many tasks the model answered right."""

    n: int = 0  # tasks
    n_normalized: int = 0  # right by the mean log-probability
    n_sum: int = 0  # right by the sum of log-probabilities

    @property
    def normalized(self) -> tuple[float, tuple[float, float]]:
        """The share of right answers by the mean, and the share's 95 % interval."""
        return self.n_normalized / self.n, wilson_interval(self.n_normalized, self.n)

    @property
    def by_sum(self) -> tuple[float, tuple[float, float]]:
        """The share of right answers by the sum, and the share's 95 % interval."""
        return self.n_sum / self.n, wilson_interval(self.n_sum, self.n)


def wilson_interval(n_right: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927)."""
    z2 = Z_95**2 / n
    p = n_right / n
    half = Z_95 * math.sqrt((p * (1 - p) + z2 / 4) / n)
    return max(0.0, (p + z2 / 2 - half) / (1 + z2)), min(1.0, (p + z2 / 2 + half) / (1 + z2))


def read_hellaswag(text: str, name: str) -> list[Question]:
    """Read llama.cpp's form: six lines a task, namely the context, the index of the right ending, and four endings.

    name: the file's name, for errors. GgufRunError for any other text.
    """
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    if not lines or len(lines) % HELLASWAG_LINES:
        raise GgufRunError(
            f"{name}: has {len(lines)} lines; a HellaSwag file has {HELLASWAG_LINES} for each task: the context, the "
            "number of the right ending, and four endings"
        )
    questions = []
    for start in range(0, len(lines), HELLASWAG_LINES):
        context, answer, *endings = lines[start : start + HELLASWAG_LINES]
        if answer.strip() not in ("0", "1", "2", "3"):
            raise GgufRunError(f"{name}, line {start + 2}: is {answer[:40]!r}; the right ending is 0, 1, 2 or 3")
        questions.append(Question(tuple(f"{context} {ending}" for ending in endings), int(answer), start + 1))
    return questions


def read_choices(text: str, name: str) -> list[Question]:
    """Read JSON lines {"prompt": text, "choices": [text, ...], "answer": index or text}; other fields are ignored.

    A blank comes between prompt and choice if neither has one there. name: the file's name, for errors. GgufRunError
    for any other text.
    """
    questions = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GgufRunError(f"{name}, line {number}: is not valid JSON: {error}") from None
        if problem := _problem(record):
            raise GgufRunError(f"{name}, line {number}: {problem}")
        prompt, choices, answer = record["prompt"], record["choices"], record["answer"]
        texts = tuple(_join(prompt, choice) for choice in choices)
        questions.append(Question(texts, choices.index(answer) if isinstance(answer, str) else answer, number))
    if not questions:
        raise GgufRunError(f'{name}: holds no tasks; each line is {{"prompt": ..., "choices": [...], "answer": ...}}')
    return questions


def _problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "is not a JSON object with prompt, choices and answer"
    missing = [name for name in ("prompt", "choices", "answer") if name not in record]
    if missing:
        return f"has no {' and no '.join(missing)}"
    choices, answer = record["choices"], record["answer"]
    if not isinstance(record["prompt"], str):
        return "prompt is not a text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return "choices is not a list of at least two texts"
    if isinstance(answer, str):
        return None if answer in choices else f"answer {answer[:40]!r} is none of the choices"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"answer is {answer!r:.40}; allowed: 0 to {len(choices) - 1}, or the text of the right choice"
    return None


def _join(prompt: str, choice: str) -> str:
    glued = not prompt or prompt[-1].isspace() or choice[0].isspace()
    return prompt + choice if glued else f"{prompt} {choice}"


def llama_cpp_order(n: int) -> list[int]:
    """Return the order in which llama.cpp takes n tasks.

    Each task is drawn from those that are left, by std::mt19937 with seed 1 and libstdc++'s uniform distribution
    (Lemire's method on 32-bit draws).
    """
    draw = np.random.RandomState(1)
    left = list(range(n))
    order = []
    for n_left in range(n, 0, -1):
        product, low = 0, -1
        while low < (1 << 32) % n_left:
            product = int(draw.randint(0, 1 << 32, dtype=np.uint32)) * n_left
            low = product & 0xFFFFFFFF
        order.append(left.pop(product >> 32))
    return order


def make_tasks(model: Model, questions: Sequence[Question], name: str) -> list[Task]:
    """Tokenize questions. name: the file's name, for errors. GgufRunError if a question does not fit the context."""
    tasks = []
    for question in questions:
        choices = [tokens_of(model, text) for text in question.texts]
        n_shared = min(n_common(choices[0], choice) for choice in choices)
        n_shared = min(n_shared, *(len(choice) - 1 for choice in choices))
        where = f"{name}, line {question.line}"
        if n_shared < 1:
            raise GgufRunError(f"{where}: the choices have no beginning in common: give a prompt")
        if max(map(len, choices)) > model.n_ctx:
            raise GgufRunError(
                f"{where}: has {max(map(len, choices))} tokens, the context holds {model.n_ctx}: use a larger "
                "--ctx-size, or leave the task out"
            )
        tasks.append(Task(choices, n_shared, question.answer))
    return tasks


def accuracy(scorer: Scorer, tasks: Sequence[Task]) -> Iterator[Accuracy]:
    """Yield the accuracy over all tasks so far, after each task.

    The tokens that a prompt shares with the prompt before it (examples at its start, say) are not computed again.
    """
    done = Accuracy()
    for number, task in enumerate(tasks, 1):
        sums = _log_probabilities(scorer, task, resumes=number > 1)
        check_finite(sums, f"task {number}")
        means = sums / [len(choice) - task.n_common for choice in task.choices]
        n_normalized = done.n_normalized + int(means.argmax() == task.answer)
        done = Accuracy(number, n_normalized, done.n_sum + int(sums.argmax() == task.answer))
        yield done


def _log_probabilities(scorer: Scorer, task: Task, *, resumes: bool) -> NDArray[np.float64]:
    """The sum of log-probabilities of each choice's tokens after the common ones, f64[n_choice].

    resumes: what the task before begins with too is not computed again.
    """
    first = [choice[task.n_common] for choice in task.choices]
    # One row of logits, after the last common token, scores every choice's first token.
    (block,) = scorer.run(task.choices[0][: task.n_common], first[:1], resumes=resumes)
    sums = block.logits[0, first].astype(np.float64) - block.logits[0, first[0]] - block.nll[0]
    for i, choice in enumerate(task.choices):
        if len(choice) > task.n_common + 1:
            rest = scorer.run(choice[:-1], choice[task.n_common + 1 :], resumes=True)
            sums[i] -= sum(block.nll.sum() for block in rest)
    return sums
