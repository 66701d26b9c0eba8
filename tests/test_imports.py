"""What importing costs, and which way dependencies point."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import powermc

PACKAGE = Path(powermc.__file__).parent


def modules_after(code):
    """Names in sys.modules of a fresh interpreter that has run `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def top(names):
    return {name.partition(".")[0] for name in names}


def test_import_powermc_is_light():
    """`powermc --version` and shell completion import the package: seconds of torch would be felt."""
    heavy = {"torch", "arviz", "transformers", "matplotlib", "hypothesis", "numba", "scipy", "xarray", "pandas"}
    assert not heavy & top(modules_after("import powermc"))


def test_the_core_needs_numpy_and_the_standard_library_only():
    core = ("types", "bounds", "errors", "choices", "targets", "proposals", "scheduling", "kernels", "sequences")
    before = top(modules_after("import numpy.random"))
    after = top(modules_after("\n".join(f"import powermc.{name}" for name in core)))
    assert after - before - set(sys.stdlib_module_names) == {"powermc"}


def test_the_toys_and_the_harness_need_no_language_model():
    after = top(modules_after("import powermc.toy, powermc.testing, powermc.sampling"))
    assert not {"torch", "transformers", "arviz", "hypothesis", "pytest"} & after


def test_samples_in_a_store_need_no_language_model():
    after = top(modules_after("import powermc.store.samples_writing"))
    assert not {"torch", "transformers", "arviz", "numba"} & after


def test_tasks_and_metrics_need_no_language_model():
    after = top(modules_after("import powermc.evaluation.tasks, powermc.evaluation.metrics"))
    assert not {"torch", "transformers", "arviz", "math_verify", "sympy", "datasets"} & after


def test_strategies_are_importable_by_name():
    """`import powermc.testing` works without hypothesis; the strategies are one import further."""
    assert "hypothesis" in top(modules_after("from powermc.testing import strategies"))


def imports(module):
    """Dotted names of every powermc module that a source file imports, anywhere in it (type checking included)."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name} imports relatively"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("powermc.")}


def home(name):
    """`powermc.kernels.metropolis` -> `kernels`."""
    return name.split(".")[1]


# What each part may import, itself apart. Dependencies point up: nothing imports what comes later.
MAY_IMPORT = {
    "errors": set(),
    "types": {"errors"},
    "bounds": {"types"},
    "choices": {"errors"},
    "targets": {"errors", "types", "bounds"},
    "proposals": {"errors", "types"},
    "scheduling": {"errors", "types"},
    "kernels": {"errors", "types", "bounds", "targets"},
    "sequences": {"errors", "types", "bounds", "targets", "proposals", "kernels"},
    "toy": {"errors", "types", "targets", "sequences"},
    "config": {"errors", "visible"},
    "progress": {"errors", "types", "sequences", "visible"},
    "sampling": {"errors", "types", "choices", "scheduling", "sequences", "progress", "store"},  # a store, if asked
    "testing": {
        "errors", "types", "choices", "targets", "proposals", "scheduling", "kernels", "sequences", "toy",
    },
    "recording": {
        "errors", "types", "choices", "early_exit", "progress", "results", "sampling", "scheduling", "sequences",
        "settings", "lm",
    },
    "store": {
        "_version", "errors", "types", "early_exit", "lm", "power", "recording", "results", "sampling", "sequences",
        "settings", "stages",
    },
    "diagnostics": {"errors", "sequences", "results"},
    "summary": {"diagnostics", "results"},
    "arviz_export": {"_version", "errors", "files", "diagnostics", "results"},
    "visible": set(),
    "jsonl": {"errors"},
    "evaluation/tasks": {"errors", "choices", "jsonl", "evaluation"},
    "evaluation/metrics": {"errors"},
    "series": {"diagnostics", "lm", "results"},
    "plots": {"errors", "files", "diagnostics", "lm", "results", "series"},
    "report": {
        "_version", "errors", "files", "config", "sequences", "diagnostics", "results", "series", "visible",
    },
    "hf_call": {"errors", "power"},
    "hf": {"errors", "hf_call", "lm", "power", "results", "sequences"},
    "integrations": {"errors", "types", "lm", "power", "sequences"},
}  # fmt: skip


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_dependencies_point_one_way(part):
    """Kernels know no sequences, sequences no model class, nothing of the core the language-model layer."""
    sources = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else sorted((PACKAGE / part).rglob("*.py"))
    assert sources
    for source in sources:
        wrong = {home(name) for name in imports(source)} - MAY_IMPORT[part] - {part}
        assert not wrong, f"{source.relative_to(PACKAGE)} imports {sorted(wrong)}"


LATER = {
    "sampling", "power", "results", "store", "cli", "config", "report", "evaluation", "progress", "settings", "testing",
    "plots", "series", "hf", "hf_call", "integrations",
}  # fmt: skip


def test_the_language_model_layer_imports_nothing_above_it():
    for source in sorted((PACKAGE / "lm").rglob("*.py")):
        wrong = {home(name) for name in imports(source)} & LATER
        assert not wrong, f"{source.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_no_core_module_imports_a_third_party_package_but_numpy():
    """Function-level imports too, which sys.modules would not show."""
    allowed = {"powermc", "numpy", *sys.stdlib_module_names}
    for part in ("types", "bounds", "errors", "choices", "targets", "proposals", "scheduling", "kernels", "sequences"):
        for source in sorted(PACKAGE.glob(f"{part}.py")) + sorted((PACKAGE / part).rglob("*.py")):
            for node in ast.walk(ast.parse(source.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                assert top(names) <= allowed, f"{source.name} imports {names}"


def test_the_core_stays_readable_in_one_sitting():
    """Design section 10: types, choices, targets, kernels under 800 lines."""
    sources = [PACKAGE / f"{part}.py" for part in ("types", "choices", "targets")]
    sources += sorted((PACKAGE / "kernels").rglob("*.py"))
    assert sum(len(source.read_text().splitlines()) for source in sources) < 800
