"""Build the documentation as a site: ``python -m docs.site [DIRECTORY]``, by default into build/site.

The pages are docs/*.md, and those of the checkout's top that `TOP` names, as they are.  Links are written so that they work
in the checkout, and this module changes those that lead elsewhere in the site.  docs/README.md is the front page; its lists
are the table of contents.  Every warning is an error.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Final

from sphinx.cmd.build import main as sphinx

ROOT: Final = Path(__file__).parents[2]
#: Pages that are not in docs/, or have another name in the site.
TOP: Final = {"SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "docs/README.md": "index.md"}
_LINK: Final = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
_CODE: Final = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, str]:
    """Return every page: its path in the checkout, and in the site."""
    return {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))} | TOP


def _links(page: str, text: str) -> str:
    """Return the text of a page with its links as they are in the site.  ValueError if one leads nowhere."""
    known = pages()

    def there(match: re.Match[str]) -> str:
        image, words, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if not (ROOT / path).exists():
            raise ValueError(f"{page}: there is no {path}")
        if path in known:
            if re.fullmatch(r"[\w/-]+\.md", words):  # the name of a file says nothing here: the title does
                words = ""
            return f"[{words}]({known[path]}{anchor or ''})"
        if image:
            return f"![{words}]({path.removeprefix('docs/')})"
        return str(words)  # a file or directory of the checkout

    # A link's words may be code: only links inside code are left alone.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(there, part) for part in parts)


def _contents(text: str) -> str:
    """Append to each list of the front page a table of contents with its pages, and to the reference those in no list."""
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    listed = [re.findall(r"^- \[[^\]]*\]\((\S+?)\.md\)", section, re.MULTILINE) for section in sections]
    reference = next(index for index, section in enumerate(sections) if section.startswith("## Reference\n"))
    listed[reference] += sorted(
        {name.removesuffix(".md") for name in pages().values()} - {"index"} - {page for each in listed for page in each}
    )
    found = []
    for section, names in zip(sections, listed, strict=True):
        caption = section.partition("\n")[0].removeprefix("## ")
        tree = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""] if names else []
        found.append("\n".join([section, *tree]))
    return "\n".join(found)


def assemble(directory: Path) -> None:
    """Write the pages of the site, in Markdown."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for page, name in pages().items():
        text = _links(page, (ROOT / page).read_text())
        (directory / name).write_text(_contents(text) if name == "index.md" else text)
    shutil.copytree(ROOT / "docs" / "img", directory / "img", ignore=shutil.ignore_patterns("*.py", "__pycache__"))


def main() -> int:
    """Build the site, and return Sphinx's exit code."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    source = output.with_name(f"{output.name}.md")
    try:
        assemble(source)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    shutil.rmtree(output, ignore_errors=True)
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--fresh-env"]
    cache = ["-d", str(output.with_name(f"{output.name}.doctrees"))]
    return sphinx([*options, *cache, "-c", str(ROOT / "docs" / "site"), str(source), str(output)])


if __name__ == "__main__":
    sys.exit(main())
