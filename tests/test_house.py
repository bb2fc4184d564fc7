"""The rules of the house that no linter knows: what the two programs, the pages and the texts keep to.

These tests read; of the product they run only `--help` and a command that fails early.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hive import HYPERHIVE, ROOT

PROGRAMS = ["hyperhive.py", "harness.py"]
MAY_IMPORT = {"hyperhive.py": {"bottle", "waitress"}, "harness.py": set()}
MAX_LINES = 60
MAY_BE_LONGER: dict[str, str] = {}  # "file.py:function": why

BARE = re.compile(r"  \S+( \S+)*")  # an argument in a verb's help, and nothing behind it

program = pytest.mark.parametrize("name", PROGRAMS)


def refuse(found: list[str]) -> None:
    """Fail with the whole list, which an assertion on it would cut."""
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def source(name: str) -> str:
    return (ROOT / name).read_text()


def committed() -> list[Path]:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def sections(name: str) -> list[tuple[int, str]]:
    """Where each section begins, and its title: the middle one of a banner's three lines."""
    lines = source(name).splitlines()
    return [
        (number, lines[number - 1].removeprefix("# "))
        for number in range(2, len(lines))
        if is_rule(lines[number - 2]) and is_rule(lines[number])
    ]


def is_rule(line: str) -> bool:
    return re.match(r"#\s*[─━═=*#-]{20}", line) is not None


# ── sections ──


@program
def test_banners_have_one_form(name: str) -> None:
    lines = source(name).splitlines()
    rules = [number for number, line in enumerate(lines, 1) if is_rule(line)]
    expected = [number + side for number, _ in sections(name) for side in (-1, 1)]
    assert rules == expected, "a rule that is not above or below a title"
    titles = [title for _, title in sections(name)]
    assert titles and len(titles) == len(set(titles))


def test_banners_are_equally_wide_in_both_programs() -> None:
    rules = {line for name in PROGRAMS for line in source(name).splitlines() if is_rule(line)}
    assert len(rules) == 1 and re.fullmatch("# ─+", rules.pop())


def test_the_docstring_is_an_index_of_the_sections() -> None:
    index = (ast.get_docstring(ast.parse(source("hyperhive.py"))) or "").lower()
    refuse([title for _, title in sections("hyperhive.py") if title.lower() not in index])


@program
def test_sections_use_only_what_stands_above_them(name: str) -> None:
    starts = [0, *(line for line, _ in sections(name))]
    titles = ["the top", *(title for _, title in sections(name))]
    tree = ast.parse(source(name))
    home = {defined: section_of(line, starts) for defined, line in definitions(tree.body)}
    downward = [
        f"line {use.lineno}: {titles[here]!r} uses {use.id}, which stands in {titles[home[use.id]]!r}"
        for statement in tree.body
        for here in [section_of(statement.lineno, starts)]
        for use in outside_names(statement)
        if home.get(use.id, here) > here
    ]
    refuse(downward)


def section_of(line: int, starts: list[int]) -> int:
    return max(index for index, start in enumerate(starts) if start <= line)


def definitions(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Each name that a module binds at its top level, also under an `if` or `try`, with the line."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name, statement.lineno
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield node.name, node.lineno
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id, node.lineno


def outside_names(node: ast.AST) -> Iterator[ast.Name]:
    """The names that a statement reads but does not bind: parameters and variables of a function are its own.

    Annotations count as uses. A class is a list of statements, so that a method's variables hide nothing
    from the other methods.
    """
    if isinstance(node, ast.ClassDef):
        for child in ast.iter_child_nodes(node):
            yield from outside_names(child)
        return
    inside = list(ast.walk(node))
    own = {inner.arg for inner in inside if isinstance(inner, ast.arg)}
    own |= {inner.id for inner in inside if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
    own |= {inner.name for inner in inside if isinstance(inner, ast.FunctionDef | ast.ClassDef) and inner is not node}
    for inner in inside:
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load) and inner.id not in own:
            yield inner


# ── functions, calls and imports ──


@program
def test_no_function_is_too_long(name: str) -> None:
    sizes = {
        f"{name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source(name)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {where: size for where, size in sizes.items() if size > MAX_LINES}
    refuse([f"{where} has {size} lines" for where, size in long.items() if where not in MAY_BE_LONGER])
    refuse([f"{where} need not be excused" for where in MAY_BE_LONGER if where.startswith(name) and where not in long])


@program
def test_no_child_process_goes_through_a_shell(name: str) -> None:
    refused = [
        f"line {node.lineno}: {ast.unparse(node)[:100]}"
        for node in ast.walk(ast.parse(source(name)))
        if isinstance(node, ast.Call)
        if re.fullmatch(r"os\.(system|popen|fork\w*|spawn\w+)", ast.unparse(node.func))
        or {keyword.arg for keyword in node.keywords} & {"shell", "preexec_fn"}
    ]
    refuse(refused)


def test_the_daemon_changes_nothing_that_its_threads_share() -> None:
    """What one of them sets for a moment, a child that another one starts would inherit."""
    assert re.findall(r"\bos\.(?:umask|f?chdir|putenv)\(|\bos\.environ\[[^]]*\] = ", source("hyperhive.py")) == []


@program
def test_imports_are_the_standard_library_and_two_packages_where_they_are_used(name: str) -> None:
    tree = ast.parse(source(name))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    foreign = {
        (module, node in inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in imported(node)
        if module not in sys.stdlib_module_names
    }
    assert foreign == {(module, True) for module in MAY_IMPORT[name]}


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [(node.module or ".").partition(".")[0]]
    return [alias.name.partition(".")[0] for alias in node.names]


# ── the command line ──


def verbs() -> dict[str, str]:
    """Each command that `--help` lists, with its line of help."""
    shown = subprocess.run([*HYPERHIVE, "--help"], check=True, capture_output=True, text=True, env={"COLUMNS": "200"})
    return dict(re.findall(r"^ {4}([a-z][\w-]*)(?: +(.*))?$", shown.stdout, re.MULTILINE))


def test_list_needs_no_package(folder: Path) -> None:
    """Without site-packages the command gets as far as finding no daemon."""
    command = [HYPERHIVE[0], "-S", *HYPERHIVE[1:], "--dir", str(folder), "list"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1
    assert ran.stdout == "" and ran.stderr and "Traceback" not in ran.stderr


def test_every_verb_has_help_and_stands_in_the_readme() -> None:
    readme = source("README.md")
    assert {"serve", "demo", "list", "approve", "doctor"} <= verbs().keys()
    refuse([f"{verb} has no help" for verb, text in verbs().items() if not text])
    refuse([f"{verb} is not in README.md" for verb in verbs() if not re.search(rf"\b{verb}\b", readme)])
    for verb in verbs():
        command = [*HYPERHIVE, verb, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, env={"COLUMNS": "300"})
        assert shown.returncode == 0, f"{verb}: {shown.stderr}"
        lines = re.sub(r"\n {10,}", "  ", shown.stdout).splitlines()
        refuse([f"{verb}: {line.strip()} has no help" for line in lines if BARE.fullmatch(line)])


# ── pages and texts ──


def test_pages_make_no_html_from_text_and_know_no_foreign_host() -> None:
    pages = [path for path in (ROOT / "static").rglob("*") if path.suffix in (".css", ".html", ".js", ".json", ".svg")]
    assert pages
    refused = re.compile(
        r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTMLUnsafe)\b|\beval\(|new Function\("
        r"|https?://(?!www\.w3\.org/2000/svg\b|127\.0\.0\.1|localhost)[\w\[]"
        r"""|(?:src|href|url)\s*[=(]\s*["']?//"""
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in pages
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if refused.search(line)
    ]
    refuse(found)


@pytest.mark.needs("git")
def test_committed_texts_name_no_workplace_and_leave_nothing_to_do() -> None:
    # Each is written so that it does not match itself.
    refused = re.compile(r"/wor[k]/|\bTOD[O]\b|\bFIXM[E]\b|npmj[s]|pypi\.or[g]|deb\.debia[n]")
    found = []
    for path in committed():
        text = path.read_bytes().decode(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in refused.finditer(text)]
    refuse(found)


def test_pins_agree() -> None:
    """npm's lock has every checksum and no address; every Python package has one version, here and there."""
    packages = json.loads(source("tests/package-lock.json"))["packages"]
    assert [path for path, package in packages.items() if path and not package.get("integrity")] == []
    assert [path for path, package in packages.items() if package.get("resolved")] == []
    pins = [line for line in source("tests/constraints.txt").splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    project = tomllib.loads(source("pyproject.toml"))
    assert {*project["project"]["dependencies"], *project["dependency-groups"]["test"]} <= set(pins)
