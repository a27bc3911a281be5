"""The pages are true: each block of code runs alone, commands and links exist, and both languages say the same."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [page for page in (ENGLISH, CHINESE, *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>[^\n`]*)\n(?P<code>.*?)^ *(?P=fence) *$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)")
HEADING = re.compile(r"^(#{1,6}) +(.*?)#* *$", re.M)
COMMAND = re.compile(r"^[$] +(?:\w+=\S+ +)*duoka +(?P<name>[\w-]+)|^(?:\w+=\S+ +)*duoka +(?P<bare>[\w-]+)", re.M)
TIMEOUT_S = 150


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    flags: tuple[str, ...]
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        language, *flags = match["info"].split() or [""]
        indent = len(match["indent"])
        code = "".join(line[indent:] if line.strip() else line for line in match["code"].splitlines(keepends=True))
        found.append(Block(language, tuple(flags), code, text.count("\n", 0, match.start()) + 2))
    return found


def prose(text: str) -> str:
    """The page without its code, in which a ``#`` is no heading and brackets are no link."""
    return FENCE.sub("", text)


def identifier(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks_of(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text(encoding="utf-8")) if block.language in ("python", "py")]


RUNNABLE = [
    pytest.param(page, block, id=f"{identifier(page)}:{block.line}")
    for page in PAGES
    if page.parent.name != "zh"  # the same code but for comments, as a test below holds
    for block in python_blocks_of(page)
    if "notest" not in block.flags
]


@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize(("page", "block"), RUNNABLE)
def test_every_python_block_runs_alone_in_an_empty_folder(page, block, tmp_path):
    (tmp_path / "home").mkdir()
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n" * (block.line - 1) + block.code, encoding="utf-8")  # tracebacks name the page's line
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path / "home", capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{identifier(page)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_python_block_compiles_and_is_marked_by_known_words(page):
    for block in python_blocks_of(page):
        ast.parse(block.code, f"{identifier(page)}:{block.line}")
        assert block.language == "python", f"{identifier(page)}:{block.line}: write ```python"
        assert set(block.flags) <= {"notest"}, f"{identifier(page)}:{block.line}: only 'notest' may follow"


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_command_that_a_page_names_exists(page):
    known = set(importlib.import_module("duoka.cli.main").COMMANDS)
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in ("console", "bash", "sh", "shell"):
            named = {match["name"] or match["bare"] for match in COMMAND.finditer(block.code)}
            assert {name for name in named if not name.startswith("-")} <= known, f"{identifier(page)}:{block.line}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    titles = [title for _, title in HEADING.findall(prose(page.read_text(encoding="utf-8")))]
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_link_to_a_file_or_heading_leads_somewhere(page):
    lost = []
    for match in LINK.finditer(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", match["target"]):
            continue
        name, _, heading = match["target"].partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            lost.append(match["target"])
    assert lost == []


CONTENTS = ("src", "tests", "docs", "benchmarks", "examples", ".ci")


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_every_file_of_the_project_that_a_page_names_exists(page):
    named = re.findall(r"`([\w./-]+/[\w./-]*)`", prose(page.read_text(encoding="utf-8")))
    ours = [name for name in named if name.split("/")[0] in CONTENTS or name.endswith(".py")]
    places = (ROOT, ROOT / "src" / "duoka")
    assert [name for name in ours if not any((place / name).exists() for place in places)] == []


def without_comments(block: Block) -> tuple[str, str]:
    """A block without what is translated: comments, and text that is printed or explained."""
    if block.language != "python":
        return block.language, re.sub(r" *#.*", "", block.code)
    return "python", ast.dump(_Untranslated().visit(ast.parse(block.code)))


class _Untranslated(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        chinese = isinstance(node.value, str) and not node.value.isascii()
        return ast.Constant(value="") if chinese or (isinstance(node.value, str) and " " in node.value) else node


PAIRS = [
    pytest.param(english, chinese, id=identifier(english))
    for english, chinese in [
        (ENGLISH, CHINESE),
        *((ROOT / "docs" / page.name, page) for page in sorted((ROOT / "docs" / "zh").glob("*.md"))),
    ]
]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_headings_and_code(english, chinese):
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    levels = [[len(marks) for marks, _ in HEADING.findall(prose(text))] for text in texts]
    assert levels[0] == levels[1]
    code = [[without_comments(block) for block in blocks(text)] for text in texts]
    assert code[0] == code[1]


def test_every_guide_page_has_its_chinese_twin():
    guides = {page.name for page in (ROOT / "docs").glob("*.md")} - {"design.md", "development.md"}
    assert guides == {page.name for page in (ROOT / "docs" / "zh").glob("*.md")}


def test_both_readmes_link_to_one_another():
    assert "README.zh-CN.md" in ENGLISH.read_text(encoding="utf-8")
    assert "README.md" in CHINESE.read_text(encoding="utf-8")


def test_a_page_is_read_as_it_is_shown():
    page = "a\n\n```python\nx = 1\n```\n\n- b\n\n  ```python notest\n  y = [\n      1]\n  ```\n"
    page += "\n```console\n$ duoka trian x\n```\n"
    first, second, third = blocks(page)
    assert (first.code, first.line, first.flags) == ("x = 1\n", 4, ())
    assert (second.code, second.flags) == ("y = [\n    1]\n", ("notest",))
    assert [match["name"] for match in COMMAND.finditer(third.code)] == ["trian"]
    assert HEADING.findall(prose("# a\n```python\n# b\n```\n## c\n")) == [("#", "a"), ("##", "c")]
