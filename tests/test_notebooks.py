"""Every notebook runs from top to bottom.

Each runs as a reader on Colab runs it: alone in an empty folder, in a plain Jupyter kernel, and with an `nbdev` that cannot be
imported. That is stricter than `nbdev-test`, which executes the same cells but the skipped ones, so `nbdev-test` follows only
where it differs: in notebooks with cells that it must skip, or the first if none has. Running each page twice would double CI's time.
"""
import json
import re

import pytest
from conftest import BIN, ROOT, find_notebooks, run

NOTEBOOKS = {str(p.relative_to(ROOT / "nbs").with_suffix("")): p for p in find_notebooks()}
TAKES_LONG = re.compile(r"^#\|\s*(slow|notest|eval:\s*false)", flags=re.M)   # cells of minutes and more
SKIPPED = re.compile(r"^#\|\s*(slow|notest|eval:\s*false|cuda)", flags=re.M)   # cells that nbdev-test leaves out

PLAIN = dict(MPLBACKEND=None, OMP_NUM_THREADS="1")   # pages compute with small tensors: on a busy machine a second thread multiplies their time


def cells(path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]
def has(cell, flags) -> bool: return cell["cell_type"] == "code" and bool(flags.search("".join(cell["source"])))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_plain_kernel(name, tmp_path):
    nb = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
    nb["cells"] = [c for c in nb["cells"] if not has(c, TAKES_LONG)]
    work = tmp_path / "alone"
    work.mkdir()
    (work / "page.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/nbdev.py").write_text("raise ImportError('a notebook must not need nbdev')")
    run(BIN / "jupyter", "nbconvert", "--to=notebook", "--execute", "--inplace", "--ExecutePreprocessor.timeout=600",
        "--ExecutePreprocessor.kernel_name=python3", "page.ipynb", cwd=work, PYTHONPATH=str(tmp_path / "blocked"), **PLAIN)


DIFFERING = [name for name, path in NOTEBOOKS.items() if any(has(c, SKIPPED) for c in cells(path))]


@pytest.mark.parametrize("name", DIFFERING or list(NOTEBOOKS)[:1])
def test_nbdev(name): assert "Success." in run(BIN / "nbdev-test", NOTEBOOKS[name], **PLAIN)
