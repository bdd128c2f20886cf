"""The packages: layers of imports, costs of an import, public names, array shapes, and contents of the wheel."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packages import LIBRARY, PACKAGES, ROOT, module_name, source_files
from tests.shapes import checked

MODEL_STACK = {"nnsight", "transformers", "transformer_lens"}
HEAVY = MODEL_STACK | {"torch", "sklearn", "scipy", "pandas", "matplotlib", "h5py", "hydra", "omegaconf", "wandb"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def run(code: str, cwd: Path) -> list[str]:
    """Run code in a fresh interpreter, in an empty folder, and return the list that its last line prints as JSON."""
    environment = {**os.environ, "HOME": str(cwd), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, answer = done.stdout.splitlines()
    assert lines == []
    assert done.stderr == ""
    return json.loads(answer)


def loaded_by(statement: str, cwd: Path) -> set[str]:
    """Return the top-level names of the modules that a fresh interpreter holds after a statement."""
    return set(
        run(f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))", cwd)
    )


# ---- layers --------------------------------------------------------------------------------------------------------


def test_imports_follow_the_ladder() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_changes_nothing_and_loads_nothing_heavy(package: str, tmp_path: Path) -> None:
    code = f"""
import json, logging, os, signal, sys, threading, warnings

def state():
    return {{
        "environment": dict(os.environ),
        "path": list(sys.path),
        "threads": threading.active_count(),
        "log handlers": [repr(h) for h in logging.getLogger().handlers],
        "warning filters": [repr(f) for f in warnings.filters],
        "signals": repr(signal.getsignal(signal.SIGINT)),
        "files": sorted(os.listdir()),
    }}

before = state()
import {package}
after = state()
changed = [what for what in before if before[what] != after[what]]
print(json.dumps(changed + sorted({{m.split(".")[0] for m in sys.modules}} & {HEAVY!r})))
"""
    assert run(code, tmp_path) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from concepts import ConceptDataset, counterfactuals, loaders, scenes",
        "from lvlm import Head, Site, TokenSelection",
        "from activation_store import ActivationStore, ConceptDirection",
        "from probes import ProbeGrid, fit_grid",
    ],
)
def test_a_notebook_over_a_cache_needs_no_model(statement: str, tmp_path: Path) -> None:
    assert loaded_by(statement, tmp_path) & MODEL_STACK == set()


@pytest.mark.parametrize("module", ["format.schema", "writing.writer", "reading.store", "reading.integrity"])
def test_the_file_format_needs_numpy_and_h5py_only(module: str, tmp_path: Path) -> None:
    assert loaded_by(f"import activation_store.{module}", tmp_path) & HEAVY <= {"h5py"}


def test_concepts_know_no_tensors(tmp_path: Path) -> None:
    statement = "; ".join(f"import {module_name(path)}" for path in source_files("concepts"))
    assert loaded_by(statement, tmp_path) & (MODEL_STACK | {"torch", "h5py"}) == set()


# ---- lists of packages -------------------------------------------------------------------------------------------------


def test_the_list_of_packages_is_that_of_the_repository() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders - {"tests"} == set(PACKAGES)


def test_every_list_of_packages_in_pyproject_is_complete() -> None:
    """TOML cannot share a list; one that lacks a package would leave it out of the wheel, or unchecked, without a word."""
    tool = PYPROJECT["tool"]
    build, contracts = tool["hatch"]["build"]["targets"], {c["id"]: c for c in tool["importlinter"]["contracts"]}
    (shapes,) = (o for o in tool["pytest"]["ini_options"]["addopts"] if o.startswith("--jaxtyping-packages="))
    layers = {name.strip() for layer in contracts["ladder"]["layers"] for name in layer.split("|")}
    assert set(build["wheel"]["packages"]) == set(PACKAGES)
    assert {f"/{package}" for package in PACKAGES} <= set(build["sdist"]["include"])
    declaring = {
        module_name(path)
        for package in PACKAGES
        for path in source_files(package)
        if "from jaxtyping" in path.read_text()
    }
    assert set(shapes.partition("=")[2].split(",")) == {*declaring, "tests.shapes.checked"}
    assert set(tool["ruff"]["lint"]["isort"]["known-first-party"]) == {*PACKAGES, "tests"}
    assert set(tool["pyright"]["include"]) == {*PACKAGES, "tests", "validation", "benchmarks"}
    assert set(tool["importlinter"]["root_packages"]) == set(PACKAGES)
    assert {layer.partition(".")[0] for layer in layers} == set(PACKAGES)
    assert set(contracts["configuration"]["source_modules"]) == set(LIBRARY)


def test_the_reference_of_the_documentation_has_a_page_for_every_package() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    assert pages == {*PACKAGES, "testing"} - {"groundscope"}


# ---- packages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed_and_names_what_is_public(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    module = importlib.import_module(package)
    assert module.__doc__
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert not hasattr(module, "no_such_name")


def test_no_text_file_is_opened_in_the_encoding_of_the_machine() -> None:
    """Every `open`, `read_text` and `write_text` of the packages names UTF-8 or is binary."""
    wrong = []
    for path in [path for package in PACKAGES for path in source_files(package)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
            if name == "read_text" and not node.args and isinstance(node.func, ast.Attribute):
                wrong.append(f"{path}:{node.lineno}")
            if name == "write_text" and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
                wrong.append(f"{path}:{node.lineno}")
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            other = isinstance(owner, ast.Name) and owner.id in {"os", "Image"}
            if name == "open" and not other and not any("b" in t for t in texts[-1:]):
                wrong.append(f"{path}:{node.lineno}")
    assert wrong == []


# ---- array shapes ------------------------------------------------------------------------------------------------------


def test_shapes_in_signatures_are_checked() -> None:
    @jaxtyped(typechecker=checked)
    def product(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "d k"], scale: float) -> Float[np.ndarray, "n k"]:
        return scale * a @ b

    assert product(np.ones((2, 3)), np.ones((3, 4)), 1).shape == (2, 4)
    with pytest.raises(TypeCheckError):
        product(np.ones((2, 3)), np.ones((5, 4)), 1.0)
    with pytest.raises(TypeCheckError):
        product(np.ones((2, 3), dtype=np.int64), np.ones((3, 4)), 1.0)


def test_a_function_that_names_no_shape_takes_what_it_is_given() -> None:
    @jaxtyped(typechecker=checked)
    def same(x: int) -> int:
        return x

    assert same("text") == "text"  # pyright: ignore[reportArgumentType]  # what a user should not give


def test_modules_that_declare_shapes_are_under_the_check() -> None:
    from circuits.results.statistics import spearman

    assert hasattr(spearman, "__wrapped__"), "run the tests with the options of pyproject.toml"
    with pytest.raises(TypeCheckError):
        spearman(np.ones((2, 3)), np.ones((2, 4)))


def functions_of(module: ModuleType) -> Iterator[typing.Any]:
    for holder in (module, *(c for c in vars(module).values() if inspect.isclass(c))):
        for value in vars(holder).values():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                yield inspect.unwrap(function)


@pytest.mark.parametrize("package", LIBRARY)
def test_every_shape_in_a_signature_can_be_read_at_run_time(package: str) -> None:
    """A name imported for type checkers only would leave the shape unchecked without a word."""
    unread = []
    for path in source_files(package):
        if "jaxtyping" not in path.read_text():
            continue
        for function in functions_of(importlib.import_module(module_name(path))):
            if "[" not in str(function.__annotations__):
                continue
            try:
                typing.get_type_hints(function)
            except NameError as error:
                unread.append(f"{function.__module__}.{function.__qualname__}: {error}")
    assert unread == []


# ---- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from the checkout with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    here = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
    }
    assert shipped == here
    for pattern in (
        "concepts/scenes/icons/*.png",
        "lvlm/tiny/**/*.safetensors",
        "lvlm/tiny/**/*.json",
        "experiments/conf/**/*.yaml",
    ):
        assert list(ROOT.glob(pattern)), f"no {pattern} in the checkout"
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped


def test_lmms_eval_finds_the_model_of_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """As lmms-eval loads plug-ins: entry point, manifest, class. lmms-eval itself is replaced by two classes."""
    installed, other = tmp_path / "installed", tmp_path / "other"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    for name in ("lmms_eval", "lmms_eval/models", "lmms_eval/api"):
        (other / name).mkdir(parents=True)
        (other / name / "__init__.py").touch()
    (other / "lmms_eval/models/registry_v2.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass\nclass ModelManifest:\n    model_id: str\n    simple_class_path: str\n"
    )
    (other / "lmms_eval/api/model.py").write_text("class lmms:\n    pass\n")
    code = f"""
import importlib, json, sys
sys.path[:0] = [{str(installed)!r}, {str(other)!r}]
from importlib.metadata import entry_points
(entry,) = entry_points(group="lmms_eval.models")
manifest = entry.load()()
module, _, name = manifest.simple_class_path.rpartition(".")
module = importlib.import_module(module)
model_class = getattr(module, name)
print(json.dumps([entry.name, manifest.model_id, module.__file__, [base.__name__ for base in model_class.__mro__[:2]]]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    entry, model_id, file, classes = json.loads(done.stdout.splitlines()[-1])
    assert (entry, model_id, classes) == ("groundscope", "groundscope", ["GroundscopeModel", "lmms"])
    assert Path(file).is_relative_to(installed)


def test_the_wheel_has_metadata_licenses_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "groundscope = experiments.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(archive.namelist())
    assert f"Version: {PROJECT['version']}\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    needed = {
        Requirement(line.partition(": ")[2]) for line in metadata.splitlines() if line.startswith("Requires-Dist")
    }
    assert {r.name for r in needed if r.marker is None} == {Requirement(d).name for d in PROJECT["dependencies"]}


def test_shipped_weights_are_small() -> None:
    sizes = {p.name: p.stat().st_size for package in PACKAGES for p in (ROOT / package).rglob("*.safetensors")}
    assert {name: size for name, size in sizes.items() if size > 12 * 2**20} == {}


def test_every_dependency_is_pinned_within_its_range_and_has_its_reason() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    pins = dict(line.split("==") for line in lines)
    reasons = (ROOT / "CONTRIBUTING.md").read_text()
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), text
    for text in [*PROJECT["dependencies"], *(r for extra in extras.values() for r in extra)]:
        assert f"| {Requirement(text).name} |" in reasons, f"{text}: no row in CONTRIBUTING.md"
