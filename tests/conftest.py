"What the test files share."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent   # console scripts of this environment
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")   # a worker for each core, and a core for each worker


def run(*command, cwd=ROOT, **env) -> str:
    "Output of a command that must succeed; a variable set to None is removed from its environment."
    command = [str(c) for c in command]
    env = {k: v for k, v in (os.environ | env).items() if v is not None}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode: pytest.fail(f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}", pytrace=False)
    return done.stdout


def copy_source(dest: Path, *names: str) -> Path:
    "Copy files and folders of the repository, so that a test leaves the tree alone."
    rubbish = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "runs", "*.egg-info")
    for name in names:
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, dest / name, ignore=rubbish, symlinks=True)
        else: (dest / name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT / name, dest / name)
    return dest


def find_notebooks() -> list[Path]:
    return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
