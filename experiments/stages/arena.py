"""Stage `arena`: training-free methods and controls answer the same test questions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from behavior.answer_files import load_answers
from concepts.schema import ConceptDataset
from experiments.config import ArenaConfig
from experiments.records import TOP_HEADS, read_record
from experiments.run.context import Context
from experiments.run.folder import write_json
from groundscope.core.errors import ConfigError
from groundscope.core.files import write_text
from groundscope.core.text import format_count
from lvlm.sampling import Sampling
from mitigation.arena.figure import errors_of, pareto_figure
from mitigation.arena.result import ArenaResult
from mitigation.arena.rows import ArenaRow, control_rows, default_rows, make_rows, parse_row
from mitigation.arena.run import ArenaOptions, run_arena
from mitigation.arena.search import choose_parameters, search_summary
from mitigation.arena.tables import as_csv, as_html, as_latex
from mitigation.method_data import DerivationData

RESULT = "arena.json"


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown method, parameter or option."""
    options = context.config.arena
    for text in options.methods or ():
        parse_row(str(text))
    if options.methods is not None and not options.methods:
        msg = "arena.methods=[] compares nothing; name methods, or leave it out for all that need no activations"
        raise ConfigError(msg)
    for name in ("limit", "choose_images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            msg = f"arena.{name}={value}: must be at least 1"
            raise ConfigError(msg)
    arena_options(options)
    answer_rows(options, _limited(context.held_out, options.limit))


def arena_options(options: ArenaConfig) -> ArenaOptions:
    """Return the options of the comparison; raises `ConfigError` for one out of range."""
    return ArenaOptions(
        regimes=tuple(options.regimes),
        seeds=options.seeds,
        sampling=Sampling(options.temperature, options.top_p),
        generate=options.generate,
        parser=options.parser,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        price_questions=options.price_questions,
        price_tokens=options.price_tokens,
    )


def answer_rows(options: ArenaConfig, test: ConceptDataset) -> list[ArenaRow]:
    """Return the rows of answers that were made elsewhere."""
    return [
        ArenaRow(
            name, None, category="answer file", source=file, answers=load_answers(test, file, parser=options.parser)
        )
        for name, file in options.answer_files.items()
    ]


def make_arena(context: Context, root: Path) -> str:
    """Compare the methods; write the result, its tables and the figure."""
    options = context.config.arena
    validation, derivation = _divided(context.discovery, options.choose_images if options.choose else 0)
    data = _derivation_data(context, derivation)
    texts = list(options.methods or default_rows(data))
    texts += [text for text in control_rows(data, texts) if parse_row(text) not in [parse_row(t) for t in texts]]
    rows = make_rows(texts, data)
    chosen: list[ArenaRow] = []
    if options.choose:
        tried = {}
        for text in texts:
            row, configurations = choose_parameters(
                text, data, validation, max_drop=options.max_drop, batch_size=options.batch_size
            )
            tried[text] = search_summary(configurations)
            if row is not None and len(configurations) > 1 and row.name not in {r.name for r in chosen}:
                chosen.append(row)
        write_json(root / "chosen.json", tried)
    test = _limited(context.held_out, options.limit)
    rows += answer_rows(options, test)
    result = run_arena(context.model, rows, test, arena_options(options), folder=root / "answers", chosen=chosen)
    result.save(root / RESULT)
    write_text(root / "arena.csv", as_csv(result))
    write_text(root / "arena.tex", as_latex(result))
    write_text(root / "arena.html", as_html(result))
    pareto_figure(result, options.regimes[0]).savefig(root / "pareto.svg")
    return _summary(result)


def _derivation_data(context: Context, examples: ConceptDataset) -> DerivationData:
    top = context.folder.path / "circuits" / "top.json"
    heads = read_record(top, TOP_HEADS)["heads"] if top.is_file() else []
    traced = (context.folder.path / "activations" / "manifest.json").is_file()
    return DerivationData(context.model, context.store if traced else None, examples, heads)


def _divided(data: ConceptDataset, images: int) -> tuple[ConceptDataset, ConceptDataset]:
    """Return examples about the first `images` images, and the others."""
    groups = list(dict.fromkeys(e.group for e in data))
    if images and len(groups) < 2 * images:
        msg = (
            f"arena.choose_images={images}: the data have {len(groups)} discovery images, and half of them must remain"
        )
        raise ConfigError(msg)
    first = set(groups[:images])
    return data.filter(lambda e: e.group in first), data.filter(lambda e: e.group not in first)


def _limited(data: ConceptDataset, images: int | None) -> ConceptDataset:
    if images is None:
        return data
    groups = set(list(dict.fromkeys(e.group for e in data))[:images])
    return data.filter(lambda e: e.group in groups)


def _summary(result: ArenaResult) -> str:
    first = result.rows[0].regime
    rows = [r for r in result.rows if r.regime == first and r.problem is None]
    plain, methods = rows[0], [r for r in rows[1:] if not r.control and not math.isnan(errors_of(r))]
    failed = sum(r.problem is not None for r in result.rows)
    parts = [format_count(len(methods), "method")]
    if methods:
        best = min(methods, key=errors_of)
        parts.append(f"errors {100 * errors_of(plain):.1f} % alone, {100 * errors_of(best):.1f} % with {best.name}")
    better = sum(not r.not_beaten for r in methods)
    parts.append(f"{better} better than every control")
    if failed:
        parts.append(f"{failed} not measured")
    return "; ".join(parts)


def without_price(result: ArenaResult) -> ArenaResult:
    """Return a result without seconds, which differ between two runs."""
    return replace(result, rows=tuple(replace(row, price=None) for row in result.rows))
