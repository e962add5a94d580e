# SPDX-License-Identifier: Apache-2.0
"""Texts: where calibration and evaluation get their tokens, and how they cut them into windows.

A source is the name of a data set (`NAMES`), or a file: ``.jsonl`` and ``.parquet`` hold one
document per line or row, in the field ``text`` or the one after a colon (``news.jsonl:body``); any
other file is UTF-8 text. A data set has two parts, and the use decides which one is read:
calibration never sees what evaluation reads. ``embedded`` ships with the package; the others are
streamed from the Hugging Face hub and read as GPTQ and QuaRot read them (arXiv 2210.17323,
2404.00456), so that perplexities can be compared.
"""

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import InputError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from quarot_onnx.runtime import Tokenizer

Ids = NDArray[np.int64]

Use = Literal["calibration", "evaluation"]
"""What a text is for: the training part of a data set, or its test part."""

_SAMPLES = Path(__file__).parent / "samples"
_EMBEDDED: Mapping[Use, Path] = {
    "calibration": _SAMPLES / "calibration.txt",
    "evaluation": _SAMPLES / "heldout.txt",
}
_CALIBRATION_CHARACTERS = 16 << 20  # of a calibration text, at most: bounds memory and time
_SHARED = 32  # tokens: a run that two texts share by accident is shorter


@dataclass(frozen=True)
class _Hosted:
    """A data set on the hub, and how the literature reads it.

    Attributes:
        path: the repository.
        options: more arguments of ``datasets.load_dataset``, by use.
        column: holds the text.
        separator: between documents.
        whole: a calibration window lies within one document.
        documents: how many the evaluation reads; None is all.
        windows: how many the evaluation keeps; None is all.
    """

    path: str
    options: Mapping[Use, Mapping[str, Any]]
    column: str = "text"
    separator: str = "\n\n"
    whole: bool = False
    documents: int | None = None
    windows: int | None = None


def _splits(**common: Any) -> Mapping[Use, Mapping[str, Any]]:
    return {
        "calibration": {**common, "split": "train"},
        "evaluation": {**common, "split": "test"},
    }


_HOSTED: Mapping[str, _Hosted] = {
    "wikitext2": _Hosted("Salesforce/wikitext", _splits(name="wikitext-2-raw-v1")),
    "wikitext103": _Hosted("Salesforce/wikitext", _splits(name="wikitext-103-raw-v1")),
    "c4": _Hosted(
        "allenai/c4",
        {
            "calibration": {
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "split": "train",
            },
            "evaluation": {
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation",
            },
        },
        separator=" ",
        whole=True,
        documents=1100,
        windows=256,
    ),
    "ptb": _Hosted(
        "ptb-text-only/ptb_text_only",
        _splits(name="penn_treebank", revision="refs/convert/parquet"),
        column="sentence",
        separator=" ",
    ),
    "pile": _Hosted(
        "monology/pile-uncopyrighted", _splits(), whole=True, documents=1100, windows=256
    ),
}

NAMES: tuple[str, ...] = ("embedded", *_HOSTED)
"""The data sets that are known by name."""


@dataclass(frozen=True)
class Windows:
    """Token windows of a text.

    Attributes:
        tokens: int64 [windows, length].
        source: what the user named.
        sha256: of `tokens`, as little-endian int64.
        available: how many tokens were read to cut them from.
    """

    tokens: Ids
    source: str
    sha256: str = field(init=False)
    available: int

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest()
        object.__setattr__(self, "sha256", digest)


# --- Windows --------------------------------------------------------------------------------------


def windows(ids: Sequence[int], count: int, length: int, *, where: str = "text") -> Ids:
    """`count` windows of `length` ids, [count, length]; window i begins at i * (len(ids) // count).

    Raises:
        UsageError: no window, or one without a prediction.
        InputError: there are fewer than count * length ids.
    """
    _require_windows(len(ids), count, length, where)
    stride = len(ids) // count
    return np.array([ids[i * stride : i * stride + length] for i in range(count)], np.int64)


def evaluation_windows(
    source: str | Path, tokenizer: "Tokenizer", *, count: int | None, length: int
) -> Windows:
    """Windows [count, length] of the evaluation part of `source`.

    With a `count` they are evenly spaced, and no special token is added. With None they are the
    windows of the literature: the text as the tokenizer frames it (one BOS in front of everything,
    where the model has one), cut into all windows of `length` tokens, the rest dropped (QuaRot,
    section 5).

    Raises:
        UsageError: no window, or one without a prediction.
        InputError: an unknown name, or the text cannot be read or is too short.
        MissingDependencyError: the data set needs a package or a network that is not there.
    """
    name = str(source)
    ids = tokenizer.encode(_joined(name, "evaluation"), add_special_tokens=count is None)
    if count is not None:
        return Windows(windows(ids, count, length, where=name), name, len(ids))
    whole = max(1, len(ids) // length) if length >= 2 else 1
    if name in _HOSTED and (limit := _HOSTED[name].windows) is not None:
        whole = min(whole, limit)
    _require_windows(len(ids), whole, length, name)
    return Windows(np.array(ids[: whole * length], np.int64).reshape(whole, length), name, len(ids))


def calibration_windows(
    source: str | Path, tokenizer: "Tokenizer", *, count: int, length: int, seed: int = 0
) -> Windows:
    """Windows [count, length] of the calibration part of `source`, without special tokens.

    The text is cut into `count` equal parts, and each window begins at a random place of its part,
    so that no token is used twice; GPTQ draws from the whole text. In data sets of documents
    (``c4``, ``pile``) each window lies in one document that is long enough, as GPTQ has it. At most
    the first 16 million characters are read.

    Raises:
        UsageError: no window, or one without a prediction.
        InputError: an unknown name, or the text cannot be read or is too short.
        MissingDependencyError: the data set needs a package or a network that is not there.
    """
    name = str(source)
    generator = np.random.default_rng(seed)
    if name in _HOSTED and _HOSTED[name].whole:
        _require_windows(count * length, count, length, name)
        return _windows_of_documents(name, tokenizer, count, length, generator)
    ids = tokenizer.encode(_joined(name, "calibration"), add_special_tokens=False)
    _require_windows(len(ids), count, length, name)
    part = len(ids) // count
    starts = np.arange(count) * part + generator.integers(0, part - length + 1, count)
    tokens = np.stack([np.asarray(ids[s : s + length], np.int64) for s in starts.tolist()])
    return Windows(tokens, name, len(ids))


def _windows_of_documents(
    name: str, tokenizer: "Tokenizer", count: int, length: int, generator: np.random.Generator
) -> Windows:
    long: list[Ids] = []
    available = 0
    for document in _limited(_documents(name, "calibration"), _CALIBRATION_CHARACTERS):
        ids = tokenizer.encode(document, add_special_tokens=False)
        available += len(ids)
        if len(ids) >= length:
            long.append(np.asarray(ids, np.int64))
    if len(long) < count:
        raise InputError(
            f"{name}: {len(long)} documents of {length} tokens or more in {available} tokens, "
            f"needs {count}; ask for fewer or shorter calibration windows"
        )
    chosen = generator.permutation(len(long))[:count]
    starts = [int(generator.integers(0, len(long[i]) - length + 1)) for i in chosen]
    cut = [long[i][start : start + length] for i, start in zip(chosen, starts, strict=True)]
    return Windows(np.stack(cut), name, available)


def _require_windows(available: int, count: int, length: int, where: str) -> None:
    if count < 1 or length < 2:
        raise UsageError(
            f"--windows {count} --window-length {length}: needs at least 1 window of 2 tokens"
        )
    if available < count * length:
        raise InputError(
            f"{where}: has {available} tokens, needs {count * length} for {count} windows of "
            f"{length}; give more text, or lower --windows or --window-length"
        )


def shared_share(calibration: Ids, evaluation: Ids) -> float:
    """The share of the runs of 32 tokens of `evaluation` that `calibration` has, too.

    Both are [windows, length]; a run lies within one window. 0 where a window is shorter than 32.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, _SHARED, dtype=np.uint64) | np.uint64(1)

    def runs(tokens: Ids) -> NDArray[np.uint64]:
        if tokens.shape[1] < _SHARED:
            return np.empty(0, np.uint64)
        views = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), _SHARED, axis=1)
        found: NDArray[np.uint64] = (views @ weights).ravel()  # modulo 2**64: a hash of each run
        return found

    ours = runs(evaluation)
    return float(np.isin(ours, runs(calibration)).mean()) if ours.size else 0.0


def require_disjoint(calibration: Windows, evaluation: Windows) -> float:
    """The share of shared runs, where it is at most 5 %: an evaluation of unseen text.

    Raises:
        UsageError: the evaluation would measure what the calibration has seen.
    """
    share = shared_share(calibration.tokens, evaluation.tokens)
    if share > 0.05:
        raise UsageError(
            f"--calibration {calibration.source} --text {evaluation.source}: {share:.0%} of the "
            "evaluation text was seen in calibration; calibrate on another text"
        )
    return share


# --- Documents ------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file.

    Raises:
        InputError: it is missing, empty, not a file, or not UTF-8; the message says where.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a text file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a text file") from error
    zero = raw.find(b"\0")
    if zero >= 0:
        raise InputError(f"{path}: binary (a zero byte at byte {zero}); give a UTF-8 text file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise InputError(f"{path}: not UTF-8 at byte {offset}; convert it to UTF-8") from error
    if not text.strip():
        raise InputError(f"{path}: is empty; give a text file with some text")
    return text


def read(source: str | Path, use: Use = "evaluation") -> str:
    """The text of `source`, documents joined as the literature joins them.

    Of a calibration text, at most the first 16 million characters.

    Raises:
        InputError: the text cannot be read.
        MissingDependencyError: the data set needs a package or a network that is not there.
    """
    return _joined(str(source), use)


def _joined(name: str, use: Use) -> str:
    documents = _documents(name, use)
    if use == "calibration":
        documents = _limited(documents, _CALIBRATION_CHARACTERS)
    text = (_HOSTED[name].separator if name in _HOSTED else "\n\n").join(documents)
    if not text.strip():
        raise InputError(f"{name}: is empty; give a text with some words")
    return text


def _limited(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Documents until so many characters have been read; the last one is cut."""
    for document in documents:
        if characters <= 0:
            return
        yield document[:characters]
        characters -= len(document)


def _documents(name: str, use: Use) -> Iterator[str]:
    if name == "embedded":
        return iter([read_text(_EMBEDDED[use])])
    if name in _HOSTED:
        return _hosted(name, use)
    path, column = _path_and_column(name)
    if path.suffix == ".jsonl":
        return _json_lines(path, column)
    if path.suffix == ".parquet":
        return _parquet(path, column)
    if not path.exists() and not path.suffix and path.name == name:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}" if close else f"data sets are {', '.join(NAMES)}"
        raise InputError(f"{name}: no such file and no such data set; {hint}")
    return iter([read_text(path)])


def _path_and_column(name: str) -> tuple[Path, str]:
    front, colon, column = name.rpartition(":")
    if colon and Path(front).suffix in {".jsonl", ".parquet"}:
        return Path(front), column
    return Path(name), "text"


def _json_lines(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _field(path, number, line, column)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a .jsonl file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file") from error


def _field(path: Path, number: int, line: bytes, column: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {number} is not JSON ({error}); repair it") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}: line {number} is not a JSON object; give one object per line")
    if not isinstance(row.get(column), str):
        raise InputError(
            f"{path}: line {number} has no text in the field {column!r}, its fields are "
            f"{', '.join(map(str, row)) or 'none'}; name one, as in {path.name}:FIELD"
        )
    return str(row[column])


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow  # noqa: PLC0415  # an extra
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            f'{path}: pyarrow cannot be imported ({error}); pip install "quarot-onnx[data]"'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise InputError(
                    f"{path}: has no column {column!r}, its columns are {', '.join(names)}; "
                    f"name one, as in {path.name}:COLUMN"
                )
            for batch in file.iter_batches(columns=[column]):
                yield from (str(value) for value in batch[0].to_pylist() if value is not None)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a .parquet file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}); repair it") from error


def _hosted(name: str, use: Use) -> Iterator[str]:
    try:
        import datasets  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: the package datasets cannot be imported ({error}); "
            'pip install "quarot-onnx[data]", or give a file or `embedded`'
        ) from error
    hosted = _HOSTED[name]
    count = hosted.documents if use == "evaluation" else None
    try:
        rows = datasets.load_dataset(hosted.path, streaming=True, **hosted.options[use])
        for row in itertools.islice(rows, count):
            yield str(row[hosted.column])
    except OSError as error:  # ConnectionError, OfflineModeIsEnabled, HfHubHTTPError, 404
        reason = " ".join(str(error).split())[:160]
        raise MissingDependencyError(
            f"{name}: cannot be streamed from the Hugging Face hub ({reason}); connect to the "
            "network, or give a local .txt, .jsonl or .parquet file, or `embedded`"
        ) from error
