"""Which files of a folder are read, and what is read from files of every format, sound or not."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from places import SHARED

from dpo_kernels.data import files, formats

CASES = SHARED / "cases"
ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
LINE = json.dumps(ROW).encode() + b"\n"
HEADER = b"prompt,chosen,rejected\n"
BOM = b"\xef\xbb\xbf"


def rows_of(path, content):
    path.write_bytes(content)
    return [row for _, row in formats.read(path)]


def short(value):
    """The name of a case: contents may be long."""
    return ascii(value)[:40]


def refused(path, content=None):
    """What an unsound file is refused with: one line that begins with its name."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(formats.read(path))
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


# Finding


def found(folder, names, split="train"):
    """The names of the files that are found among these, and what is said of the others; `name=0` is an empty file."""
    for name in names:
        name, _, size = name.partition("=")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if size == "0" else "x")
    paths, notes = files.find(folder, split)
    return [path.relative_to(folder).as_posix() for path in paths], notes


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("math.jsonl", "train"),
        ("train.jsonl", "train"),
        ("training-00000-of-00001.parquet", "train"),
        ("train_prefs.parquet", "train"),
        ("latest.jsonl", "train"),  # words, not letters
        ("contest.jsonl", "train"),
        ("developer.csv", "train"),
        ("evaluated.jsonl", "train"),
        ("testimony.tsv", "train"),
        ("train2k.jsonl", "train"),
        ("validation.jsonl", "validation"),
        ("valid.jsonl", "validation"),
        ("pairs-val.jsonl", "validation"),
        ("dev.jsonl.gz", "validation"),
        ("eval_1.jsonl", "validation"),
        ("evaluation.jsonl", "validation"),
        ("heldout.jsonl", "validation"),
        ("held_out.jsonl", "validation"),
        ("held-out-2.jsonl", "validation"),
        ("holdout.jsonl", "validation"),
        ("heldOut.jsonl", "validation"),
        ("VALIDATION.JSONL", "validation"),
        ("test.jsonl", "test"),
        ("test_sft.jsonl", "test"),
        ("testset.jsonl", "test"),
        ("testing.jsonl", "test"),
        ("01-Test.jsonl", "test"),
        ("mathTest.jsonl", "test"),
        ("test/pairs.jsonl", "test"),
        ("eval/en/pairs.jsonl", "validation"),
        ("test/train.jsonl", "train"),  # what is nearer to the rows counts
        ("test_of_training.jsonl", "test"),  # what comes first
    ],
)
def test_a_file_belongs_to_the_split_that_is_a_word_of_its_name(tmp_path, name, split):
    assert found(tmp_path, [name], split) == ([name], [])
    for other in {"train", "validation", "test"} - {split}:
        with pytest.raises(ValueError, match=f"has the splits {split}, not '{other}'"):
            files.find(tmp_path, other)


def test_splits_go_by_several_names(tmp_path):
    names = ["dev.jsonl", "pairs.jsonl"]
    for split in ("dev", "eval", "held_out", "valid"):
        assert found(tmp_path, names, split) == (["dev.jsonl"], ["pairs.jsonl (split train)"])


def test_splits_of_a_name_of_their_own_are_looked_for_as_they_are(tmp_path):
    names = ["test_prefs-0.parquet", "train_prefs-0.parquet", "train_sft-0.parquet"]
    assert found(tmp_path, names, "train_prefs") == (
        ["train_prefs-0.parquet"],
        ["test_prefs-0.parquet (split test)", "train_sft-0.parquet (split train)"],
    )
    assert found(tmp_path, names)[0] == names[1:]
    with pytest.raises(ValueError, match="has the splits test, train, not 'train_gen'"):
        files.find(tmp_path, "train_gen")
    for slices in ("train[:2]", "train+test", ""):
        with pytest.raises(ValueError, match="split: expected the name of a split"):
            files.find(tmp_path, slices)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("validation.jsonl", "split validation"),
        ("sub/test.csv", "split test"),
        ("dataset_info.json", "describes data, holds none"),
        ("dataset_infos.json", "describes data, holds none"),
        ("sub/config.json", "describes data, holds none"),
        ("metadata.json", "describes data, holds none"),
        ("pairs.jsonl.gz", "packed, and there unpacked too"),
        ("._pairs.jsonl", "hidden"),
        (".cache/pairs.jsonl", "hidden"),
        (".ipynb_checkpoints/pairs-checkpoint.csv", "hidden"),
        ("nothing.jsonl=0", "empty"),
        ("notes.txt", "no known suffix"),
        ("pairs.xml", "no known suffix"),
        ("data-00000-of-00001.arrow", "no known suffix"),
        ("more.jsonl.zst", "no known suffix"),
        ("more.zip", "no known suffix"),
        ("pairs.jsonl~", "no known suffix"),
        ("pairs.jsonl.part", "no known suffix"),
    ],
)
def test_files_that_are_left_out_are_named_with_the_reason(tmp_path, name, reason):
    expected = ["pairs.jsonl"], [f"{name.removesuffix('=0')} ({reason})"]
    assert found(tmp_path, ["pairs.jsonl", name]) == expected


def test_what_is_nobodys_idea_of_rows_is_not_mentioned(tmp_path):
    names = ["README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".git/config", "make.py", "plot.png", ".DS_Store"]
    assert found(tmp_path, ["pairs.jsonl", *names]) == (["pairs.jsonl"], [])


def test_many_files_of_one_reason_are_counted(tmp_path):
    names = [f"test-{n}.jsonl" for n in range(9)]
    assert found(tmp_path, ["pairs.jsonl", *names])[1] == [f"{', '.join(names[:5])} and 4 more (split test)"]


def test_all_formats_and_folders_of_a_folder_are_read(tmp_path):
    names = [
        "A.JSONL",
        *(
            "b.csv.gz",
            "c.tsv",
            "d.json.gz",
            "deep/er/e.ndjson",
            "f.parquet",
            "g.tsv.gz",
            "h.ndjson.gz",
            "i.csv",
            "j.json",
        ),
    ]
    assert found(tmp_path, names) == (names, [])


def test_the_packed_copy_of_an_empty_file_is_read(tmp_path):
    assert found(tmp_path, ["a.jsonl=0", "a.jsonl.gz"]) == (["a.jsonl.gz"], ["a.jsonl (empty)"])


def test_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/blob").write_text("x")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to("../elsewhere/blob")  # as the hub's cache has them
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / "lost.jsonl").symlink_to("nowhere")
    (folder / "loop").symlink_to(".")
    (folder / "more").symlink_to(tmp_path / "more")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.jsonl").write_text("x")
    (folder / "lost.csv").symlink_to("nowhere")
    (folder / "lost.csv.gz").write_text("x")
    assert found(folder, []) == (
        ["a.jsonl", "lost.csv.gz", "more/b.jsonl"],
        ["again.jsonl (the same file as a.jsonl)", "lost.csv, lost.jsonl (a link to nothing)"],
    )


def test_folders_without_files_to_read(tmp_path):
    with pytest.raises(ValueError, match="no file ending in .jsonl, .* in the directory '.*'$"):
        found(tmp_path, ["README.md"])
    with pytest.raises(ValueError, match=r"left out: empty.jsonl \(empty\); notes.txt \(no known suffix\)$"):
        found(tmp_path, ["notes.txt", "empty.jsonl=0"])
    with pytest.raises(ValueError, match=r"has the splits test, not 'train'; left out: empty.jsonl \(empty\); notes"):
        found(tmp_path, ["test.jsonl"])


# Archives


def unpacked(kind, prompts="pp"):
    lines = [json.dumps({**ROW, "prompt": str(prompt)}) for prompt in prompts]
    if kind == "json":
        return f"[{', '.join(lines)}]".encode()
    if kind.startswith(("jsonl", "ndjson")):
        return "\n".join(lines).encode()
    rows = [HEADER.decode().strip(), *(f"{prompt},a,b" for prompt in prompts)]
    return "\n".join(rows).replace(",", "\t" if kind == "tsv" else ",").encode()


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_packed_files_hold_what_the_unpacked_ones_do(tmp_path, kind):
    for name, content in ((kind, unpacked(kind)), (f"{kind}.gz", gzip.compress(unpacked(kind)))):
        assert rows_of(tmp_path / f"a.{name}", content) == [ROW, ROW]
        assert rows_of(tmp_path / f"A.{name.upper()}", content) == [ROW, ROW]
        assert [source for source, _ in formats.read(tmp_path / f"a.{name}")][1] == f"{tmp_path}/a.{name}, row 2"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("size", [5, 12, 0.5, -8, -1], ids=str)
def test_archives_that_are_cut_off_are_named(tmp_path, kind, size):
    """Wherever: in the head of the archive, among the rows, in its checksum."""
    packed = gzip.compress(unpacked(kind, [n * n for n in range(3000)]))
    packed = packed[: size if isinstance(size, int) else int(size * len(packed))]
    said = refused(tmp_path / f"a.{kind}.gz", packed)
    assert said == ": the gzip data are cut off: the file ends before they do"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-8] + bytes(4) + packed[-4:], "CRC check failed"),
        (lambda packed: packed[:20] + b"\xff" * 20 + packed[40:], "while decompressing"),
        (lambda packed: packed[:-4] + bytes(4), "Incorrect length"),
        (lambda packed: packed + b"garbage", "followed by something else"),
        (lambda packed: packed[:2] + b"\x00" + packed[3:], "Unknown compression method"),
    ],
)
def test_archives_that_are_damaged_are_named(tmp_path, damage, message):
    packed = gzip.compress(b"".join(LINE.replace(b"p", str(n).encode()) for n in range(50)))
    said = refused(tmp_path / "a.jsonl.gz", damage(packed))
    assert said.startswith(": the gzip data are damaged, or followed by something else: ") and message in said


def test_sound_archives_of_unusual_shape(tmp_path):
    packed = gzip.compress(LINE, mtime=0)
    assert rows_of(tmp_path / "a.jsonl.gz", packed * 3) == [ROW] * 3  # as `cat` makes them
    assert rows_of(tmp_path / "b.jsonl.gz", packed + bytes(512)) == [ROW]  # padded, as tapes do
    assert rows_of(tmp_path / "c.jsonl.gz", gzip.compress(b"", mtime=0)) == []


def tar():
    with io.BytesIO() as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(LINE)
        archive.addfile(member, io.BytesIO(LINE))
        archive.close()
        return stream.getvalue()


def zipped():
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a.jsonl"), LINE)  # of no date: it names a case
        return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", gzip.compress(LINE, mtime=0), "gzip data"),
        ("a.csv", gzip.compress(HEADER, mtime=0), "gzip data"),
        ("a.jsonl", bz2.compress(LINE), "bzip2 data"),
        ("a.json", lzma.compress(LINE), "xz data"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\x04", "Zstandard data"),
        ("a.csv", zipped(), "a zip archive or an Excel workbook"),
        ("a.tsv", tar(), "a tar archive"),
        ("a.jsonl", b"PAR1...", "Parquet data"),
        ("a.json", b"ARROW1..", "Arrow data"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.json", b"\n<!DOCTYPE html><html>", "a web page"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "UTF-16 text"),
        ("a.csv", HEADER.decode().encode("utf-16"), "UTF-16 text"),
        ("a.json", LINE.decode().encode("utf-32"), "UTF-32 text"),
        ("a.jsonl.gz", LINE, 'something that begins with b\'{"prompt": "p", \''),
        ("a.csv.gz", HEADER, "something that begins with b'prompt,chosen,re'"),
        ("a.jsonl.gz", zipped(), "a zip archive"),
        ("a.jsonl.gz", bz2.compress(LINE), "bzip2 data"),
        ("a.jsonl.gz", b"\x1f", "something that begins with b'\\x1f'"),
    ],
    ids=short,
)
def test_what_a_file_holds_against_its_name_is_said(tmp_path, name, content, what):
    message = refused(tmp_path / name, content)
    assert message.startswith(f": the file holds {what}")
    assert "that its name promises. Supported are files that end in .jsonl" in message


@pytest.mark.parametrize(
    ("content", "what"), [(gzip.compress(LINE, mtime=0), "gzip data"), (tar(), "a tar archive")], ids=short
)
def test_what_an_archive_holds_against_its_name_is_said(tmp_path, content, what):
    assert refused(tmp_path / "a.jsonl.gz", gzip.compress(content, mtime=0)).startswith(
        f", unpacked: the file holds {what}"
    )


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "not_gzip.jsonl.gz"])
def test_archives_of_a_real_complaint(name):
    if not (CASES / name).exists():
        pytest.skip(f"no case at {CASES / name}")
    assert "gzip data" in refused(CASES / name)


# JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
@pytest.mark.parametrize(
    "content",
    [
        LINE + LINE,
        LINE + b"\r\n \n" + LINE.strip(),
        BOM + LINE + BOM + LINE,  # files with byte order marks, one after the other
        BOM + b"\n\n" + LINE + LINE,
        b"[" + LINE + b", " + LINE + b"]",
        b"\n [\n" + LINE + b",\n" + LINE + b"\n]\n",
        BOM + json.dumps([ROW, ROW], indent=2).encode(),
        json.dumps(ROW, indent=2).encode() + b"\n" + json.dumps(ROW, indent=2).encode(),
        json.dumps({"data": [ROW, ROW]}).encode(),
        json.dumps({"version": "1.0", "rows": [ROW, ROW], "tags": ["x"]}, indent=1).encode(),
    ],
    ids=range(10),
)
def test_json_in_every_shape(tmp_path, name, content):
    assert rows_of(tmp_path / name, content) == [ROW, ROW]


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {}, "rejected": {}},
        {"prompt": [], "chosen": [{"role": "assistant"}], "rejected": [{"role": "assistant"}]},
        {"text": "no layout, and no list"},
    ],
)
def test_a_single_object_is_a_row(tmp_path, row):
    for content in (json.dumps(row), json.dumps(row, indent=1), json.dumps([row])):
        assert rows_of(tmp_path / "a.json", content.encode()) == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"prompt": ["p", "q"], "chosen": ["a", "c"], "rejected": ["b", "d"]},
            "holds columns (prompt, chosen, rejected)",
        ),
        ({"prompt": {"0": "p", "1": "q"}, "chosen": {"0": "a", "1": "c"}}, "holds columns (prompt, chosen)"),  # pandas
        ({"train": [ROW], "test": [ROW]}, "several lists (train, test): expected one"),
    ],
    ids=short,
)
def test_single_objects_that_are_no_rows(tmp_path, content, message):
    assert message in refused(tmp_path / "a.json", json.dumps(content).encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + b'{"prompt": "p", "cho', "row 2: the line is not valid JSON: Unterminated string"),
        (LINE + LINE.strip() + b",\n", "row 2: the line is not valid JSON: Extra data"),
        (LINE.strip() + LINE, "row 1: the line is not valid JSON: Extra data"),
        (LINE.strip() + b"\r" + LINE, "row 1: the line is not valid JSON: Extra data"),
        (b"{'prompt': 'p'}\n", "row 1: the line is not valid JSON: Expecting property name"),
        (b"// rows\n" + LINE, "row 1: the line is not valid JSON: Expecting value"),
        (b'{"prompt": "a\nb"}\n', "row 1: the element is not valid JSON: Invalid control character"),
        (LINE + b"7\n", "row 2: expected a JSON object, got int"),
        (LINE + b"null\n", "row 2: expected a JSON object, got NoneType"),
        (b'"x"\n', "row 1: expected a JSON object, got str"),
        (b'["p", "a", "b"]\n', "row 1: expected a JSON object, got str"),
        (b"[" + LINE.strip(), "row 2: the element is not valid JSON"),
        (b"[" + LINE.strip() + b", ", "row 2: the element is not valid JSON"),
        (b'{\n "prompt": "p",\n "chosen"', "row 1: the element is not valid JSON"),
        (b"[" + LINE + b"]" + LINE, "the array of 1 rows is followed by '{"),
        (
            LINE + b'{"prompt": "p", "prompt": "q"}\n',
            "row 2: the line is not valid JSON: an object has the key 'prompt' twi",
        ),
        (
            b'[{"chosen": [{"role": "a", "role": "b"}]}]',
            "row 1: the element is not valid JSON: an object has the key 'role'",
        ),
        (
            LINE + b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
            "row 2: the line is not valid JSON: it is nested too de",
        ),
        (b'[{"a": ' + b'{"a":' * 10**5 + b"1", "row 1: the element is not valid JSON: it is nested too deeply"),
        (LINE + b'{"a": ' + b"9" * 5000 + b"}\n", "row 2: the line is not valid JSON: Exceeds the limit"),
        (LINE + b'{"prompt": "\xe9"}\n', "row 2: the line is not valid JSON: 'utf-8' codec can't decode byte 0xe9"),
        (b"[" + LINE + b', {"prompt": "\xe9"}]\n', "the file is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9"),
        (LINE.decode().encode("utf-16-le"), "row 1: the line is not valid JSON: it holds null bytes"),
        (LINE + bytes(100), "row 2: the line is not valid JSON: it holds null bytes"),
    ],
    ids=short,
)
def test_broken_json_is_named_with_the_row(tmp_path, content, message):
    assert message in refused(tmp_path / "a.jsonl", content)
    assert (
        message in refused(tmp_path / "a.json.gz", gzip.compress(content, mtime=0))
        if b"\x00" not in content[:2]
        else True
    )


def test_numbers_that_json_has_not_are_read(tmp_path):
    (row,) = rows_of(tmp_path / "a.jsonl", b'{"score": Infinity, "other": NaN}\n')
    assert row["score"] == float("inf") and row["other"] != row["other"]


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", BOM, b"[]", b" [\n]\n", b'{"data": []}'])
def test_json_without_rows(tmp_path, content):
    assert rows_of(tmp_path / "a.jsonl", content) == []


# CSV


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_those_of_the_header(tmp_path, suffix, delimiter):
    others = ",;\t|".replace(delimiter, "")
    lines = [delimiter.join(cells) for cells in (["prompt", '"chosen"', "rejected"], [f"p{others}", "a", f"b{others}"])]
    content = "\r\n".join(lines).encode()
    row = {"prompt": f"p{others}", "chosen": "a", "rejected": f"b{others}"}
    assert rows_of(tmp_path / f"a.{suffix}", gzip.compress(content, mtime=0) if suffix.endswith("gz") else content) == [
        row
    ]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        (
            "id;prompt;chosen;rejected;a,b,c,d,e",
            ["id", "prompt", "chosen", "rejected", "a,b,c,d,e"],
        ),  # not the most names
        ("prompt,chosen,rejected,a|b|c|d|e", ["prompt", "chosen", "rejected", "a|b|c|d|e"]),
        ("q;yes;no", ["q", "yes", "no"]),  # no layout, for which loading has words of its own
        ("chosen\trejected", ["chosen", "rejected"]),
        ("instruction|chosen|rejected", ["instruction", "chosen", "rejected"]),
        ("sep=;\nprompt;chosen;rejected", ["prompt", "chosen", "rejected"]),  # Excel's hint
        ('"sep=|"\r\nprompt|chosen|rejected', ["prompt", "chosen", "rejected"]),
        ("prompt, chosen, rejected", ["prompt", "chosen", "rejected"]),
        (" prompt ,chosen ,rejected ", ["prompt", "chosen", "rejected"]),
        ("\ufeff\ufeffprompt,chosen,rejected", ["prompt", "chosen", "rejected"]),
        ("\n\n , \nprompt,chosen,rejected", ["prompt", "chosen", "rejected"]),
    ],
)
def test_headers(tmp_path, header, columns):
    mark = next(character for character in header.splitlines()[-1] if character in ",;\t|")
    (row,) = rows_of(tmp_path / "a.csv", f"{header}\n{mark.join('x' * len(columns))}\n".encode())
    assert row == dict.fromkeys(columns, "x")


@pytest.mark.parametrize(
    ("content", "cells"),
    [
        (HEADER + b'p,"say ""a""",b\n', 'say "a"'),
        (HEADER + b'p,say "a",b\n', 'say "a"'),
        (HEADER + b'p,"a\nb\r\nc",b\n', "a\nb\r\nc"),
        (HEADER.replace(b"\n", b"\r") + b"p,a,b\r", "a"),
        (HEADER + b"\n,,\n  \np,a,b\n\n", "a"),  # blank records, of spreadsheets
        (b"prompt, chosen, rejected\n" + b'p, "a, b", b\n', "a, b"),
        (HEADER + b"p, a,b\n", " a"),
        (HEADER + b"p," + b"a" * 200_000 + b",b\n", "a" * 200_000),
        (HEADER + b'p,"[{""role"": ""assistant""}]",b\n', '[{"role": "assistant"}]'),
        (HEADER + b"p,0.50,b\n", "0.50"),
    ],
    ids=short,
)
def test_cells(tmp_path, content, cells):
    assert rows_of(tmp_path / "a.csv", content) == [{**ROW, "chosen": cells}]


def test_columns_without_a_name(tmp_path):
    """The index that pandas writes has a place; what spreadsheets add after the last column is nothing."""
    assert rows_of(tmp_path / "a.csv", b",prompt,chosen,rejected\n0,p,a,b\n") == [{"unnamed column 1": "0", **ROW}]
    assert rows_of(tmp_path / "a.csv", b"prompt,chosen,rejected,,\np,a,b,,\np,a,b,,x\n") == [
        ROW,
        {**ROW, "unnamed column 5": "x"},
    ]
    for cells in (b"p,a,b\n", b"p,a,b,\n", b"p,a,b,,,,\n"):
        assert rows_of(tmp_path / "a.csv", b"prompt,chosen,rejected,\n" + cells) == [ROW]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"prompt\np\n",
            ": the header has one column only, 'prompt'. Tried as delimiters: comma, semicolon, tab, pipe",
        ),
        (
            b"prompt^chosen^rejected\n",
            ": the header has one column only, 'prompt^chosen^rejected'. Tried as delimiters",
        ),
        (b'"prompt,chosen,rejected\n', ": the header has one column only"),
        (b"prompt,chosen,rejected,prompt\n", ": the header has the column 'prompt' twice"),
        (b"prompt;chosen;rejected; chosen\n", ": the header has the column 'chosen' twice"),
        (b"pr\xe9mpt,chosen,rejected\n", ", header: it is not UTF-8 text: byte 0xe9"),
        (HEADER.decode().encode("utf-16-le"), ", header: it holds null bytes"),
        (HEADER + b"p,a,b\np,a\n", ", row 2: fewer cells than the header's 3: 2, in line 3"),
        (HEADER + b"p\n", ", row 1: fewer cells than the header's 3: 1, in line 2"),
        (HEADER + b'p,"a\nb",c\n\np,a,b,c\n', ", row 2: more cells than the header's 3: 4, in line 5"),
        (
            HEADER + b'p,a,b\np,"a,b\np,a,b\n',
            ", row 2: the record is not valid CSV: the quote that opens a cell is never",
        ),
        (
            HEADER + b'p,a,b\np,"a,b\np,"a",b\n',
            ", row 2: the record is not valid CSV: after the quote that closes a cell",
        ),
        (
            HEADER + b'p,"he said \\"a\\"",b\n',
            ", row 1: the record is not valid CSV: after the quote that closes a cell",
        ),
        (HEADER + b"p,a,b\np,\xe9,b\n", ", row 2 (line 3): it is not UTF-8 text: byte 0xe9"),
    ],
    ids=short,
)
def test_broken_csv_is_named_with_the_row(tmp_path, content, message):
    assert refused(tmp_path / "a.csv", content).startswith(message)
    assert refused(tmp_path / "a.csv.gz", gzip.compress(content, mtime=0)).startswith(message)


def test_null_bytes_in_a_cell(tmp_path):
    said = refused(tmp_path / "a.csv", HEADER + b"p,a,b\np,a\0,b\n")
    assert said.startswith(", row 2") and "it holds null bytes" in said


def test_a_record_that_does_not_end_is_named_by_the_line_in_which_it_begins(tmp_path):
    assert refused(tmp_path / "a.csv", HEADER + b'"p\nq",a,b\np,"a,b\n' + b"p,a,b\n" * 99).endswith("begins in line 4")


@pytest.mark.parametrize("content", [b"", b"\n\n", b",,\n", HEADER, HEADER.strip(), BOM + HEADER])
def test_csv_without_rows(tmp_path, content):
    assert rows_of(tmp_path / "a.csv", content) == []


# Parquet


def parquet(table):
    with io.BytesIO() as stream:
        pyarrow.parquet.write_table(table, stream)
        return stream.getvalue()


SOUND = parquet(pa.Table.from_pylist([{**ROW, "prompt": str(n)} for n in range(2500)]))


def test_parquet_is_read_in_parts(tmp_path):
    rows = rows_of(tmp_path / "a.parquet", SOUND)
    assert [row["prompt"] for row in rows] == [str(n) for n in range(2500)]
    assert list(formats.read(tmp_path / "a.parquet"))[1500][0] == f"{tmp_path}/a.parquet, row 1501"


def test_a_shard_without_rows_is_sound(tmp_path):
    assert rows_of(tmp_path / "a.parquet", parquet(pa.Table.from_pylist([ROW]).slice(0, 0))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SOUND[:-20], "the file is not valid Parquet"),
        (SOUND[: len(SOUND) // 2], "the file is not valid Parquet"),
        (SOUND[:500] + bytes(300) + SOUND[800:], "the file is not valid Parquet"),
        (b"", "the file is not valid Parquet"),
        (HEADER, "the file is not valid Parquet"),
        (gzip.compress(SOUND, mtime=0), "the file is not valid Parquet: it holds gzip data"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "the file is not valid Parquet: it holds a pointer of Git LFS",
        ),
        (parquet(pa.table([["p"], ["a"], ["p"]], names=["prompt", "chosen", "prompt"])), "two columns 'prompt'"),
        (
            parquet(pa.table({"prompt": pa.array([b"\xe9"]).view(pa.string())})),
            "row 1 to 1: not UTF-8 text: 'utf-8' codec can't decode byte 0xe9",
        ),
    ],
    ids=short,
)
def test_broken_parquet_is_named(tmp_path, content, message):
    assert message in refused(tmp_path / "a.parquet", content)


def test_arrow_types(tmp_path):
    turns = pa.array([[[("role", "user"), ("content", "p")]]], pa.list_(pa.map_(pa.string(), pa.string())))
    table = pa.table(
        {
            "prompt": turns,
            "chosen": pa.array(["a"], pa.large_string()),
            "rejected": pa.array(["b"]).dictionary_encode(),
            "nested": [[{"a": 1, "b": None}]],
            "image": [{"bytes": b"\x89PNG", "path": None}],
            "raw": [b"\xff"],
        }
    )
    (row,) = rows_of(tmp_path / "a.parquet", parquet(table))
    assert row == {
        "prompt": [{"role": "user", "content": "p"}],
        **{"chosen": "a", "rejected": "b", "nested": [{"a": 1}], "image": b"", "raw": b""},
    }
