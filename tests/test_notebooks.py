"""Every notebook runs from top to bottom.

Each runs as a reader on Colab runs it: alone in an empty folder, in a plain Jupyter kernel that finds the package, what it requires
and nothing else of this environment. (`tools/colab.py` runs pages in an environment made for it; CI does so for all.) That is
stricter than `nbdev-test`, which executes the same cells but the skipped ones, so `nbdev-test` follows only where it differs: in
notebooks with cells that it must skip, or the first if none has. Running each page twice would double CI's time.
"""
import json
import re
import sys
from configparser import ConfigParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions

import pytest
from colab import pages, quick
from conftest import BIN, ROOT, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOTEBOOKS = pages()
SKIPPED = re.compile(r"^#\|\s*(slow|notest|eval:\s*false|cuda)", flags=re.M)   # cells that nbdev-test leaves out
PLAIN = dict(MPLBACKEND=None, OMP_NUM_THREADS="1")   # pages compute with small tensors: on a busy machine a second thread multiplies their time
HIDE = """
import re
import sys

class Without:
    "A finder that does not find some modules and distributions."
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *args): return None if name.split(".")[0] in {modules!r} else self.finder.find_spec(name, *args)
    def find_distributions(self, *args):
        found = getattr(self.finder, "find_distributions", lambda *args: ())(*args)
        return (d for d in found if re.sub("[-_.]+", "-", d.metadata["Name"] or "").lower() not in {names!r})

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def sources(path) -> list[str]: return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def with_requirements(*names: str) -> set[str]:
    "The names of what `pip install` with these names would bring."
    found, todo = set(), [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), *sorted(requirement.extras)
        if key in found: continue
        try: there = distribution(requirement.name)
        except PackageNotFoundError: continue
        found.add(key)
        lines = [Requirement(line) for line in there.requires or []]
        todo += [r for r in lines if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras))]
    return {name for name, *_ in found}


def top_modules(dist: Distribution) -> set[str]:
    parts = [str(f).split("/") for f in dist.files or []]
    names = {p[0] if len(p) > 1 else p[0].split(".")[0] for p in parts if p[-1].endswith((".py", ".so"))}
    return {name for name in names if name.isidentifier()}


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    "A folder with the kernel `plain`, which does not see what `pip install ddpm_edm ipykernel` would not bring."
    there = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")    # what is installed from a clone may remember older ones
    kept = with_requirements("ipykernel", *settings["DEFAULT"]["requirements"].split()) | {"ddpm-edm"}
    names = set(there) - kept
    modules = set().union(*(top_modules(there[n]) for n in names)) - set().union(*(top_modules(there[n]) for n in kept))
    assert {"nbdev", "execnb", "pytest", "hypothesis", "diffusers", "tensorboard"} <= modules
    assert not {"ddpm_edm", "torch", "numpy", "ipykernel", "PIL", "sklearn"} & modules
    folder = tmp_path_factory.mktemp("jupyter")
    (folder / "sitecustomize.py").write_text(HIDE.format(modules=modules, names=names))
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "plain", "language": "python",
            "env": {"PYTHONPATH": str(folder)}}
    (folder / "kernels/plain").mkdir(parents=True)
    (folder / "kernels/plain/kernel.json").write_text(json.dumps(spec))
    return folder


def execute(nb: dict, kernels, work) -> dict:
    "A notebook with the outputs it has in the kernel `plain` and in a folder of its own."
    work.mkdir()
    (work / "page.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    run(BIN / "jupyter", "nbconvert", "--to=notebook", "--execute", "--inplace", "--ExecutePreprocessor.timeout=600",
        "--ExecutePreprocessor.kernel_name=plain", "page.ipynb", cwd=work, JUPYTER_PATH=str(kernels), **PLAIN)
    return json.loads((work / "page.ipynb").read_text(encoding="utf-8"))


def test_the_plain_kernel_lacks_our_tools(kernels, tmp_path):
    code = """
from importlib.metadata import distributions
from importlib.util import find_spec
import ddpm_edm.cli
assert not [name for name in ("nbdev", "execnb", "pytest", "diffusers", "tensorboard", "torch_fidelity", "pypandoc") if find_spec(name)]
assert not [d for d in distributions() if d.metadata["Name"] in ("nbdev", "diffusers")]
try: import diffusers
except ImportError: print("none")
"""
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": code, "outputs": [], "execution_count": None}
    page = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    assert execute(page, kernels, tmp_path / "alone")["cells"][0]["outputs"][0]["text"] == ["none\n"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_plain_kernel(name, kernels, tmp_path):
    execute(quick(json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))), kernels, tmp_path / "alone")


DIFFERING = [name for name, path in NOTEBOOKS.items() if any(SKIPPED.search(source) for source in sources(path))]


@pytest.mark.parametrize("name", DIFFERING or list(NOTEBOOKS)[:1])
def test_nbdev(name): assert "Success." in run(BIN / "nbdev-test", NOTEBOOKS[name], **PLAIN)


# ---- the cell that installs ----

def test_pages_install_the_package_first():
    "All that use it, in the first cell with code, the same everywhere."
    codes = {name: [s for s in sources(path) if not re.fullmatch(r"(#\|.*\s*)*", s)] for name, path in NOTEBOOKS.items()}
    first = {name: code[0] for name, code in codes.items() if re.search(r"^\s*(from|import) ddpm_edm", "\n".join(code), flags=re.M)}
    assert len(first) > 40 and "%pip install" in first["00_core"]
    assert [name for name, cell in first.items() if cell != first["00_core"]] == []


def test_install_cell(tmp_path):
    "Where the package is missing the cell says that it installs, and installs; else it does nothing."
    cell = next(s for s in sources(NOTEBOOKS["00_core"]) if "%pip" in s)
    script = f"""
import importlib.util, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.register_magic_function(lambda line: print("pip", line), magic_name="pip")
find, missing = importlib.util.find_spec, "missing" in sys.argv
importlib.util.find_spec = lambda name, *args: None if missing and name == "ddpm_edm" else find(name, *args)
assert shell.run_cell({cell!r}).success
"""
    home = dict(IPYTHONDIR=str(tmp_path))
    said = run(sys.executable, "-c", script, "missing", cwd=tmp_path, **home).splitlines()
    assert said[-1] == "pip install -q git+https://github.com/ddpm-edm/ddpm_edm", said
    assert "nstalling" in said[0] and "ddpm_edm" in said[0], said
    assert run(sys.executable, "-c", script, "there", cwd=tmp_path, **home) == ""
