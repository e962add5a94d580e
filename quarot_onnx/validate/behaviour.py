# SPDX-License-Identifier: Apache-2.0
"""Stages ``sensitivity``, ``causality``, ``cache`` and ``padding``: the graph against itself."""

import math

import numpy as np

from quarot_onnx.evaluate import decode_perplexity
from quarot_onnx.runtime import Logits
from quarot_onnx.validate.closeness import Closeness
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding

_CHANGED = 16  # tokens that are changed, one at a time
_TOP1, _LOG_PERPLEXITY = 0.96, 0.01  # of decode against prefill, and of padded against plain


def check_sensitivity(subject: Subject) -> Finding:
    """Fails on logits that a token does not reach: frozen ids, an attention that sees nothing."""
    change, largest = _change_each_token(subject)
    steps = np.arange(_CHANGED)
    own = np.abs(change[steps, steps]).max(axis=-1) / largest
    later = [np.abs(change[index, index + 1 :]).max() for index in steps[:-1]]
    dead = [int(i) for i in steps if own[i] < 1e-3 or (i < len(later) and later[i] == 0)]
    detail = (
        f"changing token {dead[0]} does not change the logits"
        if dead
        else f"each of {_CHANGED} tokens changes its own logits by at least {own.min():.2g} of the "
        "largest, and later ones"
    )
    return Finding("tokens without effect", len(dead), 0, detail)


def check_causality(subject: Subject) -> Finding:
    """Fails on a mask that lets a token see later ones."""
    change, largest = _change_each_token(subject)
    leaks = np.array(
        [np.abs(change[index, :index]).max(initial=0) / largest for index in range(_CHANGED)]
    )
    leaking = float((leaks > subject.tolerance).mean())
    # A rounding tie may fall differently in one row of a batch; a leak shows in nearly all rows.
    allowed = 0.1 if subject.recipe.is_lossy else 0.0
    detail = f"a later token changes earlier logits by at most {leaks.max():.2g} of the largest"
    return Finding("tokens that change earlier logits, fraction", leaking, allowed, detail)


def check_cache(subject: Subject) -> Finding:
    """Fails on a cache or on positions that are wrong once there is a past.

    A prefill, which is all that the comparisons with PyTorch run, never reads the cache.
    """
    model = subject.need_model()
    found = decode_perplexity(model, subject.ids)
    drift = abs(math.log(found.perplexity / found.prefill_perplexity))
    detail = (
        f"decode token by token against prefill: top-1 {found.top1_agreement:.1%}, "
        f"log-perplexity differs by {drift:.2g}"
    )
    return Finding(
        "1 - top-1 agreement of decode with prefill",
        1 - found.top1_agreement,
        1 - _TOP1,
        detail,
        found.top1_agreement >= _TOP1 and drift <= _LOG_PERPLEXITY,
    )


def check_padding(subject: Subject) -> Finding:
    """Fails on a mask or on positions that ignore the padding of the other rows of a batch.

    A row with padding on its left, and the token that follows it, are compared with the same row
    alone.
    """
    model = subject.need_model()
    batch, length = subject.ids.shape
    padding = length // 4
    ids, mask = subject.ids.copy(), np.ones((batch, length), np.int64)
    ids[1, :padding], mask[1, :padding] = 0, 0
    logits, cache = model.step(ids, model.new_cache(batch), mask)
    alone, alone_cache = model.step(ids[1:, padding:], model.new_cache(1))
    follower = ids[:, :1]
    mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    logits_after, _ = model.step(follower, cache, mask)
    alone_after, _ = model.step(follower[1:], alone_cache)
    found = np.concatenate([logits[1, padding:], logits_after[1]])
    expected = np.concatenate([alone[0], alone_after[0]])
    close = Closeness.of(found, expected)
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    typical = float(np.median(error))
    allowed = subject.tolerance
    if subject.recipe.is_lossy and subject.dtype != "float32":
        allowed = max(allowed, Closeness.of(*subject.expected).relative_l2)
    return Finding(
        "median relative error of a padded row",
        typical,
        allowed,
        f"{padding} tokens of padding on the left: {close}",
        typical <= allowed and close.top1 >= _TOP1,
    )


def _change_each_token(subject: Subject) -> tuple[Logits, float]:
    """Row i is `ids` with token i changed, minus the logits of `ids` [T, T, V]; and max|logit|."""
    model = subject.need_model()
    base = subject.ids[0, :_CHANGED]
    rows = np.repeat(base[None], _CHANGED + 1, axis=0)
    for index in range(_CHANGED):
        rows[index + 1, index] = (base[index] + model.vocabulary_size // 2) % model.vocabulary_size
    logits, _ = model.step(rows, model.new_cache(len(rows)))
    return logits[1:] - logits[:1], float(np.abs(logits[0]).max())
