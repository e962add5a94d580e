# SPDX-License-Identifier: Apache-2.0
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from quarot_onnx import texts
from quarot_onnx.errors import InputError, MissingDependencyError, UsageError
from quarot_onnx.runtime import Tokenizer, load_tokenizer
from quarot_onnx.texts import (
    Windows,
    calibration_windows,
    evaluation_windows,
    read,
    read_text,
    require_disjoint,
    shared_share,
    windows,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_llama"
ROWS = ["one two", "three", "four five six"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EXAMPLE / "model")


@pytest.fixture
def words() -> Tokenizer:
    """One id per word, its length; 0 in front where special tokens are asked for."""

    def encode(text: str, special: bool) -> list[int]:
        return [0] * special + [len(word) for word in text.split()]

    return Tokenizer(encode, str, 10)


def json_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_reads_utf8_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xc3\xafve\n")
    assert read_text(tmp_path / "a.txt") == "naïve\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt: no such file; give a text file"),
        (b"", "text.txt: is empty; give a text file with some text"),
        (b" \n\t\n", "text.txt: is empty; give a text file with some text"),
        (b"abc\xe9d", "text.txt: not UTF-8 at byte 3; convert it to UTF-8"),
        (b"\xef\xbb\xbfa\xff", "text.txt: not UTF-8 at byte 4; convert it to UTF-8"),
        (b"PK\x03\x04\0\0", "text.txt: binary (a zero byte at byte 4); give a UTF-8 text file"),
    ],
)
def test_refuses_a_text_and_says_where(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_text(path)
    assert str(error.value) == f"{tmp_path}/{message}"


def test_refuses_a_directory_as_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); give a text file"):
        read_text(tmp_path)


def test_windows_are_evenly_spaced_and_do_not_overlap() -> None:
    cut = windows(range(23), 4, 3)
    np.testing.assert_array_equal(cut, [[0, 1, 2], [5, 6, 7], [10, 11, 12], [15, 16, 17]])


def test_windows_may_use_every_token() -> None:
    np.testing.assert_array_equal(windows(range(6), 2, 3), [[0, 1, 2], [3, 4, 5]])


def test_says_how_many_tokens_are_missing() -> None:
    with pytest.raises(InputError, match=r"a\.txt: has 5 tokens, needs 6 for 2 windows of 3; give"):
        windows(range(5), 2, 3, where="a.txt")


@pytest.mark.parametrize(("count", "length"), [(0, 8), (1, 1), (-1, 8)])
def test_refuses_windows_without_a_prediction(count: int, length: int) -> None:
    with pytest.raises(UsageError, match="needs at least 1 window of 2 tokens"):
        windows(range(100), count, length)


def test_reads_documents_from_json_lines_and_parquet(tmp_path: Path) -> None:
    lines = json_lines(tmp_path / "a.jsonl", [{"text": row, "n": 1} for row in ROWS])
    table = parquet(tmp_path / "a.parquet", text=ROWS, n=[1, 2, 3])
    assert read(lines) == read(table) == "one two\n\nthree\n\nfour five six"


def test_a_colon_names_the_field(tmp_path: Path) -> None:
    lines = json_lines(tmp_path / "a.jsonl", [{"body": row} for row in ROWS])
    table = parquet(tmp_path / "a.parquet", body=[*ROWS, None])
    assert read(f"{lines}:body") == read(f"{table}:body") == "\n\n".join(ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "x"}\n', "line 1 has no text in the field 'text', its fields are body; name"),
        ('{"text": "x"}\n\n{"text": 3}\n', "line 3 has no text in the field 'text'"),
        ('{"text": "x"}\n{"text": \n', "line 2 is not JSON (Expecting value"),
        ("[1]\n", "line 1 is not a JSON object; give one object per line"),
        ('{"text": "\xff"}\n', "line 1 is not JSON ("),
        ("\n", "is empty; give a text with some words"),
    ],
)
def test_refuses_json_lines_and_says_where(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read(tmp_path / "a.jsonl")
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "a.jsonl"))


def test_refuses_parquet_and_says_why(tmp_path: Path) -> None:
    table = parquet(tmp_path / "a.parquet", body=ROWS, title=ROWS)
    with pytest.raises(InputError, match="has no column 'text', its columns are body, title; name"):
        read(table)
    (tmp_path / "b.parquet").write_bytes(table.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as Parquet \("):
        read(tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: no such file"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_names_the_extra_where_a_package_is_missing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path / "a.parquet", text=ROWS) if package == "pyarrow" else "c4"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "quarot-onnx\[data\]"'):
        read(source)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="wikitext-2: no such file and no such data set; did you"):
        read("wikitext-2")
    with pytest.raises(InputError, match="data sets are embedded, wikitext2, wikitext103, c4, ptb"):
        read("xyz")


def test_without_a_network_a_data_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDependencyError, match="wikitext2: cannot be streamed from the Hugg"):
        read("wikitext2")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The hub replaced by local files, read by `datasets` itself; returns the requests."""
    asked: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def local(path: str, *, streaming: bool, split: str, **options: Any) -> Any:
        asked.append({"path": path, "split": split, **options})
        column = "sentence" if "ptb" in path else "text"
        rows = [{column: f"{split} {row}"} for row in ROWS * 500]
        file = json_lines(tmp_path / f"{split}.jsonl", rows)
        cached = str(tmp_path / "cache")
        return load(
            "json", data_files=str(file), split="train", streaming=streaming, cache_dir=cached
        )

    monkeypatch.setattr(datasets, "load_dataset", local)
    return asked


def test_calibration_reads_the_training_part_and_evaluation_the_test_part(
    hub: list[dict[str, Any]],
) -> None:
    for name in ("wikitext2", "wikitext103", "ptb", "c4", "pile"):
        hub.clear()
        calibration, evaluation = read(name, "calibration"), read(name, "evaluation")
        assert hub[0]["split"] == "train"
        assert hub[1]["split"] in {"test", "validation"}
        assert "train" in calibration
        assert "train" not in evaluation
        assert "test" not in calibration


def test_data_sets_are_joined_as_the_literature_joins_them(hub: list[dict[str, Any]]) -> None:
    assert read("wikitext2").startswith("test one two\n\ntest three\n\ntest four")
    assert read("ptb").startswith("test one two test three test four")
    c4 = read("c4")
    assert c4.startswith("validation one two validation three")
    assert c4.count("validation") == 1100  # GPTQ and QuaRot read the first 1100 documents


def test_the_embedded_parts_are_what_the_example_has() -> None:
    assert read("embedded", "calibration") == read_text(EXAMPLE / "calibration.txt")
    assert read("embedded", "evaluation") == read_text(EXAMPLE / "heldout.txt")


def test_the_literature_s_windows_are_all_of_them_behind_one_bos(
    words: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a bb ccc dddd eeeee ffffff", encoding="utf-8")
    found = evaluation_windows(tmp_path / "a.txt", words, count=None, length=3)
    np.testing.assert_array_equal(found.tokens, [[0, 1, 2], [3, 4, 5]])  # the last is dropped
    counted = evaluation_windows(tmp_path / "a.txt", words, count=2, length=3)
    np.testing.assert_array_equal(counted.tokens, [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(InputError, match=r"has 7 tokens, needs 9 for 1 windows of 9; give more"):
        evaluation_windows(tmp_path / "a.txt", words, count=None, length=9)
    with pytest.raises(UsageError, match="needs at least 1 window of 2 tokens"):
        evaluation_windows(tmp_path / "a.txt", words, count=None, length=1)


def test_c4_is_evaluated_on_256_windows(words: Tokenizer, hub: list[dict[str, Any]]) -> None:
    assert evaluation_windows("c4", words, count=None, length=2).tokens.shape == (256, 2)


def test_calibration_windows_depend_on_the_seed_and_use_no_token_twice(tmp_path: Path) -> None:
    numbers = Tokenizer(lambda text, _: [int(word) for word in text.split()], str, 1000)
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(1000))), encoding="utf-8")
    first = calibration_windows(tmp_path / "a.txt", numbers, count=9, length=64, seed=0)
    again = calibration_windows(tmp_path / "a.txt", numbers, count=9, length=64, seed=0)
    other = calibration_windows(tmp_path / "a.txt", numbers, count=9, length=64, seed=1)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.tokens.shape == other.tokens.shape == (9, 64)
    assert len(np.unique(other.tokens)) == other.tokens.size
    np.testing.assert_array_equal(np.diff(other.tokens, axis=1), 1)
    whole = calibration_windows(tmp_path / "a.txt", numbers, count=1, length=1000)
    np.testing.assert_array_equal(whole.tokens, [np.arange(1000)])
    with pytest.raises(InputError, match="has 1000 tokens, needs 1001 for 7 windows of 143"):
        calibration_windows(tmp_path / "a.txt", numbers, count=7, length=143)


def test_calibration_windows_of_documents_lie_within_one(
    words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def documents(name: str, use: str) -> Iterator[str]:
        return iter([" ".join(["x" * size] * size) for size in range(1, 10)])

    monkeypatch.setattr(texts, "_documents", documents)
    found = calibration_windows("c4", words, count=3, length=6, seed=3)
    assert found.tokens.shape == (3, 6)
    assert (found.tokens == found.tokens[:, :1]).all()
    assert len(np.unique(found.tokens)) == 3
    with pytest.raises(InputError, match="c4: 4 documents of 6 tokens or more in 45 tokens, needs"):
        calibration_windows("c4", words, count=5, length=6)


def test_a_calibration_text_is_read_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_CALIBRATION_CHARACTERS", 9)
    lines = json_lines(tmp_path / "a.jsonl", [{"text": row} for row in ROWS])
    assert read(lines, "calibration") == "one two\n\nth"
    assert read(lines, "evaluation") == "\n\n".join(ROWS)


def test_a_text_that_was_seen_in_calibration_is_refused(tokenizer: Tokenizer) -> None:
    calibration = calibration_windows("embedded", tokenizer, count=64, length=256)
    unseen = evaluation_windows("embedded", tokenizer, count=32, length=256)
    assert require_disjoint(calibration, unseen) <= 0.01
    seen = evaluation_windows(EXAMPLE / "calibration.txt", tokenizer, count=32, length=256)
    with pytest.raises(UsageError, match=r"--calibration embedded --text .*calibration\.txt: \d+%"):
        require_disjoint(calibration, seen)


def test_shared_runs_are_counted_exactly() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.integers(0, 50, (2, 4, 100))
    assert shared_share(theirs, ours) == 0
    ours[0, 10:60] = theirs[2, 3:53]  # 50 tokens are 19 runs of 32, of 4 * 69
    assert shared_share(theirs, ours) == pytest.approx(19 / (4 * 69))
    assert shared_share(theirs[:, :31], ours[:, :31]) == 0


def test_the_hash_of_windows_is_of_their_tokens() -> None:
    tokens = np.array([[1, 2], [3, 4]])
    assert Windows(tokens, "a", 4).sha256 == Windows(tokens.copy(), "b", 9).sha256
    assert Windows(tokens + 1, "a", 4).sha256 != Windows(tokens, "a", 4).sha256
