"""The benchmarks by name: an open table."""

from __future__ import annotations

from behavior.benchmarks.amber import AMBER
from behavior.benchmarks.amber_generative import AMBER_GENERATIVE
from behavior.benchmarks.cceval import CCEVAL
from behavior.benchmarks.chair import CHAIR
from behavior.benchmarks.crpe import CRPE
from behavior.benchmarks.gavie import GAVIE
from behavior.benchmarks.haelm import HAELM
from behavior.benchmarks.hallusion import HALLUSION
from behavior.benchmarks.llava_bench import LLAVA_BENCH
from behavior.benchmarks.lvlm_ehub import LVLM_EHUB
from behavior.benchmarks.mme import MME
from behavior.benchmarks.mmhal import MMHAL
from behavior.benchmarks.mmvp import MMVP
from behavior.benchmarks.naturalbench import NATURALBENCH
from behavior.benchmarks.object_halbench import OBJECT_HALBENCH
from behavior.benchmarks.pope import LLAVA_POPE, POPE
from behavior.benchmarks.r_bench import R_BENCH
from behavior.benchmarks.reefknot import REEFKNOT
from behavior.benchmarks.specification import Benchmark, problem
from groundscope.core.registry import Registry

BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark",
    {
        "pope": POPE,
        "llava_pope": LLAVA_POPE,
        "mme": MME,
        "amber": AMBER,
        "amber_generative": AMBER_GENERATIVE,
        "chair": CHAIR,
        "hallusion": HALLUSION,
        "mmvp": MMVP,
        "naturalbench": NATURALBENCH,
        "r_bench": R_BENCH,
        "reefknot": REEFKNOT,
        "crpe": CRPE,
        "object_halbench": OBJECT_HALBENCH,
        "mmhal": MMHAL,
        "llava_bench": LLAVA_BENCH,
        "gavie": GAVIE,
        "cceval": CCEVAL,
        "haelm": HAELM,
        "lvlm_ehub": LVLM_EHUB,
    },
    group="groundscope.benchmarks",
    check=problem,
)
"""Benchmarks by name: built-in, registered, and of installed packages."""


def register(name: str, benchmark: Benchmark, *, replace: bool = False) -> None:
    """Add a benchmark, for `score_files` and for the evaluation card.

    An installed package does the same with an entry point in the group ``groundscope.benchmarks``.

    Parameters
    ----------
    name
        Name of the benchmark.
    benchmark
        Its questions, answer layout and rule.
    replace
        Whether to replace an existing benchmark of that name.

    Raises
    ------
    ConfigError
        If the name is in use and `replace` is False, or `benchmark` is not a `Benchmark`.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> benchmarks = gs.behavior.benchmarks
    >>> benchmarks.register("my_pope", replace(benchmarks.BENCHMARKS["pope"], title="POPE of my images"))
    >>> list(benchmarks.BENCHMARKS)[-1]
    'my_pope'
    >>> benchmarks.BENCHMARKS.unregister("my_pope")
    """
    BENCHMARKS.register(name, benchmark, replace=replace)
