"""What mkdocs does besides: pages that are made from the code, and pages that live elsewhere in the repository.

`on_files` adds them before the site is built. Nothing here is written to the disk, so no copy can go stale.
"""

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs"))

import generate  # noqa: E402

RESULTS = "benchmarks/results/"
ELSEWHERE = {
    "benchmarks/README.md": "measured/index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated references and the pages of benchmarks/ and of the changelog."""
    for name, content in generate.pages().items():
        files.append(File.generated(config, name, content=content))
    places = ELSEWHERE | {
        file.relative_to(ROOT).as_posix(): f"measured/{file.name}" for file in sorted((ROOT / RESULTS).iterdir())
    }
    for source, target in places.items():
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, target, content=relinked(text, source, target, places)))
        else:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def relinked(text: str, source: str, target: str, places: dict[str, str]) -> str:
    """A page with its links as they have to be at its new place; a link out of the site becomes its words."""

    def moved(found: re.Match) -> str:
        file = (ROOT / source).parent.joinpath(found[2]).resolve().relative_to(ROOT).as_posix()
        there = places.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if there is None:
            return found[1]
        return f"[{found[1]}]({'../' * target.count('/')}{there}{found[3] or ''})"

    return LINK.sub(moved, text)
