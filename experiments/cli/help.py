"""``groundscope help``: the options and their meanings, from the docstrings of the dataclasses in ``config.py``.

The source is parsed, not imported: help starts quickly and needs no other package.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """\
groundscope [option=value …]                   run the unfinished stages of the run `name`
groundscope -m option=a,b [option=value …]     run each combination of values; stages they share run once
groundscope evaluate [option=value …]          ask every question and print the scores; no trace, patching or steering
groundscope arena [option=value …]             compare training-free methods and controls on the same questions
groundscope card [option=value …]              evaluation card: errors by level and task, severity, several models
groundscope representation [option=value …]    representation and behavior of the run `name`: alignment, information, ceilings
groundscope resume=runs/x [option=value …]     continue a run or a sweep with its own configuration
groundscope status [runs/]                     list runs with their stages, sizes and main results
groundscope compare runs/a runs/b [page=FILE]  compare the results of two runs; a page of what changed inside
groundscope preferences runs/x [format=trl]    write the overridden answers of a run as preference files
groundscope tune runs/x [out=FOLDER]           tune the model of a run on them, and write the tuned model
groundscope audit data=… [answers=FILE]        causes of errors in data, without a model; error rates by cause with answers
groundscope audit runs/x                       the same for the data and answers of a run
groundscope plan [option=value …]              estimate bytes, forward passes and hours of a trace
groundscope report runs/x                      write the report of a run folder again; needs no model
groundscope help=probe                         describe the options of a group
groundscope --version                          print the version

Values with =, #, (, ~, commas, blanks or non-ASCII letters need two pairs of quotes: "key='…'"."""

_AUDIT = """\
data=… data.questions=FILE data.images=FOLDER  the data, as in a run; without them the icon scenes
answers=FILE         answers to the questions, for error rates by cause; of a run folder: its own answers
parser=NAME          how written answers are read
causes=[A,B]         only these causes; all causes are in the guide and in the output
pixels=false         decode no image: no duplicates, blur or compression
model=FOLDER_OR_ID   score how well captions fit their images, against others=4 other images
out=FOLDER           where audit.html, findings.csv and audit.json are written; default: audit, or that of the run"""
"""Options of `groundscope audit`."""
_STAGES = {"examples": "data"}
"""Stage to the group of its options, if the names differ."""


@dataclass(frozen=True)
class Option:
    """One option of the command line."""

    key: str
    """Name, such as ``probe.folds``."""
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """A group of options: one dataclass."""

    name: str
    """Empty for the options of the run itself."""
    meaning: str
    options: tuple[Option, ...]


@cache
def groups() -> tuple[Group, ...]:
    """Return all groups of options, first the options of the run."""
    tree = ast.parse(files("experiments").joinpath("config.py").read_text(encoding="utf-8"))
    constants = {
        name.id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    inner = {
        str(field.target.id): classes[field.annotation.id]
        for field in classes["RunConfig"].body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(field.annotation, ast.Name) and field.annotation.id in classes
    }
    whole = Group(
        "", _description(classes["RunConfig"]), tuple(_options("", classes["RunConfig"], constants, set(inner)))
    )
    return (
        whole,
        *(
            Group(name, _description(node), tuple(_options(f"{name}.", node, constants, set())))
            for name, node in inner.items()
        ),
    )


def choices(group: str) -> tuple[tuple[str, str], ...]:
    """Return name and description of each choice of a group (``model=tiny``)."""
    folder = files("experiments.conf").joinpath(group)
    if not group or not folder.is_dir():
        return ()
    entries = []
    for entry in folder.iterdir():
        if entry.name.endswith(".yaml"):
            comments = [line[2:] for line in entry.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            description = " ".join(c for c in comments if not c.startswith("@"))
            entries.append((entry.name.removesuffix(".yaml"), description))
    return tuple(sorted(entries))


def show_command(console: Console, name: str) -> None:
    """Print how one command is called, and its options."""
    lines = [line for line in USAGE.splitlines() if line.startswith(f"groundscope {name} ")]
    console.print("\n".join([*lines, ""]), markup=False, soft_wrap=True)
    if name == "audit":
        console.print(_AUDIT, markup=False, soft_wrap=True)
    elif name in {group.name for group in groups()}:
        show(console, name)
    else:
        console.print("All commands and options: groundscope help", markup=False)


def show(console: Console, about: str = "") -> None:
    """Print an overview, or the description of one group or option.

    Raises
    ------
    ConfigError
        For an unknown group or option.
    """
    if about:
        _show_one(console, about)
        return
    console.print(USAGE, markup=False, soft_wrap=True)
    console.print("\nOptions of a run (groundscope help=GROUP describes those of a group):\n", style="bold")
    whole, *others = groups()
    _table(console, whole.options)
    named = {g.name: ", ".join(name for name, _ in choices(g.name)) for g in others}
    console.print("\nGroups:\n", style="bold")
    _rows(console, [(f"{g.name}.…", f"{g.meaning}\n{g.name}= {named[g.name]}") for g in others])
    console.print(
        "\nOptions of Hydra work too: --cfg job prints the composed options, hydra/launcher=joblib runs a sweep in parallel, "
        "--hydra-help lists all.",
        markup=False,
    )


def _show_one(console: Console, about: str) -> None:
    group = next((g for g in groups() if g.name == _STAGES.get(about, about)), None)
    if group is None:
        options = tuple(o for g in groups() for o in g.options if o.key == about)
        if not options:
            names = [g.name for g in groups() if g.name]
            keys = [o.key for g in groups() for o in g.options]
            msg = f"unknown option or group '{about}'; groups: {', '.join(names)}{nearest(about, [*names, *keys])}"
            raise ConfigError(msg)
        _table(console, options)
        return
    console.print(f"{group.name}: {group.meaning}\n", style="bold", markup=False)
    _table(console, group.options)
    named = choices(group.name)
    if named:
        console.print(f"\nChoices, {group.name}=NAME:\n", style="bold", markup=False)
        _rows(console, named)


def _table(console: Console, options: Sequence[Option]) -> None:
    _rows(console, [(f"{o.key}={o.default}", f"{o.meaning} ({o.type})") for o in options])


def _rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    grid.add_column(style="cyan", overflow="fold", max_width=44)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))  # as text: square brackets are not markup
    console.print(grid)


def _description(node: ast.ClassDef) -> str:
    return " ".join((ast.get_docstring(node) or "").split())


def _options(prefix: str, node: ast.ClassDef, constants: dict[str, str], skip: set[str]) -> list[Option]:
    """Return the fields of a dataclass; the string after a field is its description."""
    options = []
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name) or field.target.id in skip:
            continue
        description = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            description = " ".join(str(after.value.value).split())
        options.append(
            Option(
                prefix + field.target.id,
                ast.unparse(field.annotation).replace(" | None", " or null").replace("OneOrMore", "str or list[str]"),
                _default(field.value, constants),
                description,
            )
        )
    return options


def _default(node: ast.expr | None, constants: dict[str, str]) -> str:
    """Return a default in the notation of the command line; empty for a required option."""
    if node is None or (isinstance(node, ast.Name) and node.id == "MISSING"):
        return ""
    if isinstance(node, ast.Call):  # field(default_factory=list), or =lambda: […]
        factory = next((k.value for k in node.keywords if k.arg == "default_factory"), None)
        if isinstance(factory, ast.Lambda):
            return _default(factory.body, constants)
        if isinstance(factory, ast.Name):
            return {"list": "[]", "dict": "{}"}.get(factory.id, factory.id)
        # list(STAGES)
        inside = node.args[0] if node.args else None
        if isinstance(inside, ast.Name) and inside.id in constants:
            return _written(ast.literal_eval(constants[inside.id]))
        return ast.unparse(node)
    try:
        return _written(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)


def _written(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_written(v) for v in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
