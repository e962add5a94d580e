# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded model: a 4-million-parameter Llama on Python's own standard library.

The text is what the running interpreter ships: the source of the standard library's modules with
their docstrings and comments, the language reference topics of ``pydoc_data``, and the docstrings
of the compiled modules. All of it is under the PSF licence. Nothing is downloaded.

    python examples/tiny_llama/train.py WORK_DIR [--steps N] [--threads N]

leaves in WORK_DIR: ``checkpoint/`` (a Hugging Face model and its tokenizer), ``train.txt``,
``heldout.txt`` and ``calibration.txt``. ``add_outliers.py`` makes the committed model of them.
"""

import argparse
import ast
import hashlib
import inspect
import pathlib
import pkgutil
import pydoc_data.topics
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib import import_module

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 2048
WINDOW = 256  # tokens in a training sequence and in an evaluation window
BATCH = 32  # sequences in a step
HELD_OUT_SHARE = 0.05  # of documents
SAMPLE_CHARACTERS = 180_000  # of heldout.txt and of calibration.txt

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "# {{ message['role'] }}: {{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)

# Generated tables, build settings of one machine, and near copies of other modules.
EXCLUDED = re.compile(
    r"site-packages|__pycache__|pydoc_data|encodings/|lib2to3/|_sysconfigdata|config-|"
    r"cjkencodings|test/(decimaltestdata|test_email/data|test_importlib/data|crashers)|bad_|badsyntax"
)
IS_TEST = re.compile(r"(^|/)(test|tests|idle_test)/")


def library_sources() -> Iterator[tuple[str, str]]:
    """(name, text) of each module of the standard library that parses."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if EXCLUDED.search(name):
            continue
        try:
            text = path.read_text("utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # the test suite holds files that are broken on purpose
        yield name, text


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """(name, text) of each compiled module: its signatures and docstrings, as pydoc prints them."""
    dynamic = pathlib.Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    found = {module.name for module in pkgutil.iter_modules([str(dynamic)])}
    names = sorted(name for name in found | set(sys.builtin_module_names) if "test" not in name)
    for name in names:
        try:
            module = import_module(name)
        except ImportError:
            continue
        parts = [inspect.getdoc(module) or ""]
        for attribute in sorted(vars(module)):
            value = getattr(module, attribute)
            members = [(attribute, value)]
            if inspect.isclass(value):
                inner = sorted(vars(value).items())
                members += [(f"{attribute}.{key}", item) for key, item in inner]
            for label, member in members:
                text = inspect.getdoc(member) if callable(member) else None
                if text and "__" not in label:
                    signature = getattr(member, "__text_signature__", None) or "(...)"
                    parts.append(f"{label}{signature}\n" + re.sub("^", "    ", text, flags=re.M))
        yield f"compiled/{name}", "\n\n".join(parts)


def clean(text: str) -> str:
    """The text with spaces for tabs, no trailing blanks, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").expandtabs(8)
    text = re.sub(r"[ \f]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n") + "\n"


def is_language(text: str) -> bool:
    """Whether the text is code or prose, not a table of numbers or a very short stub."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    ascii_share = sum(character.isascii() for character in text) / len(text)
    return len(text) > 400 and letters / len(text) > 0.7 and ascii_share > 0.98


def documents() -> dict[str, str]:
    """Cleaned documents by name; a text that occurs twice is kept once."""
    topics = ((f"topics/{name}", text) for name, text in sorted(pydoc_data.topics.topics.items()))
    result: dict[str, str] = {}
    seen: set[str] = set()
    for source in (library_sources(), topics, compiled_docstrings()):
        for name, raw in source:
            text = clean(raw)
            if text not in seen and is_language(text):
                seen.add(text)
                result[name] = text
    return result


def is_held_out(name: str) -> bool:
    """Whether a document is held out: by a hash of its name; the library's own tests never are."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return not IS_TEST.search(name) and digest / 2**64 < HELD_OUT_SHARE


def sample(texts: list[str], seed: int) -> str:
    """About `SAMPLE_CHARACTERS` of whole documents in random order, each cut after 12000."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    parts: list[str] = []
    for text in order:
        if sum(map(len, parts)) > SAMPLE_CHARACTERS:
            break
        parts.append(text if len(text) <= 12_000 else text[: text.rindex("\n", 0, 12_000) + 1])
    return "\n".join(parts)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` entries; `BOS` is 0, `EOS` is 1, neither added unasked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one int64 sequence, each between `BOS` and `EOS`."""
    pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
    framed = [np.array([0, *piece, 1], dtype=np.int64) for piece in pieces]
    return torch.from_numpy(np.concatenate(framed))


def batches(stream: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """int64 [BATCH, WINDOW + 1] without end: each epoch cuts the stream at another offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - WINDOW - 1, WINDOW)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in starts.split(BATCH):
            if len(chosen) == BATCH:
                yield torch.stack([stream[start : start + WINDOW + 1] for start in chosen])


def make_config() -> LlamaConfig:
    """Llama-2's proportions: 4 query heads to 2 cache heads, 688 = 4 * 172 as 11008 = 64 * 172."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def optimizers(model: LlamaForCausalLM, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return [
        torch.optim.Muon(matrices, lr=muon, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.95), weight_decay=0.01),
    ]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Mean NLL in nats over 64 evenly spaced windows."""
    starts = torch.linspace(0, len(stream) - WINDOW - 1, 64).long()
    rows = torch.stack([stream[start : start + WINDOW + 1] for start in starts])
    losses = [loss_of(model, part).item() for part in rows.split(BATCH)]
    return sum(losses) / len(losses)


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean NLL in nats of a batch [rows, WINDOW + 1]; matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(directory: pathlib.Path, steps: int, seed: int, muon: float, adam: float) -> None:
    """Writes texts and checkpoint into `directory`; prints the loss every 50 steps."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = documents()
    kept_out = [text for name, text in texts.items() if is_held_out(name)]
    training = [text for name, text in texts.items() if not is_held_out(name)]
    plain = [t for name, t in texts.items() if not is_held_out(name) and not IS_TEST.search(name)]
    (directory / "heldout.txt").write_text(sample(kept_out, seed), encoding="utf-8")
    (directory / "calibration.txt").write_text(sample(plain, seed), encoding="utf-8")
    tokenizer = train_tokenizer(training)
    stream = token_stream(tokenizer, training + 2 * plain)  # tests are most of it: weigh them less
    held_out = token_stream(tokenizer, kept_out)
    print(
        f"{len(training)} training documents, {sum(map(len, training)):,} characters, "
        f"{len(stream):,} tokens; {len(kept_out)} held out, {len(held_out):,} tokens",
        flush=True,
    )

    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config())
    step_model = torch.compile(model)
    chosen = optimizers(model, muon, adam)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in chosen]
    source = batches(stream, seed)
    started = time.time()
    for step in range(1, steps + 1):
        rate = min(step / 50, 1.0) * (1 - (step - 1) / steps)  # warm-up, then linear to zero
        for optimizer, peak in zip(chosen, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss = loss_of(step_model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step}: {time.time() - started:.0f} s, loss {loss.item():.4f}", flush=True)
        if step % 200 == 0 or step == steps:
            print(f"held-out loss {held_out_loss(step_model, held_out):.4f}", flush=True)
            model.save_pretrained(directory / "checkpoint")
            tokenizer.save_pretrained(directory / "checkpoint")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="train the embedded model")
    parser.add_argument("work_dir", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon", type=float, default=1.2e-2)
    parser.add_argument("--adam", type=float, default=1.5e-2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.work_dir, arguments.steps, arguments.seed, arguments.muon, arguments.adam)


if __name__ == "__main__":
    main()
