"""Where rows come from: every kind of file gives the same rows; what cannot be read is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmega import hub
from rmega.preferences import json_files, sources
from rmega.preferences.chunks import Chunk
from rmega.preferences.comparison import Rejected
from rmega.preferences.resolve import resolve
from rmega.preferences.schemas import schema_named

ROWS = [
    {"prompt": f"question {i} é国", "chosen": f"good {i}", "rejected": f"bad\n{i}"}
    for i in range(700)
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


JSONL = jsonl(ROWS)


def read(
    *specs: Any, hashes: dict[str, str] | None = None, **options: Any
) -> list[tuple[int, Any]]:
    inputs = resolve([str(s) for s in specs], **options)
    return [
        (number, row)
        for i, source in enumerate(inputs)
        for chunk in sources.read_chunks(source, i, hashes)
        for number, row, _ in sources.decode(chunk)
    ]


def write_all(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The rows in a file of every kind."""
    lines = jsonl(rows)

    def path(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "a.parquet", row_group_size=300)
    for name, new in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(folder / name), "wb") as sink, new(sink, table.schema) as out:
            out.write_table(table, max_chunksize=333)
    return [
        path("a.jsonl", lines),
        path("bom.jsonl", b"\xef\xbb\xbf" + lines),
        path("crlf.jsonl", lines.replace(b"\n", b"\r\n")),
        path("no_end.jsonl", lines[:-1]),
        path("a.jsonl.gz", gzip.compress(lines)),
        path("two.jsonl.gz", gzip.compress(lines[:700]) + gzip.compress(lines[700:])),
        path("a.jsonl.zst", pa.compress(lines, "zstd", asbytes=True)),
        path("a.json", json.dumps(rows).encode()),
        path("data.json", json.dumps({"version": 1, "data": rows}).encode()),
        path("lines.json", lines),
        path("a.csv", text.getvalue().encode()),
        path("a.csv.gz", gzip.compress(text.getvalue().encode())),
        folder / "a.parquet",
        folder / "a.arrow",
        folder / "b.arrow",
    ]


def test_every_kind_gives_the_same_rows(tmp_path: Path) -> None:
    for path in write_all(tmp_path, ROWS):
        hashes: dict[str, str] = {}
        items = read(path, hashes=hashes)
        assert [row for _, row in items] == ROWS, path
        if ".csv" not in path.name:
            assert [number for number, _ in items] == list(range(1, 701)), path
        assert hashes == {str(path): sources.checksum(str(path))}, path


def test_csv_cells_may_hold_messages(tmp_path: Path) -> None:
    messages = [{"role": "assistant", "content": "hi"}]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "chosen", "rejected", "scores"])
        writer.writerow(["[1, 2]", json.dumps(messages), repr(messages), "[1, 0]"])
        writer.writerow(["a", "", "b"])
        writer.writerow(
            ["a", "\udcff".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "[x", "c"]
        )
    items = read(path)
    assert items[0][0] == 2
    comparison = schema_named("messages").parse(items[0][1])
    assert comparison.prompt == [{"role": "user", "content": "[1, 2]"}]
    assert comparison.responses == [messages, messages]
    ranked = {"prompt": "x", "responses": "['a' 'b']", "scores": items[0][1]["scores"]}
    assert list(schema_named("ranked").parse(ranked).scores) == [1, 0]
    assert items[1][1].reason == "broken_row" and items[2][1]["rejected"] == "[x"
    path.write_bytes(b'prompt,chosen,rejected\na,b,\xff\nx,"y\nz",w\n\nv,w,x\n')
    numbers, rows = zip(*read(path), strict=True)
    assert numbers == (2, 3, 6) and rows[0].reason == "not_utf8" and rows[1]["chosen"] == "y\nz"
    path.write_text('a,b\n1,2\n3,"4\n5,6\n')
    with pytest.raises(ValueError, match="a.csv:3: broken CSV from here on"):
        read(path)
    (tmp_path / "a.tsv").write_text("prompt\tchosen\nx, y\tz\n")
    assert read(tmp_path / "a.tsv") == [(2, {"prompt": "x, y", "chosen": "z"})]


def test_broken_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"a": 1}\n\n{"a": \n{"a": "\xff"}\n[1]\n   \n' + deep + b'\nnull\n{"a": 2}')
    items = read(path)
    assert [n for n, _ in items] == [1, 3, 4, 5, 7, 8, 9]
    reasons = [row.reason if isinstance(row, Rejected) else None for _, row in items]
    assert reasons == [None, "broken_row", "not_utf8", "broken_row", "too_deep", "broken_row", None]
    nested: Any = "x"
    for _ in range(500):
        nested = [nested]
    (tmp_path / "b.json").write_text(json.dumps([{"a": nested}, 5, {"a": 1}]))
    assert [getattr(row, "reason", row) for _, row in read(tmp_path / "b.json")] == [
        "too_deep",
        "broken_row",
        {"a": 1},
    ]


def test_huge_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    fits = json.dumps({"a": "x" * 900_000})
    path.write_text(f'{fits}\n{json.dumps({"a": "x" * 5_000_000})}\n{{"a": 2}}\n')
    items = read(path)
    assert [n for n, _ in items] == [1, 2, 3] and items[1][1].reason == "broken_row"
    assert items[0][1] == json.loads(fits) and items[2][1] == {"a": 2}


def test_chunks_do_not_split_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    for size in (1, 7, 100, 10_000):
        monkeypatch.setattr(json_files, "CHUNK_BYTES", size)
        assert read(path) == list(enumerate(ROWS, 1))


def test_grouping_adjacent_rows() -> None:
    def chunks() -> Iterator[Chunk]:
        for first, keys in ((1, "aab"), (4, "b"), (5, "bcc")):
            yield Chunk(0, first, [(first + i, {"prompt": k}, "") for i, k in enumerate(keys)])

    items = [item for chunk in sources.group_rows(chunks(), "prompt") for item in chunk.payload]
    assert [(n, "".join(r["prompt"] for r in row["rows"])) for n, row, _ in items] == [
        (1, "aa"),
        (3, "bbb"),
        (6, "cc"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-2000], "gzip cannot be read on after line"),
        ("a.jsonl.gz", b"not gzip", "gzip cannot be read on after line 0"),
        ("a.jsonl.zst", b"not zstd at all", "zstd cannot be read on"),
        ("a.json", b'[{"a": 1},\n{"a": ]', "a.json:2: broken JSON"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b"5", "no rows"),
        ("a.json", b"\xff\xfe", "byte 0 is not UTF-8"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.parquet", b"PAR1 nothing PAR1", "cannot be read as parquet"),
        ("a.arrow", b"nothing", "cannot be read as arrow"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.txt", b"x", "unknown kind of file"),
        ("a.parquet.gz", b"x", "unpack it first"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_folders_globs_and_splits(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in (
        "b.jsonl",
        "a.jsonl",
        "sub/c.jsonl",
        "README.md",
        "dataset_info.json",
        ".hidden.jsonl",
    ):
        (tmp_path / name).write_bytes(JSONL)

    def names(*specs: Any, **options: Any) -> list[str]:
        return [
            s.name.removeprefix(f"{tmp_path}/") for s in resolve([str(s) for s in specs], **options)
        ]

    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(tmp_path / "?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    (tmp_path / "sub" / "train-00000.jsonl").write_bytes(JSONL)
    (tmp_path / "sub" / "test-00000.jsonl").write_bytes(JSONL)
    with pytest.raises(
        ValueError, match="holds several splits .test, train.; choose one with --split"
    ):
        names(tmp_path / "sub")
    assert names(tmp_path / "sub", split="train") == ["sub/train-00000.jsonl"]
    (tmp_path / "none").mkdir()
    for spec, message in (
        (tmp_path / "none", "no data file"),
        (tmp_path / "x.jsonl", "no such file"),
        (tmp_path / "*.csv", "no file matches"),
        (tmp_path / "nowhere" / "x", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            names(spec)


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(name: str, config: str | None, **options: Any) -> Iterator[dict[str, Any]]:
        asked.update(options, name=name, config=config)
        if name == "org/broken":
            raise ConnectionError("no network\nand more")
        return iter(ROWS)

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [row for _, row in read("org/set:config@abc", split="test")] == ROWS
    assert asked == {
        "name": "org/set",
        "config": "config",
        "split": "test",
        "revision": "abc",
        "streaming": True,
    }
    assert len(read("org/set")) == 700 and asked["split"] == "train"
    message = (
        "org/broken: no such file here, and as the name of a hub data set .* it cannot be read .no"
        " network"
    )
    with pytest.raises(ValueError, match=message):
        read("org/broken")


def test_modelscope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    with pytest.raises(ValueError, match="needs the package modelscope"):
        read("modelscope:org/set")
    fake = types.ModuleType("modelscope.msdatasets")
    fake.MsDataset = types.SimpleNamespace(load=lambda name, **options: iter(ROWS))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", fake)
    assert [row for _, row in read("modelscope:org/set")] == ROWS


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [row for _, row in read(tmp_path / "saved")] == ROWS


def test_a_path_to_nothing_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("/nope", "./nope", "~/nope/x", "a/b/c", ".cache/models/nope", "runs/nope"):
        with pytest.raises(ValueError, match=f"--model {name}: no such folder"):
            hub.check_folder_or_hub_name(name, "--model")
    for name in ("runs", "gpt2", "org/model-1.8b"):
        hub.check_folder_or_hub_name(name, "--model")


def test_retries_of_the_hub_are_one_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")
    with hub.one_line_for_retries():
        for attempt in range(6):
            logger.warning("'no route' thrown while requesting HEAD https://hub")
            logger.warning(f"Retrying in 1s [Retry {attempt}/5].")
        logger.warning("a token is needed")
    assert capsys.readouterr().err.count("does not answer") == 1 and [
        r.message for r in caplog.records
    ] == ["a token is needed"]
    logger.warning("Retrying in 1s")
    assert len(caplog.records) == 2
