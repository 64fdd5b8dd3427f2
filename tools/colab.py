"""Run pages as Colab does: the wheel and a Jupyter kernel in a fresh environment, and nothing of the tools that make the package.

    python tools/colab.py                                   build the wheel, install it, run all pages (about an hour on one core)
    python tools/colab.py 08_solvers tutorials/quickstart   some of them
    python tools/colab.py --python python3.13 --env DIR     under another Python; keep the environment, or use it again

Each page runs in a plain kernel, in an empty folder outside the repository. Cells that take minutes (`#| slow`) are left out, as
in the tests, unless --slow asks for them. One line says how a page went; the command fails if any page did.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "pyproject.toml", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "ddpm_edm"
TAKES_LONG = re.compile(r"^#\|\s*(slow|notest|eval:\s*false)", flags=re.M)    # cells of minutes and more


def pages() -> dict[str, Path]:
    "Every notebook by its name, as in `tutorials/quickstart`."
    nbs = ROOT / "nbs"
    return {p.relative_to(nbs).with_suffix("").as_posix(): p for p in sorted(nbs.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}


def quick(nb: dict) -> dict:
    "A notebook without the cells that take long."
    return nb | {"cells": [c for c in nb["cells"] if c["cell_type"] != "code" or not TAKES_LONG.search("".join(c["source"]))]}


def build(folder: Path) -> Path:
    "The wheel, made from the sdist, which is made in a copy of what it needs, without the network."
    for name in SOURCES: (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation"], cwd=folder, capture_output=True, text=True)
    if done.returncode: sys.exit(f"no wheel:\n{done.stdout}{done.stderr}")
    wheel, = (folder / "dist").glob("*.whl")
    return wheel


def environment(env: Path, python: str, wheel: Path) -> Path:
    "The Python of a virtual environment that holds this wheel and a kernel."
    if not env.exists(): subprocess.run([python, "-m", "venv", env], check=True)
    pip = [env / "bin/python", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, wheel, "ipykernel"], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)    # the same version may be there from before
    return env / "bin/python"


def run(page: Path, slow: bool = False) -> str | None:
    "What went wrong on a page, if anything did."
    nb = json.loads(page.read_text(encoding="utf-8"))
    nb = nbformat.reads(json.dumps(nb if slow else quick(nb)), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(nb, timeout=1800 if slow else 600, kernel_name="colab", resources={"metadata": {"path": folder}})
        try: client.execute()
        except CellExecutionError as e: return f"{e.ename}: {e.evalue}".splitlines()[0]
        except (CellTimeoutError, DeadKernelError) as e: return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def main(names: list[str], python: str, env: str | None, slow: bool) -> int:
    "The number of pages that failed."
    if unknown := set(names) - set(pages()): sys.exit(f"no such page: {', '.join(sorted(unknown))}; there are {', '.join(pages())}")
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "source").mkdir()
        home = environment(Path(env or f"{tmp}/env").absolute(), python, build(Path(tmp) / "source"))
        kernel = [str(home), "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
        spec = Path(tmp) / "jupyter/kernels/colab/kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": kernel, "display_name": "Colab", "language": "python"}))
        os.environ |= {"JUPYTER_PATH": f"{tmp}/jupyter", "PATH": f"{home.parent}{os.pathsep}{os.environ['PATH']}",    # the commands of the wheel
                       "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        for name in ("PYTHONPATH", "MPLBACKEND"): os.environ.pop(name, None)
        chosen, failed = {name: pages()[name] for name in names or pages()}, 0
        for name, path in chosen.items():
            start = time.monotonic()
            wrong = run(path, slow)
            failed += wrong is not None
            print(f"{name:28} {time.monotonic() - start:5.0f} s  {'ok' if wrong is None else f'FAILED: {wrong}'}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} pages ran")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PAGE", help="names below nbs/, without .ipynb; default: all")
    parser.add_argument("--python", default=sys.executable, help="makes the environment; default: the one that runs this")
    parser.add_argument("--env", metavar="DIR", help="the environment's folder; default: a new one, removed afterwards")
    parser.add_argument("--slow", action="store_true", help="run the cells that take minutes, too")
    sys.exit(bool(main(**vars(parser.parse_args()))))
