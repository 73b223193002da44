"""The recipe in docs/training-alone.md, run as it stands there."""

import re
from pathlib import Path


def test_the_recipe_runs_as_it_is_written(root: Path, tiny_model: Path, tmp_path: Path, capsys):
    code = re.search(r"```python\n(.*?)```", (root / "docs" / "training-alone.md").read_text(), re.S)
    assert code is not None
    exec(code.group(1), {"MODEL": str(tiny_model), "OUTPUT": str(tmp_path / "out")})
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert 0 <= float(capsys.readouterr().out.strip().splitlines()[-1]) <= 1
