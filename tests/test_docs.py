"""The docs that people write: length and width, links and paths that exist, python blocks that run."""

import dataclasses
import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import device_mesh

import tedfx
from tests.marks import slow

ROOT = Path(__file__).parents[1]
GENERATED = {
    "ted",
    "memory",
    "verify-2xH100",
    "two_nodes",
    "onebit",
    "models",
    "parity",
    "parity-savings",
    "parity-zero",
}
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(p for p in ROOT.glob("docs/*.md") if p.stem not in GENERATED),
]
RUN = ("README.md", "docs/getting-started.md")  # pages whose python blocks run, in order, in one namespace

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def _lines(page: Path):
    """(number, line, language of the code block that it is in, or None) of a page; fences are left out."""
    language = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            language = line.strip().strip("`") or "text" if language is None else None
        else:
            yield number, line, language


def _prose(page: Path) -> str:
    return "\n".join(line for _, line, language in _lines(page) if language is None)


def _slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", _prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@every_page
def test_prose_is_narrow(page):
    prose = [(n, line) for n, line, language in _lines(page) if language is None and line[:1] != "|"]
    assert not [n for n, line in prose if len(re.sub(r"https?://\S+", "", line)) > 110]


@every_page
def test_links_lead_somewhere(page):
    dead = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", _prose(page)):
        file = (page.parent / target).resolve() if target else page
        if "://" not in target and not (file.exists() and (not anchor or anchor in _slugs(file))):
            dead.append(f"{target}#{anchor}")
    assert not dead


@functools.cache
def _tree() -> list[str]:
    rooms = ("tedfx", "passes", "tests", "benchmarks", "examples", "docs")
    return [f"/{p.relative_to(ROOT)}" for room in rooms for p in (ROOT / room).rglob("*")]


@every_page
def test_paths_exist(page):
    """Paths from the root of the checkout, in blocks too; and in prose the bare name of a Python file."""
    named = re.findall(
        r"(?<![\w./-])(?:tedfx|passes|tests|benchmarks|examples|docs|\.ci)/[\w./-]*[\w/]", page.read_text()
    )
    bare = [n for n in re.findall(r"`([\w/]+\.py)`", _prose(page)) if n not in named]
    assert not [path for path in named if not (ROOT / path).exists()]
    assert not [name for name in bare if not any(path.endswith(f"/{name}") for path in _tree())]


def test_readme_lists_every_option():
    cells = re.findall(r"^\|([^|]*)\|", (ROOT / "README.md").read_text(), re.M)
    table = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    others = inspect.signature(tedfx.parallelize).parameters.values()
    names = {p.name for p in others if p.kind is p.KEYWORD_ONLY}
    names |= {field.name for field in dataclasses.fields(tedfx.Options)}
    assert not names - table


@pytest.mark.parametrize("page, blocks", [("README.md", 1), *(slow(page, 100) for page in RUN)])
def test_python_blocks_run(page, blocks, tmp_path):
    """The first of a page's blocks, or all."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_docs", page, str(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _run(page: Path, blocks: int) -> None:
    """The first python blocks, on meshes of one rank whatever sizes and device the page names."""
    made = device_mesh.init_device_mesh
    device_mesh.init_device_mesh = lambda device, sizes, **names: made("cpu", [1 for _ in sizes], **names)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names, text = {"__name__": "page"}, page.read_text()
    for block in [*re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)][:blocks]:
        lines_before = "\n" * text[: block.start(1)].count("\n")  # so that a traceback has the page's lines
        exec(compile(lines_before + block[1], str(page), "exec"), names)
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(ROOT / sys.argv[1], int(sys.argv[2]))
