# SPDX-License-Identifier: Apache-2.0
"""Serve many texts on one model: continuous batching, without a server around it.

`Scheduler.submit` takes a `Request` and a `Reply` from any thread. The scheduler's own thread lets
requests join the batch as places are free, takes one step for all of them, and hands out the
text as soon as it is certain. A text ends at a token that ends texts, at a stop word, at its
`max_tokens`, or when its client is gone; its place is free for the next step.

The same tokens are chosen as by `generation.generate`: `batching` says why.
"""

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from quarot_onnx.errors import InputError, QuarotError, ResourceError, UsageError
from quarot_onnx.runtime import CausalModel, Logits, Pieces, Tokenizer
from quarot_onnx.runtime.batching import batch_of
from quarot_onnx.runtime.generation import Sampler, Sampling

FinishReason = Literal["stop", "length"]

DEFAULT_MAX_TOKENS = 64
MAX_STOP_WORDS = 16
_CANCELLATION_PERIOD = 0.05  # seconds; asking a server's process takes longer than a small step


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        text: to continue.
        max_tokens: upper bound of new tokens; where None `DEFAULT_MAX_TOKENS`, or what fits.
        stop_words: the text ends before the first of them.
        sampling: how tokens are chosen.
    """

    text: str
    max_tokens: int | None = None
    stop_words: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens: is {self.max_tokens}; give 1 or more")
        if len(self.stop_words) > MAX_STOP_WORDS:
            raise UsageError(
                f"stop_words: there are {len(self.stop_words)}; give {MAX_STOP_WORDS} or fewer"
            )
        if "" in self.stop_words:
            raise UsageError("stop_words: one is empty; leave it out")


@dataclass(frozen=True)
class Piece:
    """A part of the answer, in order.

    Attributes:
        text: may be empty in the last one.
        prompt_tokens: of the whole request.
        tokens: how many generated tokens this piece is the first to count.
        finish_reason: of the last piece; None before.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: FinishReason | None


class Reply(Protocol):
    """Where the answer of one request goes; called by the scheduler's thread only."""

    def send(self, piece: Piece) -> None:
        """The next part; the last one has a finish reason."""
        ...

    def fail(self, message: str) -> None:
        """There is no more; why."""
        ...

    def cancel(self) -> None:
        """There is no more; the client went away."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the client went away."""
        ...


@dataclass
class Statistics:
    """What the scheduler did and does.

    Attributes:
        active: texts in the batch.
        waiting: requests without a place.
        prompt_tokens, generated_tokens, steps: since the start.
        finished: reason (``stop``, ``length``, ``cancelled``, ``failed``) -> requests.
    """

    active: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)


class _Text:
    """One text in the making: its request, what was chosen, what was sent."""

    def __init__(
        self, request: Request, reply: Reply, prompt: list[int], room: int, tokenizer: Tokenizer
    ) -> None:
        self.reply = reply
        self.prompt = prompt
        self.sampler = Sampler(request.sampling)
        self.last = -1
        self._left = room
        self._pieces = Pieces(tokenizer)
        self._stop_words = request.stop_words
        self._held = ""
        self._uncounted = 0

    def add(self, token: int) -> FinishReason | None:
        """Take a token that ends no text; the reason where the text is finished."""
        self.last = token
        self._left -= 1
        self._uncounted += 1
        self._held += self._pieces.add(token)
        if self._cut_at_stop_word():
            return "stop"
        if not self._left:
            self._held += self._pieces.rest()
            return "stop" if self._cut_at_stop_word() else "length"
        certain = len(self._held) - self._overlap()
        if certain:
            self._send(self._held[:certain], None)
            self._held = self._held[certain:]
        return None

    def end(self) -> FinishReason:
        """Take the token that ends the text."""
        self._held += self._pieces.rest()
        self._cut_at_stop_word()
        return "stop"

    def finish(self, reason: FinishReason) -> None:
        """Send what was held back."""
        self._send(self._held, reason)

    def _send(self, text: str, reason: FinishReason | None) -> None:
        self.reply.send(Piece(text, len(self.prompt), self._uncounted, reason))
        self._uncounted = 0

    def _cut_at_stop_word(self) -> bool:
        found = [at for word in self._stop_words if (at := self._held.find(word)) >= 0]
        if found:
            self._held = self._held[: min(found)]
        return bool(found)

    def _overlap(self) -> int:
        """How many characters at the end may be the beginning of a stop word."""
        return max(
            (
                length
                for word in self._stop_words
                for length in range(1, min(len(word), len(self._held) + 1))
                if self._held.endswith(word[:length])
            ),
            default=0,
        )


class Scheduler:
    """Continues the texts of many requests together on one model."""

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Iterable[int],
        context_length: int,
        max_streams: int = 16,
        max_waiting: int = 256,
        observe: Callable[[Statistics], None] = lambda _: None,
    ) -> None:
        """Start the thread.

        Args:
            model: any runtime.
            tokenizer: the model's.
            eos_token_ids: the ids that end a text.
            context_length: tokens of a prompt and its continuation, at most.
            max_streams: texts in the batch, at most.
            max_waiting: requests that wait for a place, at most.
            observe: called by the scheduler's thread after each step.

        Raises:
            UsageError: a limit is not positive.
            InputError: the tokenizer has more ids than the model.
        """
        for name, value in (("max_streams", max_streams), ("max_waiting", max_waiting)):
            if value < 1:
                raise UsageError(f"{name}: is {value}; give 1 or more")
        if tokenizer.vocabulary_size > model.vocabulary_size:
            raise InputError(
                f"tokenizer: has {tokenizer.vocabulary_size} ids and the model has "
                f"{model.vocabulary_size}; the tokenizer belongs to another model"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._ends = frozenset(eos_token_ids)
        self._context_length = context_length
        self._max_streams, self._max_waiting = max_streams, max_waiting
        self._observe = observe
        self._batch = batch_of(model)
        self._active: list[_Text] = []
        self._waiting: deque[_Text] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._asked = 0.0
        self.statistics = Statistics()
        self._thread = threading.Thread(target=self._run, name="quarot-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: Request, reply: Reply) -> None:
        """Queue a request; its answer goes to `reply`.

        Raises:
            InputError: the prompt has no tokens, or too many with the tokens asked for.
            ResourceError: too many requests wait already, or the server is shutting down.
        """
        prompt = self._encode(request.text)
        room = self._context_length - len(prompt)
        if room < 1:
            raise InputError(
                f"text_input: has {len(prompt)} tokens and the model takes {self._context_length} "
                "with the answer; shorten it"
            )
        wanted = request.max_tokens or min(DEFAULT_MAX_TOKENS, room)
        if wanted > room:
            raise InputError(
                f"max_tokens: {wanted} after a prompt of {len(prompt)} tokens is more than the "
                f"model takes, {self._context_length}; ask for {room} or fewer"
            )
        with self._changed:
            if self._closing:
                raise ResourceError("server: is shutting down; ask another one")
            if len(self._waiting) >= self._max_waiting:
                raise ResourceError(
                    f"server: {self._max_waiting} requests wait already; try again later"
                )
            self._waiting.append(_Text(request, reply, prompt, wanted, self._tokenizer))
            self._changed.notify()

    def close(self) -> None:
        """End every request and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _encode(self, text: str) -> list[int]:
        """Ids of a prompt; a chat template may have written the first special token already."""
        ids = self._tokenizer.encode(text)
        if not ids:
            raise InputError("text_input: has no tokens; give some text")
        bare = self._tokenizer.encode(text, add_special_tokens=False)
        return bare if bare != ids and bare[:1] == ids[:1] else ids

    # --- The scheduler's thread -------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except QuarotError as error:
                self._fail_active(str(error))
            except Exception as error:  # a bug of ours ends the texts at hand, not the server
                logging.getLogger(__name__).exception("a step failed")
                self._fail_active(f"server: a step failed ({type(error).__name__}); report this")
            self._note()
        for text in [*self._active, *self._waiting]:
            text.reply.fail("server: is shutting down; ask another one")

    def _wait(self) -> bool:
        """Whether there is something to do, once there is; False where the scheduler closes."""
        with self._changed:
            while not (self._closing or self._active or self._waiting):
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        """Let texts leave and join, then take one step for all."""
        self._drop_cancelled()
        while len(self._active) < self._max_streams and self._admit():
            pass
        if not self._active:
            return
        logits = self._batch.step([text.last for text in self._active])
        self.statistics.steps += 1
        finished = [
            row for row, text in enumerate(self._active) if self._advance(text, logits[row])
        ]
        for row in reversed(finished):
            self._leave(row)

    def _admit(self) -> bool:
        """Whether a text waited; it takes its first token, and a place if it goes on."""
        with self._changed:
            if not self._waiting:
                return False
            text = self._waiting.popleft()
        if text.reply.is_cancelled():
            self._cancel(text)
            return True
        self._active.append(text)
        try:
            logits = self._batch.join(text.prompt)
        except QuarotError as error:
            self._active.pop()
            self._fail(text, str(error))
            return True
        self.statistics.prompt_tokens += len(text.prompt)
        if self._advance(text, logits):
            self._leave(len(self._active) - 1)
        return True

    def _advance(self, text: _Text, logits: Logits) -> bool:
        """Choose the next token of a text; whether that finishes it."""
        token = text.sampler.choose(logits)
        if token in self._ends:
            reason: FinishReason | None = text.end()
        else:
            self.statistics.generated_tokens += 1
            reason = text.add(token)
        if reason is None:
            return False
        self.statistics.finished[reason] += 1
        text.finish(reason)
        return True

    def _leave(self, row: int) -> None:
        del self._active[row]
        self._batch.leave(row)

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        if now < self._asked + _CANCELLATION_PERIOD:
            return
        self._asked = now
        for row in reversed(range(len(self._active))):
            text = self._active[row]
            if text.reply.is_cancelled():
                self._leave(row)
                self._cancel(text)
        with self._changed:
            waiting = list(self._waiting)
        for text in waiting:
            if text.reply.is_cancelled():
                with self._changed:
                    self._waiting.remove(text)
                self._cancel(text)

    def _cancel(self, text: _Text) -> None:
        self.statistics.finished["cancelled"] += 1
        text.reply.cancel()

    def _fail(self, text: _Text, message: str) -> None:
        self.statistics.finished["failed"] += 1
        text.reply.fail(message)

    def _fail_active(self, message: str) -> None:
        for text in self._active:
            self._fail(text, message)
        self._active = []
        self._batch = batch_of(self._model)

    def _note(self) -> None:
        self.statistics.active = len(self._active)
        self.statistics.waiting = len(self._waiting)
        self._observe(self.statistics)


def context_length(artifact: Path) -> int:
    """How many tokens the model takes, by its config.json.

    Raises:
        InputError: config.json is missing, damaged or does not say.
    """
    path = artifact / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: does not say max_position_embeddings ({error}); export again"
        ) from error
