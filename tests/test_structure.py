"""The sizes that keep this repository readable, measured: what grows beyond them is to be split."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "ldm").rglob("*.py"))
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "tool").glob("*.py"))]

# Slow to import: a module that must stay light loads them, or modules of ours that do, where they are needed.
SLOW = """torch torchvision torchmetrics pytorch_lightning lightning_fabric transformers open_clip timm diffusers einops
safetensors scipy sklearn matplotlib cv2 PIL numpy omegaconf yaml jinja2 tensorboard tqdm huggingface_hub"""
HEAVY = set(SLOW.split())

WHOLE_CONFIGURATION = 18  # functions that take it; all others take the section or the values they need


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(node: ast.AST) -> set[str]:
    """The modules that an import statement may name."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def heavy_modules() -> set[str]:
    """The packages of HEAVY and the modules of ours whose own import loads one of them."""
    top = {module_of(path): set().union(*map(imported, ast.parse(path.read_text()).body)) for path in PACKAGE}
    found: set[str] = set()
    while True:
        more = {
            name
            for name, names in top.items()
            if any(each.partition(".")[0] in HEAVY or each in found for each in names)
        }
        if more == found:
            return found
        found = more


def light_imports_inside_functions(paths: list[Path]) -> list[str]:
    heavy, found = heavy_modules(), []
    for path in paths:
        for function in functions(path):
            for node in ast.walk(function):
                names = imported(node)
                if names and not any(name.partition(".")[0] in HEAVY or name in heavy for name in names):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return sorted(set(found))


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_a_package_has_at_most_12_modules() -> None:
    for folder in {path.parent for path in PACKAGE}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 12, folder.name


def test_a_file_has_at_most_500_lines_and_a_function_60() -> None:
    for path in [*PACKAGE, *SCRIPTS]:
        assert lines([path]) <= 500, path.name
        for function in functions(path):
            assert function.end_lineno - function.lineno < 60, f"{path.name}: {function.name}"


def test_init_files_import_nothing() -> None:
    assert not any("import" in path.read_text() for path in PACKAGE if path.name == "__init__.py")


def test_a_script_holds_flags_and_one_call() -> None:
    for path in SCRIPTS:
        assert lines([path]) <= 90, path.name
        assert "sys.path" not in path.read_text(), path.name


@pytest.mark.parametrize(("paths", "limit"), [(PACKAGE, 2), (SCRIPTS, 2)], ids=["ldm", "scripts"])
def test_imports_inside_functions_are_of_heavy_packages(paths: list[Path], limit: float) -> None:
    found = light_imports_inside_functions(paths)
    assert len(found) <= limit * lines(paths) / 1000, found


def test_few_functions_take_the_whole_configuration() -> None:
    whole = re.compile(r"\bConfig\b")
    found = []
    for path in [*PACKAGE, *SCRIPTS]:
        for function in functions(path):
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            if any(each.annotation and whole.search(ast.unparse(each.annotation)) for each in given):
                found.append(f"{path.relative_to(ROOT)}:{function.name}")
    assert len(found) <= WHOLE_CONFIGURATION, found


def test_no_name_space_of_flags_below_the_scripts() -> None:
    found = {path.relative_to(ROOT / "ldm").as_posix() for path in PACKAGE if "argparse.Namespace" in path.read_text()}
    assert found == {"core/cli.py"}  # where they are parsed
