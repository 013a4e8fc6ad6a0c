"""What the documents say of the repository, against the repository."""

import ast
import re
from importlib.util import find_spec

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


ROOMS = (
    "dpo_kernels",
    *(f"dpo_kernels.{room}" for room in ("models", "data", "training", "trl", "planning", "compat")),
)


def listed():
    """The names of each module in docs/api.md."""
    text = (ROOT / "docs" / "api.md").read_text()
    found = {}
    for section in text.split("\n## ")[1:]:
        cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
        found[section.split("`")[1]] = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    demo = re.search(r"^`dpo_kernels.data.demo` has (.*)", text, re.MULTILINE)[1]
    return found | {"dpo_kernels.data.demo": re.findall(r"`(\w+)`", demo)}


def test_what_is_public_is_listed():
    names = listed()
    assert names.keys() - {"dpo_kernels.data.demo"} == set(ROOMS)
    for room in ROOMS:
        module = ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())
        (public,) = [
            ast.literal_eval(line.value)
            for line in module.body
            if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "__all__"
        ]
        assert sorted(names[room]) == sorted(public), room


def imported(code):
    """What code imports of the package: pairs of a module and a name, which is None where it is the module itself."""
    for line in ast.walk(ast.parse(code)):
        if isinstance(line, ast.ImportFrom):
            yield from ((line.module, alias.name) for alias in line.names)
        elif isinstance(line, ast.Import):
            yield from ((alias.name, None) for alias in line.names)


EXAMPLES = [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("document", [*DOCUMENTS, *EXAMPLES])
def test_what_is_shown_is_public(document):
    text, names = (ROOT / document).read_text(), listed()
    parts = [text] if document in EXAMPLES else re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for module, name in (found for part in parts for found in imported(part)):
        if module and module.split(".")[0] == "dpo_kernels":
            assert module in names and (name is None or name in names[module]), f"{module}: {name}"


@pytest.mark.release  # a minute where others compute, too
def test_figure_that_betrays_a_wrong_shift():
    """The three numbers in docs/drop_ins.md, from the run that is described there."""
    for package in ("transformers", "datasets"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import torch

    from dpo_kernels import LMHead
    from dpo_kernels.data import PairCollator, tokenize_preferences
    from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer

    rows = demo_preferences()
    tokenizer = demo_tokenizer(str(row) for row in rows)
    pairs, _ = tokenize_preferences(rows, tokenizer)
    collate = PairCollator(tokenizer.pad_token_id)

    def mean_of_a_token(head, batch, shift):
        hidden, _ = head.hidden_states(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        out = head.sequence_logps(hidden, batch["labels"], shift=shift)
        chosen = len(out.logps) // 2
        return out.logps[:chosen].sum() / out.num_tokens[:chosen].sum()

    def after_training(shift):
        model = demo_model(len(tokenizer))
        head, optimizer = LMHead.from_model(model), torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(100):
            batch = collate([pairs[(step * 8 + i) % 540] for i in range(8)])
            (-mean_of_a_token(head, batch, shift)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            held_out = collate([pairs[i] for i in range(560, 576)])
            return [mean_of_a_token(head, held_out, read).item() for read in (True, False)]

    assert len(tokenizer) == 512
    assert after_training(True) == pytest.approx([-1.2, -7.0], abs=0.3)
    assert after_training(False)[1] == pytest.approx(-0.04, abs=0.02)
