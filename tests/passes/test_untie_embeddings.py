# SPDX-License-Identifier: Apache-2.0
"""Untie: a tied head gets a weight of its own, and nothing else changes."""

import numpy as np
import pytest

from quarot_onnx.decoder import Decoder
from quarot_onnx.errors import UnsupportedModelError
from quarot_onnx.passes import Effect, untie_embeddings
from tests import float64
from tests.small_decoder import assert_golden, logits, small_decoder, text


def test_golden() -> None:
    model = small_decoder(tied=True)
    before = text(model)
    report = untie_embeddings(model)
    assert_golden("untie_embeddings", before, text(model))
    assert (report.name, report.effect, report.sites) == ("UntieEmbeddings", Effect.EQUIVALENT, 1)


def test_the_function_does_not_change_and_the_embedding_can_be_rotated_alone() -> None:
    model = small_decoder(tied=True)
    before = logits(float64.run, model)
    untie_embeddings(model)
    np.testing.assert_array_equal(logits(float64.run, model), before)
    decoder = Decoder.locate(model)
    head = decoder.lm_head.weight.float64()
    decoder.embedding_weights[0].compose(1, lambda w: w * 0)
    np.testing.assert_array_equal(decoder.lm_head.weight.float64(), head)


def test_the_head_has_what_was_composed_on_the_embedding_before() -> None:
    model = small_decoder(tied=True)
    embedding = model.graph.initializers["embed.weight"].const_value
    embedding.compose(1, lambda w: w * 3)
    untie_embeddings(model)
    np.testing.assert_array_equal(
        Decoder.locate(model).lm_head.weight.float64(), embedding.float64().T
    )


def test_a_model_without_tied_embeddings_keeps_its_graph() -> None:
    model = small_decoder()
    assert untie_embeddings(model).sites == 0
    model.metadata_props.clear()
    assert text(model) == text(small_decoder())


def test_a_tied_head_cannot_be_located_before() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        Decoder.locate(small_decoder(tied=True))
    assert str(caught.value) == (
        "/lm_head/MatMul: its weight is not an initializer of its own; "
        "tied embeddings are untied by UntieEmbeddingsPass"
    )
