"""The size check and the runner of documented commands, which CI leans on; what the model in the box is measured by."""

import importlib.util
import json
import lzma
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_source(root: Path, name: str, lines: list[str]) -> None:
    path = root / "src" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_function_of_81_lines_fails_and_one_of_80_passes(tmp_path: Path) -> None:
    sizes = load_tool("check_sizes")
    write_source(tmp_path, "long.py", ["class A:", "    def f(self):", *["        x = 1"] * 80])
    write_source(tmp_path, "fits.py", ["def f():", *["    x = 1"] * 79])
    assert sizes.problems(sizes.measure(tmp_path), {}) == ["src/long.py::A.f: 81 lines, limit 80"]


def test_a_file_of_601_lines_fails_unless_allowed(tmp_path: Path) -> None:
    sizes = load_tool("check_sizes")
    write_source(tmp_path, "long.py", ["x = 1"] * 601)
    assert sizes.problems(sizes.measure(tmp_path), {}) == ["src/long.py: 601 lines, limit 600"]
    assert sizes.problems(sizes.measure(tmp_path), {"src/long.py": "a table"}) == []
    assert len(sizes.problems(sizes.measure(tmp_path), {"src/long.py": " "})) == 1


def test_an_exception_that_nothing_needs_fails(tmp_path: Path) -> None:
    sizes = load_tool("check_sizes")
    write_source(tmp_path, "short.py", ["x = 1"])
    assert len(sizes.problems(sizes.measure(tmp_path), {"src/short.py": "was long once"})) == 1


def run_page(tmp_path: Path, text: str, *options: str) -> "subprocess.CompletedProcess[str]":
    page = tmp_path / "PAGE.md"
    page.write_text(text, encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools" / "run_commands.py"), "--directory", str(tmp_path), *options]
    command.append(str(page))
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_documented_commands_run_in_order_and_share_a_directory(tmp_path: Path) -> None:
    page = "```sh\necho one > f\n```\ntext\n```py\nnot shell\n```\n```sh\necho two >> f\n```\n"
    assert run_page(tmp_path, page).returncode == 0
    assert (tmp_path / "f").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("script", ["false\ntrue", "false | cat", "echo $NOT_SET_ANYWHERE"])
def test_a_failing_documented_command_fails_the_page(tmp_path: Path, script: str) -> None:
    done = run_page(tmp_path, f"first line\n```sh\n{script}\n```\n")
    assert done.returncode != 0
    assert "PAGE.md:2: the commands of this block failed" in done.stderr


def test_a_block_marked_not_run_is_left_out_and_said(tmp_path: Path) -> None:
    done = run_page(tmp_path, "<!-- not run: needs eight GPUs -->\n```sh\nfalse\n```\n")
    assert done.returncode == 0
    assert "not run: needs eight GPUs" in done.stdout


def test_a_command_that_was_run_already_is_not_run_again(tmp_path: Path) -> None:
    page = "```sh\nmake demo   # takes a while\n```\n```sh\necho ran > f\n```\n"
    assert run_page(tmp_path, page).returncode != 0
    assert run_page(tmp_path, page, "--done", "make demo").returncode == 0
    assert (tmp_path / "f").read_text() == "ran\n"


def test_documents_are_held_out_by_their_titles(tmp_path: Path) -> None:
    """One in a hundred, the same titles in every corpus, each document in one file."""
    titles = [f"title {at}" for at in range(3000)]
    for name in ("one", "other"):
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"title": title, "text": name}) + "\n" for title in titles)
    words = [str(tmp_path / name) for name in ("en", "one.jsonl.xz", "other.jsonl.xz")]
    subprocess.run([sys.executable, str(ROOT / "tools" / "mini_split.py"), *words], check=True, capture_output=True)
    parts = []
    for name in ("en.jsonl", "en.held_out.jsonl"):
        documents = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        by_corpus = [[item["title"] for item in documents if item["text"] == corpus] for corpus in ("one", "other")]
        assert by_corpus[0] == by_corpus[1]
        parts.append(by_corpus[0])
    assert sorted(parts[0] + parts[1]) == sorted(titles)
    assert 15 <= len(parts[1]) <= 45  # binomial(3000, 0.01): 30, within 2.75 standard deviations of 5.45


def test_the_cloze_set_asks_for_one_token_each() -> None:
    """100 English and 50 Chinese items, each with one mask and an answer that is one word or one character."""
    lines = (ROOT / "tools" / "mini_cloze.tsv").read_text(encoding="utf-8").splitlines()
    items = [line.split("\t") for line in lines]
    languages = [language for language, *_ in items]
    assert (languages.count("en"), languages.count("zh")) == (100, 50)
    assert len({text for _, _, text, _ in items}) == len(items)
    for language, kind, text, answer in items:
        assert kind in ("grammar", "knowledge")
        assert text.count("[MASK]") == 1
        assert answer.isalnum()
        assert language == "en" or len(answer) == 1
