"Package metadata that pyproject.toml declares dynamic; it comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def lines(key: str) -> list[str]:
    return [line for line in cfg[key].splitlines() if line]


setup(
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {cfg['status']}",
        f"Intended Audience :: {cfg['audience']}",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in cfg["pythons"].split()),
        "Typing :: Typed",
    ],
    python_requires=f">={cfg['min_python']}",
    package_data={"ddpm_edm": ["py.typed"]},
    install_requires=lines("requirements"),
    extras_require={extra: lines(f"{extra}_requirements") for extra in ("dev", "bench", "inception")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["ddpm_edm = ddpm_edm._modidx:d"]},
)
