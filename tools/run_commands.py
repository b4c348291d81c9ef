"""Runs the commands that a Markdown page shows: every ```sh block, in order, in one shell each.

`python tools/run_commands.py [--directory DIR] [--done COMMAND]... PAGE...` stops at the first command that fails and
says which. A block that follows the comment line `<!-- not run: why -->` is left out, and the reason is printed; so is
one that is no more than a COMMAND that the caller has run already. Blocks of one page run
in the same directory (DIR, by default the repository), so a later one sees the files of an earlier one.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]*?) -->\s*\n)?^```sh\n(?P<script>.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A shell block of a page: its commands, the line it starts on, and why it is not run (empty: it is)."""

    script: str
    line: int
    not_run: str


def blocks_of(text: str) -> list[Block]:
    """Every ```sh block in the Markdown `text`, in order."""
    return [
        Block(match["script"], text.count("\n", 0, match.start("script")), match["why"] or "")
        for match in BLOCK.finditer(text)
    ]


def run_page(page: Path, directory: Path, done: list[str]) -> int:
    """Runs the blocks of `page` inside `directory`; returns the exit code of the first that fails, or 0."""
    for block in blocks_of(page.read_text(encoding="utf-8")):
        where = f"{page}:{block.line}"
        if block.not_run:
            print(f"== {where}: not run: {block.not_run}", flush=True)
            continue
        if block.script.partition("#")[0].strip() in done:
            print(f"== {where}: run already: {block.script}", end="", flush=True)
            continue
        print(f"== {where}\n{block.script}", end="", flush=True)
        code = subprocess.run(["bash", "-euo", "pipefail", "-c", block.script], cwd=directory, check=False).returncode
        if code:
            print(f"{where}: the commands of this block failed with exit code {code}", file=sys.stderr)
            return code
    return 0


def main() -> int:
    """Runs the pages named on the command line; exit code 0 when every block ran well."""
    parser = argparse.ArgumentParser(description="run the shell commands that Markdown pages show")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--directory", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--done", action="append", default=[], metavar="COMMAND")
    args = parser.parse_args()
    return next((code for page in args.pages if (code := run_page(page.resolve(), args.directory, args.done))), 0)


if __name__ == "__main__":
    sys.exit(main())
