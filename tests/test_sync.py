"Notebooks, modules, README and commands say the same, and modules build on one another in reading order."
import ast
import json
import re
import sys

import pytest
from conftest import BIN, ROOT, copy_source, find_notebooks, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A folder where `nbdev-export`, `nbdev-clean` and nbdev's site settings have been made anew from the notebooks."
    dest = copy_source(tmp_path_factory.mktemp("sync"), "pyproject.toml", "_quarto.yml", "nbs", "ddpm_edm/__init__.py")
    env = {"IN_TEST": None, "JUPYTER_DATA_DIR": str(dest / "jupyter")}   # nbdev exports nothing where IN_TEST is set
    run(BIN / "nbdev-export", cwd=dest, **env)
    run(BIN / "nbdev-clean", cwd=dest, **env)
    run(sys.executable, "-c", "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()", cwd=dest, **env)
    return dest


def contents(folder, pattern): return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob(pattern)}


def test_export(exported):
    here, fresh = contents(ROOT / "ddpm_edm", "*.py"), contents(exported / "ddpm_edm", "*.py")
    assert here.keys() - fresh.keys() == set(), "modules that no notebook makes"
    assert fresh.keys() - here.keys() == set(), "notebooks whose module is missing: run nbdev-export"
    assert [name for name in fresh if fresh[name] != here[name]] == [], "differ from their notebooks: run nbdev-export"


def test_clean(exported):
    dirty = [p.name for p in find_notebooks() if p.read_text(encoding="utf-8") != (exported / p.relative_to(ROOT)).read_text(encoding="utf-8")]
    assert dirty == [], "run nbdev-clean"


def test_site_settings(exported):
    assert (ROOT / "nbs/nbdev.yml").read_text() == (exported / "nbs/nbdev.yml").read_text(), "run nbdev.quarto.refresh_quarto_yml"
    assert (ROOT / "nbs/_quarto.yml").read_text() == (ROOT / "_quarto.yml").read_text()


def modules() -> dict[str, tuple[int, str]]:
    "Each module's number and letter: those of the notebook which exports it, so that 19b comes after 19."
    found = {}
    for path in find_notebooks():
        code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code")
        if m := re.search(r"^#\| *default_exp +(\S+)", code, flags=re.M):
            digits, letter, name = re.fullmatch(r"(\d\d)([a-z]?)_(\w+)", path.stem).groups()
            assert name == m[1], f"{path.name} exports {m[1]}"
            assert (int(digits), letter) not in found.values(), f"two notebooks have the number {digits}{letter}"
            found[name] = int(digits), letter
    return found


def imports(code: str) -> set[str]:
    "Modules of this package that code imports, inside functions too."
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("ddpm_edm." if node.level else "") + (node.module or "")
            names = [base] if base.strip(".") != "ddpm_edm" else [f"ddpm_edm.{a.name}" for a in node.names]
        else: continue
        found |= {name.split(".")[1] for name in names if name.startswith("ddpm_edm.")}
    return found


def test_imports_are_found():
    code = "import ddpm_edm.a\nfrom .b import x\nfrom . import c\ndef f():\n from ddpm_edm.d import y\n from ddpm_edm import e\nimport torch.f"
    assert imports(code) == {"a", "b", "c", "d", "e"}


def test_reading_order():
    number = modules()
    assert len(number) >= 10
    later = [(name, other) for name in number for other in imports((ROOT / f"ddpm_edm/{name}.py").read_text(encoding="utf-8"))
             if number.get(other, (99, "")) >= number[name]]
    assert later == [], "exported code may import from lower-numbered notebooks only"


def test_readme(): run(sys.executable, "tools/docs.py", "readme", "--check")


def test_commands():
    "The README's two commands are one line each, and .ci/run runs the second exactly as printed."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [b.strip() for b in re.findall(r"^```bash\n(.*?)^```", readme, flags=re.M | re.S) if "python3 -m venv" in b]
    assert len(blocks) == 2 and all("\n" not in b for b in blocks), blocks
    train, test = blocks
    assert train.startswith("python3 -m venv .venv && .venv/bin/pip install") and "ddpm-edm-train" in train and "ddpm-edm-sample" in train
    assert test.endswith("python -m pytest")
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == test
