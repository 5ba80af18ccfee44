"""The house: what may import what, and how large a function may be."""

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from configure import OWN_MODULES

LONGEST_FUNCTION = 40  # lines, docstring included
LONGEST_LINE = 110  # characters

# The house from the foundation up: a part may import itself and what lies below it
FLOORS = (("configure",), ("parametrization", "generate", "data"), ("model",), ("training",), ("train",),
          ("interop",), ("scaling",))
FLOOR_OF = {part: i for i, parts in enumerate(FLOORS) for part in parts}
# The one arrow upward, drawn late: weights of other programs that a run starts from or samples
READS_FOREIGN = "training.pretrained", "interop"
DOCUMENTS = ["README.md", "docs/hacking.md", "docs/using.md", "config/gpt3/README.md", "scaling/LAWS.md",
             "scaling/results/README.md", "scaling/results/DEMONSTRATIONS.md", "scaling/BENCHMARKS.md",
             "docs/mup.md", "lessons/README.md"]

# What a part must not import, beyond the house. Of `data`: the loader returns tensors, and needs torch itself
MUST_NOT_IMPORT = {
    "configure": {"torch", "numpy"},
    "parametrization": {"torch", "numpy"},
    "data": {"torch.distributed", "torch.optim", "torch.cuda", "torch.nn"},
    "data.files": {"torch", "numpy"},
    "scaling.report": {"torch", "tiktoken", "datasets"},
}


def all_sources(root=ROOT):
    """{module name: path} of the project's own Python files, without the tests."""
    sources = {}
    for folder in (".", "data", "training", "interop", "scaling"):
        for name in os.listdir(os.path.join(root, folder)):
            if name.endswith(".py"):
                path = os.path.normpath(os.path.join(folder, name))
                module = path.removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
                sources[module] = os.path.join(root, path)
    return sources


@functools.cache
def read_source(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


parse = functools.cache(ast.parse)  # most tests look at the same sources


def is_of_torch(node):
    """Whether the attribute `node` is reached from torch, as torch.cuda.is_available."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "torch"


@functools.cache
def imports_of(source):
    """The dotted names that `source` imports, wherever in the file: a.b.c for `from a.b import c` too. Also
    the names it uses by a path from such a module, as torch.distributed in torch.distributed.barrier()."""
    found = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and is_of_torch(node):
            found.add(ast.unparse(node))
    return found


def part_of(module):
    """The part of the house that `module` (or a name in one) belongs to; None for other libraries."""
    part = module.split(".")[0]
    return part if part in FLOOR_OF else None


def is_in(name, module):
    return name == module or name.startswith(f"{module}.")


def check_arrows(sources):
    """`sources`: {module: text}."""
    for module, source in sources.items():
        part = part_of(module)
        for name in imports_of(source):
            other = part_of(name)
            is_below = other in (None, part) or FLOOR_OF[other] < FLOOR_OF[part]
            assert is_below or (module, other) == READS_FOREIGN, f"{module} imports {name}"


def check_circles(sources):
    """Among modules, within a part too. An arrow upward would be one of check_arrows()."""
    graph = {module: {name for name in imports_of(source) | {i.rpartition(".")[0] for i in imports_of(source)}
                      if name in sources and part_of(name) == part_of(module)} - {module}
             for module, source in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle: {' imports '.join(reversed(error.args[1]))}") from None


def check_libraries(sources):
    for module, source in sources.items():
        forbidden = {name for part, names in MUST_NOT_IMPORT.items() if is_in(module, part) for name in names}
        for name in imports_of(source):
            assert not any(is_in(name, library) for library in forbidden), f"{module} imports {name}"


def check_function_lengths(sources):
    for module, source in sources.items():
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{module}: {node.name} has {lines} lines"


def check_line_lengths(sources):
    for module, source in sources.items():
        for number, line in enumerate(source.splitlines(), start=1):
            assert len(line) <= LONGEST_LINE, f"{module}, line {number}: {len(line)} characters"


def check_packages(sources):
    for package in ("data", "training"):
        assert sources[package] == "", f"{package}/__init__.py is not empty"


CHECKS = [check_arrows, check_circles, check_libraries, check_function_lengths, check_line_lengths,
          check_packages]


def sources_now():
    return {module: read_source(path) for module, path in all_sources().items()}


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_is_in_order(check):
    check(sources_now())


@pytest.mark.parametrize(("check", "module", "added", "complaint"), [
    (check_arrows, "configure", "import parametrization", "configure imports parametrization"),
    (check_arrows, "parametrization", "from model import GPT", "parametrization imports model.GPT"),
    (check_arrows, "model", "from training.muon import Muon", "model imports training.muon"),
    (check_arrows, "data.loader", "from training.distributed import rank", "data.loader imports training"),
    (check_arrows, "data.prepare", "def f():\n    from model import GPT", "data.prepare imports model.GPT"),
    (check_arrows, "training.metrics", "import train", "training.metrics imports train"),
    (check_arrows, "train", "from scaling.trials import identity", "train imports scaling.trials.identity"),
    (check_arrows, "training.sample", "def f():\n    import interop", "training.sample imports interop"),
    (check_circles, "training.device", "from training import sample", "a circle: training.* imports"),
    (check_libraries, "configure", "import torch", "configure imports torch"),
    (check_libraries, "parametrization", "from torch.nn import Linear", "parametrization imports torch.nn"),
    (check_libraries, "data.loader", "import torch.distributed as dist", "data.loader imports torch.distrib"),
    (check_libraries, "data.loader", "from torch import distributed", "data.loader imports torch.distrib"),
    (check_libraries, "data.loader", "n = torch.cuda.device_count()", "data.loader imports torch.cuda"),
    (check_libraries, "scaling.report", "import tiktoken", "scaling.report imports tiktoken"),
    (check_function_lengths, "model", "def f():\n" + 40 * "    x = 1\n", "model: f has 41 lines"),
    (check_line_lengths, "train", "x = 1  # " + 102 * "x", "train, line .*: 111 characters"),
    (check_packages, "data", "x = 1", "data/__init__.py is not empty")])
def test_each_check_fails_where_the_house_is_not_in_order(check, module, added, complaint):
    sources = sources_now()
    sources[module] += f"\n{added}\n"
    with pytest.raises(AssertionError, match=complaint):
        check(sources)


def test_every_package_and_module_of_the_house_is_looked_at():
    sources = all_sources()
    assert {part_of(module) for module in sources} == {*FLOOR_OF} == OWN_MODULES
    folders = {name for name in os.listdir(ROOT) if os.path.exists(os.path.join(ROOT, name, "__init__.py"))}
    assert folders == {module for module in sources if "." not in module} & {*os.listdir(ROOT)}


# In one process, as each costs seconds; at each point it says what it has imported so far
LIGHT = """
import sys
HEAVY = {"torch", "tiktoken", "datasets", "train", "model"}
loaded = lambda: sorted(HEAVY & {name.split(".")[0] for name in sys.modules})
import configure, parametrization
print("configure, parametrization", loaded(), "numpy" in sys.modules)
import data.files
print("data.files", loaded(), "numpy" in sys.modules)
import scaling.report
scaling.report.main([sys.argv[1], "--to=" + sys.argv[2]])
print("report", loaded(), "matplotlib" in sys.modules)
"""


def test_a_report_of_a_folder_imports_no_torch_and_neither_do_the_settings(tmp_path):
    rows, figures = tmp_path / "rows", tmp_path / "figures"
    rows.mkdir()
    with open(f"{ROOT}/scaling/results/depth/trials.csv") as file:  # two sizes are drawn fast
        two_sizes = [line for line in file if re.match("parametrization|mup,256,[24],", line)]
    (rows / "trials.csv").write_text("".join(two_sizes))
    done = subprocess.run([sys.executable, "-c", LIGHT, str(rows), str(figures)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["configure, parametrization [] False", "data.files [] False"]
    assert lines[-1] == "report [] True"
    assert "octaves for each doubling of depth" in done.stdout
    names = ("transfer", "excess", "size", "curves")
    assert {*os.listdir(figures)} == {"report.json", *(f"{name}.{end}" for name in names
                                                       for end in ("png", "svg"))}


def anchors_of(text):
    """The anchors that GitHub gives the headings of a Markdown text, outside of its code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path):
    """The links of the Markdown file at `path` to files or headings that are not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read_source(path)):
        name, _, anchor = link.partition("#")
        target = os.path.join(os.path.dirname(path), name) if name else path
        if name.startswith("https://"):
            continue
        if not os.path.exists(target) or (anchor and anchor not in anchors_of(read_source(target))):
            broken.append(link)
    return broken


def test_every_link_of_the_documents_leads_to_a_file_and_a_heading_that_exist():
    paths = [os.path.join(ROOT, path) for path in DOCUMENTS]
    assert {os.path.relpath(path, ROOT): broken_links(path) for path in paths} == dict.fromkeys(DOCUMENTS, [])
