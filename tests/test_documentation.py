"""What the documents say of the repository, against the repository."""

import re

import pytest
from places import ROOT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "csrc/README.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def tree(text):
    """The files of a tree that is drawn with two spaces a level, a comment after each name."""
    found, folders = set(), []
    for line in text.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            found.add("".join([*folders, name]))
    return found


def test_tree_of_the_package():
    drawn = tree(re.search(r"```text\n(dpo_kernels/.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1])
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_kernels").rglob("*.py*") if path.suffix != ".pyc"}
    rooms = {
        name for name in files if name.endswith("/__init__.py") and name.count("/") > 1
    }  # said once, by the folder
    assert drawn == files - rooms


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document):
    path, text = ROOT / document, (ROOT / document).read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert all((path.parent / link).exists() for link in links if link), links
    named = re.findall(r"`((?:tests|csrc|docs|examples|dpo_kernels|benchmarks)/[\w./-]+)`", text)
    assert all((ROOT / name).exists() for name in named), [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_that_are_named_exist(document):
    """`dpo_kernels.NAME` is a module or a name of the package; in a room, `dpo_kernels.ROOM.NAME` one of the room."""
    for name in re.findall(r"\bdpo_kernels((?:\.\w+)+)", (ROOT / document).read_text()):
        place = ROOT / "dpo_kernels"
        for part in name.strip(".").split(".")[:2]:
            if not place.is_dir():
                break
            public = re.search(rf"\b{part}\b", (place / "__init__.py").read_text())
            modules = [place / part, *(place / f"{part}{suffix}" for suffix in (".py", ".pyi"))]
            assert public or any(path.exists() for path in modules), f"dpo_kernels{name}"
            place = place / part
