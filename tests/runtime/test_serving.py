# SPDX-License-Identifier: Apache-2.0
"""The scheduler without a server: real models, replies that record."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx.errors import InputError, ResourceError, UsageError
from quarot_onnx.runtime import Cache, Ids, Logits, OnnxModel, Tokenizer, load_tokenizer
from quarot_onnx.runtime.generation import Sampling, generate
from quarot_onnx.runtime.serving import Piece, Request, Scheduler, context_length


class Recorded:
    """Keeps what a client would see."""

    def __init__(self, *, cancel_after: int | None = None) -> None:
        self.pieces: list[Piece] = []
        self.message = ""
        self.cancelled = False
        self.done = threading.Event()
        self._cancel_after = cancel_after

    def send(self, piece: Piece) -> None:
        assert not self.done.is_set()
        self.pieces.append(piece)
        if piece.finish_reason:
            self.done.set()

    def fail(self, message: str) -> None:
        self.message = message
        self.done.set()

    def cancel(self) -> None:
        self.cancelled = True
        self.done.set()

    def is_cancelled(self) -> bool:
        return self._cancel_after is not None and len(self.pieces) >= self._cancel_after

    def wait(self) -> "Recorded":
        assert self.done.wait(60)
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


LETTERS = Tokenizer(
    lambda text, special: [0] * special + [ord(letter) - 96 for letter in text],
    lambda ids: "".join(chr(96 + token) for token in ids if token),
    27,
)
"""a is 1, ..., z is 26; 0 begins a text."""


class Alphabet:
    """The letter after t is t + 1, and a after z; a step waits until it may."""

    vocabulary_size = 27

    def __init__(self) -> None:
        self.may_step = threading.Event()
        self.may_step.set()
        self.stepping = threading.Event()
        self.fails: tuple[int, Exception] | None = None  # after so many steps
        self.widths: list[int] = []

    def new_cache(self, batch: int) -> Cache:
        return {"past": np.zeros((batch, 1, 0, 2), np.float32)}

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        self.stepping.set()
        assert self.may_step.wait(60)
        if self.fails is not None and len(self.widths) == self.fails[0]:
            raise self.fails[1]
        self.widths.append(len(input_ids))
        following = input_ids % 26 + 1
        logits = np.zeros((*input_ids.shape, 27), np.float32)
        np.put_along_axis(logits, following[..., None], 1.0, axis=-1)
        added = np.zeros((len(input_ids), 1, input_ids.shape[1], 2), np.float32)
        return logits, {"past": np.concatenate([cache["past"], added], axis=2)}


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Callable[..., tuple[Scheduler, Alphabet]]:
    def start(**options: Any) -> tuple[Scheduler, Alphabet]:
        model = Alphabet()
        defaults = {"eos_token_ids": [26], "context_length": 100}
        scheduler = Scheduler(model, LETTERS, **{**defaults, **options})

        def stop() -> None:
            model.may_step.set()
            scheduler.close()

        request.addfinalizer(stop)
        return scheduler, model

    return start


def _ask(scheduler: Scheduler, text: str, **options: Any) -> Recorded:
    reply = Recorded()
    scheduler.submit(Request(text, **options), reply)
    return reply


def test_a_text_ends_at_its_length_or_before_the_token_that_ends_texts(serve: Any) -> None:
    scheduler, _ = serve()
    short, whole = _ask(scheduler, "a", max_tokens=3), _ask(scheduler, "w", max_tokens=9)
    assert short.wait().text == "bcd"
    assert whole.wait().text == "xy"
    assert [short.pieces[-1].finish_reason, whole.pieces[-1].finish_reason] == ["length", "stop"]
    assert [sum(piece.tokens for piece in reply.pieces) for reply in (short, whole)] == [3, 2]
    assert {piece.prompt_tokens for piece in short.pieces} == {2}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("fgh",), "bcde"),
        (("g", "fgh"), "bcdef"),
        (("fgx", "gh"), "bcdef"),
        (("bcdefghij",), ""),
        (("mno",), "bcdefghijkl"),
        (("nothing",), "bcdefghijkl"),
    ],
)
def test_a_text_ends_before_a_stop_word_of_which_nothing_is_sent(
    serve: Any, words: tuple[str, ...], text: str
) -> None:
    scheduler, _ = serve()
    assert _ask(scheduler, "a", max_tokens=11, stop_words=words).wait().text == text


def test_what_may_begin_a_stop_word_is_held_back_no_longer_than_needed(serve: Any) -> None:
    scheduler, _ = serve()
    reply = _ask(scheduler, "a", max_tokens=8, stop_words=("cdx",)).wait()
    assert [piece.text for piece in reply.pieces] == ["b", "cde", "f", "g", "h", "i"]


def test_requests_share_steps_and_wait_for_a_place(serve: Any) -> None:
    scheduler, model = serve(max_streams=3)
    model.may_step.clear()
    replies = [_ask(scheduler, "a", max_tokens=6) for _ in range(5)]
    model.may_step.set()
    assert [reply.wait().text for reply in replies] == ["bcdefg"] * 5
    assert max(model.widths) == 3
    assert scheduler.statistics.generated_tokens == 30
    assert scheduler.statistics.finished["length"] == 5


def test_a_cancelled_text_ends_in_the_batch_and_in_the_queue(serve: Any) -> None:
    scheduler, model = serve(max_streams=1, eos_token_ids=[], context_length=10**6)
    running, waiting, last = Recorded(cancel_after=2), Recorded(cancel_after=0), Recorded()
    model.may_step.clear()
    for reply, tokens in ((running, 10**5), (waiting, 5), (last, 3)):
        scheduler.submit(Request("a", max_tokens=tokens), reply)
    model.may_step.set()
    assert last.wait().text == "bcd"
    assert running.wait().cancelled
    assert waiting.wait().cancelled
    assert not waiting.pieces
    assert scheduler.statistics.finished == {"cancelled": 2, "length": 1}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ResourceError("memory: is full; wait"), "memory: is full; wait"),
        (ZeroDivisionError(), "server: a step failed (ZeroDivisionError); report this"),
    ],
)
def test_a_step_that_fails_ends_its_texts_and_not_the_server(
    serve: Any, error: Exception, message: str, steps: int
) -> None:
    scheduler, model = serve(eos_token_ids=[])
    model.fails = (steps, error)
    reply = _ask(scheduler, "a", max_tokens=50).wait()
    assert (reply.message, len(reply.text)) == (message, steps)
    model.fails = None
    assert _ask(scheduler, "a", max_tokens=2).wait().text == "bc"
    assert scheduler.statistics.finished == {"failed": 1, "length": 1}


def test_refuses_more_requests_than_may_wait(serve: Any) -> None:
    scheduler, model = serve(max_streams=1, max_waiting=2)
    model.may_step.clear()
    first = _ask(scheduler, "a", max_tokens=2)
    assert model.stepping.wait(60)  # the first one has its place
    for _ in range(2):
        _ask(scheduler, "a", max_tokens=2)
    with pytest.raises(ResourceError) as error:
        _ask(scheduler, "a", max_tokens=2)
    assert str(error.value) == "server: 2 requests wait already; try again later"
    model.may_step.set()
    assert first.wait().text == "bc"


def test_closing_ends_every_request(serve: Any) -> None:
    scheduler, _ = serve(max_streams=1, eos_token_ids=[], context_length=10**6)
    replies = [_ask(scheduler, "a", max_tokens=10**5) for _ in range(3)]
    scheduler.close()
    assert {reply.wait().message for reply in replies} == {
        "server: is shutting down; ask another one"
    }
    with pytest.raises(ResourceError, match="is shutting down"):
        _ask(scheduler, "a")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a" * 100, {}, "text_input: has 101 tokens and the model takes 100 with the answer; "
         "shorten it"),
        ("abc", {"max_tokens": 97}, "max_tokens: 97 after a prompt of 4 tokens is more than the "
         "model takes, 100; ask for 96 or fewer"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit_into_the_context(
    serve: Any, text: str, options: dict[str, int], message: str
) -> None:
    scheduler, _ = serve()
    with pytest.raises(InputError) as error:
        _ask(scheduler, text, **options)
    assert str(error.value) == message


def test_a_text_may_fill_the_context(serve: Any) -> None:
    scheduler, _ = serve(eos_token_ids=[])
    assert len(_ask(scheduler, "abc", max_tokens=96).wait().text) == 96
    assert len(_ask(scheduler, "a" * 89).wait().text) == 10  # what fits, where nothing was said


def test_a_chat_template_that_wrote_the_first_token_gets_no_second_one(serve: Any) -> None:
    templated = Tokenizer(
        lambda text, special: (
            [0] * special + [0 if letter == "^" else ord(letter) - 96 for letter in text]
        ),
        lambda ids: "".join(chr(96 + token) for token in ids if token),
        27,
    )
    scheduler = Scheduler(Alphabet(), templated, eos_token_ids=[], context_length=50)
    for text, tokens in (("^ab", 3), ("ab", 3), ("^^ab", 4)):
        reply = _ask(scheduler, text, max_tokens=1).wait()
        assert (reply.text, reply.pieces[0].prompt_tokens) == ("c", tokens)
    scheduler.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_streams": 0}, "max_streams: is 0; give 1 or more"),
        ({"max_waiting": 0}, "max_waiting: is 0; give 1 or more"),
    ],
)
def test_refuses_limits_that_are_not_positive(
    serve: Any, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        serve(**options)
    assert str(error.value) == message


def test_refuses_the_tokenizer_of_another_model() -> None:
    tokenizer = Tokenizer(lambda text, special: [1], lambda ids: "", 28)
    with pytest.raises(InputError, match="has 28 ids and the model has 27; the tokenizer belongs"):
        Scheduler(Alphabet(), tokenizer, eos_token_ids=[], context_length=10)


def test_the_embedded_model_writes_what_generate_writes(embedded: Path) -> None:
    model, tokenizer = OnnxModel(embedded, threads=1), load_tokenizer(embedded)
    scheduler = Scheduler(
        model, tokenizer, eos_token_ids=[1], context_length=context_length(embedded), max_streams=3
    )
    prompts = ["Return the", "x", "Create a new file and then write the list of all names into it"]
    options = [{"temperature": 0.9, "top_p": 0.8, "seed": seed} for seed in (1, 2)]
    cases = [(prompt, sampling) for prompt in prompts for sampling in [{}, *options]]
    replies = [
        _ask(scheduler, prompt, max_tokens=30, sampling=Sampling(**sampling))
        for prompt, sampling in cases
    ]
    for (prompt, sampling), reply in zip(cases, replies, strict=True):
        ids = generate(
            model, tokenizer.encode(prompt), max_new_tokens=30, eos_token_ids=[1], **sampling
        )
        assert reply.wait().text == "".join(tokenizer.stream(ids))
    scheduler.close()


@pytest.mark.parametrize("content", [None, "{", "{}", '{"max_position_embeddings": "x"}', "[]"])
def test_refuses_a_config_that_does_not_say_the_context_length(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: does not say max_position_embeddings \("):
        context_length(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 7}))
    assert context_length(tmp_path) == 7
