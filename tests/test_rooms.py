"""The rooms of tedfx/ and what each may import: the rooms above it in this list, `tedfx.ops`, and the files
at the root that know no room. docs/design.md says what is in a room."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = [
    "errors",
    "dtypes",
    "_torch",
    "_transformers",
    "_version",
    "options",
    "arguments",  # files that any room may import
    "kernels",
    "ops",
    "graph",
    "ranks",
    "frontends",
    "placement",
    "trace",
    "stages",
    "rules",
    "decisions",
    "state",
    "analysis",
    "checking",
    "capture",
    "passes",
    "runtime",
    "saving",
    "optim",
    "compiler",
    "calls",
    "api",
    "report",
    "verification",
    "cli",
]
# Imports inside of functions that go down the list, and why.
DOWN = {
    (
        "rules.bodies",
        "decisions.decide",
    ): "the rule of a Function decides over its body, which is a graph itself",
    ("runtime.module", "report.explanation"): "pm.explain()",
    **{
        ("graph.facts", other): "the types of facts, for annotations alone"
        for other in (
            "placement.factors",
            "placement.sizes",
            "placement.slots",
            "placement.types",
            "rules.base",
        )
    },
}


def _modules():
    for file in [*ROOT.glob("tedfx/**/*.py"), *ROOT.glob("passes/*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "tedfx" else ("tedfx", *parts)).removesuffix(".__init__")
        if name != "tedfx":
            yield name.removeprefix("tedfx."), file


MODULES = dict(_modules())


def _imports(file):
    """(module, whether the import stands at the top) of everything of tedfx that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tedfx":
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("tedfx.")
                yield (
                    full if full in MODULES else node.module.removeprefix("tedfx").lstrip("."),
                    not node.col_offset,
                )
        elif isinstance(node, ast.Import):
            yield from (
                (a.name.removeprefix("tedfx."), not node.col_offset)
                for a in node.names
                if a.name.startswith("tedfx.")
            )


def test_imports_point_up():
    wrong, met = [], set()
    for name, file in MODULES.items():
        for other, at_the_top in _imports(file):
            here, there = name.split(".")[0], other.split(".")[0]
            if here == there or ROOMS.index(there) < ROOMS.index(here):
                continue
            if not at_the_top and (name, other) in DOWN:
                met.add((name, other))
            else:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong
    assert met == DOWN.keys()


def test_the_map_names_every_room():
    text = (ROOT / "docs" / "design.md").read_text()
    rooms = {name.split(".")[0] for name, file in MODULES.items() if file.parent != ROOT / "tedfx"}
    assert not [room for room in rooms if f"`{room}/`" not in text]


def test_every_pass_has_a_test_file_of_its_name():
    passes = {file.stem for file in ROOT.glob("passes/*.py")} - {"__init__"}
    tested = {file.stem.removeprefix("test_") for file in ROOT.glob("tests/passes/test_*.py")}
    assert not passes - tested, sorted(passes - tested)
