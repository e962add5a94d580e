# SPDX-License-Identifier: Apache-2.0
"""An artifact's own tokenizer: text to ids, and ids to text as they come."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from quarot_onnx.errors import InputError, first_line


class Tokenizer:
    """Text to ids and back, by the files that travelled with the artifact."""

    def __init__(
        self,
        encode: Callable[[str, bool], list[int]],
        decode: Callable[[list[int]], str],
        vocabulary_size: int,
    ) -> None:
        self._encode = encode
        self._decode = decode
        self.vocabulary_size = vocabulary_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, by default with the tokens that the model wants around a prompt."""
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._decode(list(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` piece by piece, each as soon as no later id can change it."""
        pieces = Pieces(self)
        for token in ids:
            if piece := pieces.add(token):
                yield piece
        if rest := pieces.rest():
            yield rest


class Pieces:
    """The text of ids that come one by one.

    A character of several bytes may be spread over tokens: what ends in U+FFFD waits.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._written = ""

    def add(self, token: int) -> str:
        """What the text gained and no later id can change; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self._written):
            return ""
        gained = text[len(self._written) :]
        self._written = text
        return gained

    def rest(self) -> str:
        """What waited, now that no id follows."""
        return self._tokenizer.decode(self._ids)[len(self._written) :]


def load_tokenizer(artifact: Path) -> Tokenizer:
    """The tokenizer in `artifact`.

    Raises:
        InputError: there is none, or its file is damaged.
    """
    path = artifact / "tokenizer.json"
    if path.is_file():
        return _fast_tokenizer(path)
    slow = [artifact / name for name in ("tokenizer.model", "vocab.json")]
    if not any(file.is_file() for file in slow):
        raise InputError(
            f"{path}: no such file; put the model's tokenizer beside its weights and export again"
        )
    return _slow_tokenizer(artifact)


def _fast_tokenizer(path: Path) -> Tokenizer:
    import tokenizers  # noqa: PLC0415

    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(
            f"{path}: not a tokenizer ({first_line(error)}); download it again"
        ) from error
    loaded.no_truncation()
    loaded.no_padding()
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special).ids),
        lambda ids: str(loaded.decode(ids)),
        loaded.get_vocab_size(),
    )


def _slow_tokenizer(artifact: Path) -> Tokenizer:
    import transformers  # noqa: PLC0415

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            artifact, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise InputError(
            f"{artifact}: its tokenizer cannot be read ({first_line(error)}); "
            "add tokenizer.json to the model and export again"
        ) from error
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special)),
        lambda ids: str(loaded.decode(ids, skip_special_tokens=True)),
        len(loaded),
    )


def eos_token_ids(artifact: Path) -> frozenset[int]:
    """The ids that end a text, from generation_config.json or config.json; may be empty."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((artifact / name).read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"{artifact / name}: not a JSON object ({error}); export again"
            ) from error
        if isinstance(found, int):
            return frozenset({found})
        if isinstance(found, list):
            return frozenset(i for i in found if isinstance(i, int))
    return frozenset()
