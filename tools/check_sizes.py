"""Counts the lines of functions and files under src/ (docstrings, comments and blank lines included).

Fails on a function over 80 lines or a file over 600 that is not listed in ALLOWED with a reason, and on an entry of
ALLOWED that is no longer needed. What is over the aims (40 and 300) is printed for information.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

FUNCTION_AIM, FUNCTION_LIMIT = 40, 80
FILE_AIM, FILE_LIMIT = 300, 600

# "path" or "path::qualified.name" -> why it may be longer than the limit.
ALLOWED: dict[str, str] = {}


class Size(NamedTuple):
    """One measured file or function: where it is, its lines, and the two marks it is held to."""

    place: str
    lines: int
    aim: int
    limit: int


def function_sizes(tree: ast.AST, prefix: str) -> list[Size]:
    """The size of every function and method in `tree`, nested ones too; a decorator counts."""
    sizes = []
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}" if "::" in prefix else f"{prefix}::{node.name}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            sizes.append(Size(name, node.end_lineno - first + 1, FUNCTION_AIM, FUNCTION_LIMIT))
        sizes.extend(function_sizes(node, name))
    return sizes


def measure(root: Path) -> list[Size]:
    """Sizes of every Python file under `root`/src and of the functions in them."""
    sizes = []
    for path in sorted((root / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        place = path.relative_to(root).as_posix()
        sizes.append(Size(place, len(text.splitlines()), FILE_AIM, FILE_LIMIT))
        sizes.extend(function_sizes(ast.parse(text), place))
    return sizes


def problems(sizes: list[Size], allowed: dict[str, str]) -> list[str]:
    """One line for each size over its limit that is not allowed, and for each allowance that nothing needs."""
    over = {size.place: size for size in sizes if size.lines > size.limit}
    found = [f"{s.place}: {s.lines} lines, limit {s.limit}" for s in over.values() if s.place not in allowed]
    found += [
        f"{place}: listed as an exception, but within its limit or gone" for place in allowed if place not in over
    ]
    found += [f"{place}: an exception needs a reason" for place, reason in allowed.items() if not reason.strip()]
    return found


def main() -> int:
    """Prints what is over the aims, then the problems; exit code 1 if there are any."""
    sizes = measure(Path(__file__).resolve().parent.parent)
    for size in sizes:
        if size.lines > size.aim:
            print(f"  over the aim of {size.aim}: {size.place}: {size.lines} lines")
    found = problems(sizes, ALLOWED)
    for line in found:
        print(f"TOO LONG {line}", file=sys.stderr)
    print(f"sizes: {len(sizes)} files and functions, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
