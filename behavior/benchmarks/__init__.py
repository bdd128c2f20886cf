"""Released benchmarks: question, answer and verdict files in their released layout, scored by the released rule.

One module for each benchmark, whose docstring lists what its release does and the variants; `BENCHMARKS` is open
(`register`, entry points of group ``groundscope.benchmarks``), and so are the formats of answer files
(`ANSWER_FORMATS`, group ``groundscope.answer_formats``).

`score_files`
    Score an answer file; no model is needed.
`questions`
    Read a benchmark's questions.
`ask`
    Ask a local model the questions of a benchmark; its answers are an answer file of the released layout.
`benchmark_data`
    Load questions and images of a benchmark as a dataset.
`write_requests`
    Write answers for a benchmark's judge; its verdicts come back by ``score_files(…, verdicts=FILE)``.
"""

from behavior.benchmarks.answer_formats import ANSWER_FORMATS, AnswerFormat, Reading
from behavior.benchmarks.asking import AskedBenchmark, ask, benchmark_data
from behavior.benchmarks.questions import TASKS, AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.registry import BENCHMARKS, register
from behavior.benchmarks.scoring import questions, score_files, write_requests
from behavior.benchmarks.specification import AnswerLayout, Benchmark, Judge, Scoring

__all__ = [
    "ANSWER_FORMATS",
    "BENCHMARKS",
    "TASKS",
    "AnswerFormat",
    "AnswerLayout",
    "AnsweredQuestion",
    "AskedBenchmark",
    "Benchmark",
    "BenchmarkQuestion",
    "BenchmarkScore",
    "Judge",
    "Reading",
    "Scoring",
    "ask",
    "benchmark_data",
    "questions",
    "register",
    "score_files",
    "write_requests",
]
