"""What student and teacher read, for `atesd preview`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from atesd.build import make_renderer, problem_sets
from atesd.config import Config
from atesd.errors import DataError
from atesd.models.load import load_tokenizer
from atesd.models.prompts import PromptEncoder, control_line
from atesd.records import Problem
from atesd.text import visible
from atesd.train.views import TeacherPrompts


def preview_text(config: Config, index: int, reveal_ratios: Sequence[float]) -> str:
    """Both contexts of a training problem, the teacher's at each ratio. Raises `DataError` beyond the last problem."""
    problems = problem_sets(config.data).train
    if index >= len(problems):
        raise DataError(f"--problem {index}: there are {len(problems)} training problems, 0 to {len(problems) - 1}")
    encoder = PromptEncoder(load_tokenizer(config.model), config.model)
    return "\n".join(_parts(problems[index], reveal_ratios, config, encoder, problems))


def _parts(
    problem: Problem, reveal_ratios: Sequence[float], config: Config, encoder: PromptEncoder, others: Sequence[Problem]
) -> Iterator[str]:
    renderer = make_renderer(config)
    prompts = TeacherPrompts(config, encoder, renderer, others)
    message = renderer.student(problem)
    yield (
        f"problem {visible(problem.id)}: difficulty {problem.difficulty}, {len(problem.segments)} segments, "
        f"answer {visible(problem.answer)}"
    )
    yield from map(visible, encoder.notes())
    yield visible(control_line(others, encoder))
    yield _context("student", len(encoder.student(message)), encoder.student_text(message))
    for ratio in reveal_ratios:
        prompt = prompts.view(problem, ratio)
        view = prompt.view
        shown = f"{view.shown_segments} of {view.total_segments} segments, effective ratio {view.effective_ratio:.2f}"
        yield _context(f"teacher at ratio {ratio:g}: {shown}", len(prompt.context), encoder.teacher_text(view.text))


def _context(title: str, tokens: int, text: str) -> str:
    return f"\n===== {title}, {tokens} tokens\n{visible(text)}"
