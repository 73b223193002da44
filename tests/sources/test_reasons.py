"""docs/data-formats.md names every reason for a quarantine and every column of every table."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from clha import schema


def reasons(tree: ast.AST) -> Iterator[str]:
    """Reasons that code gives: Unusable("...", ...) and {"reason": "..."}."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Unusable" and node.args:
            values = [node.args[0]]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "reason"]
        else:
            continue
        yield from (v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))


@pytest.fixture(scope="module")
def documented(root: Path) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", (root / "docs" / "data-formats.md").read_text(encoding="utf-8")))


def test_every_reason_in_the_code_is_documented(root: Path, documented: set[str]):
    found = {
        reason
        for file in (root / "clha").rglob("*.py")
        for reason in reasons(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert {"malformed_json", "prompt_too_long", "no scored candidate"} <= found, "the search finds what is there"
    assert found <= documented, f"not in docs/data-formats.md: {sorted(found - documented)}"


def test_every_column_is_documented(documented: set[str]):
    columns = {name for value in vars(schema).values() if isinstance(value, pa.Schema) for name in value.names}
    assert columns <= documented, f"not in docs/data-formats.md: {sorted(columns - documented)}"
