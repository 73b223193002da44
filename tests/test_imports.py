"""Who may import what: the library knows nothing of Prefect, the flows nothing of torch, the trainer of neither."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "vllm", "datasets", "matplotlib", "accelerate", "prefect"}


def imported(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def imported_modules(file: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere; of `from a import b` also `a.b` where that is one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(by_module())
            names |= submodules or {node.module}
    return names


@cache
def by_module() -> dict[str, Path]:
    found = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files("clha", "flows")}
    return {name.removesuffix(".__init__"): f for name, f in found.items()}


def files(*folders: str) -> list[Path]:
    """All Python files of the project below these folders; fails when there is none."""
    found = sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))
    assert found
    return found


def modules(folder: str) -> list[str]:
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files(folder)]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("file", files("clha"), ids=lambda f: str(f.relative_to(ROOT)))
def test_the_library_imports_neither_prefect_nor_the_flows(file: Path):
    assert not imported(file) & {"prefect", "flows"}


@pytest.mark.parametrize("file", files("flows"), ids=lambda f: str(f.relative_to(ROOT)))
def test_the_flows_import_no_model_code(file: Path):
    assert not imported(file) & (HEAVY - {"prefect"})


@pytest.mark.parametrize("file", [f for f in files("clha") if f.parent.name != "stages"], ids=lambda f: f.stem)
def test_only_stages_know_stages(file: Path):
    assert not {name for name in imported_modules(file) if name.startswith("clha.stages")}


def test_nothing_is_imported_in_a_circle():
    graph = {m: {i for i in imported_modules(f) if i.startswith(("clha", "flows"))} for m, f in by_module().items()}
    circles = []
    for start in graph:
        seen: set[str] = set()
        ahead = list(graph[start])
        while ahead:
            name = ahead.pop()
            if name == start:
                circles.append(start)
                break
            if name not in seen:
                seen.add(name)
                ahead += graph.get(name, ())
    assert circles == []


@pytest.mark.parametrize("file", files("clha/training"), ids=lambda f: str(f.relative_to(ROOT)))
def test_the_training_core_imports_neither_vllm_nor_datasets(file: Path):
    assert not imported(file) & {"prefect", "vllm", "datasets"}


def loaded_by(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_heavy():
    assert loaded_by("import flows.cli") == set()


def test_what_runs_before_prefect_loads_nothing_heavy():
    assert (
        loaded_by("import flows.launch, flows.show, flows.server, flows.study, flows.terminal, clha.stages.runner")
        == set()
    )


def test_what_is_said_of_noise_loads_nothing_heavy():
    assert loaded_by("import clha.reporting.noise_facts, clha.stages.noise_study, clha.stages.study_cells") == set()


def test_the_flows_load_prefect_and_no_model_code():
    assert loaded_by("import flows.pipeline, flows.deploy, flows.noise_study, flows.watched") == {"prefect"}


@pytest.mark.parametrize("stage", ["prepare", "fit_reward", "generate", "rescore", "train", "evaluate", "report"])
def test_the_module_of_a_stage_loads_nothing_heavy(stage: str):
    assert loaded_by(f"import clha.stages.{stage}") == set()
