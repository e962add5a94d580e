# SPDX-License-Identifier: Apache-2.0
"""R4: an online Hadamard in front of every down_proj.

    before:  y = x @ W
    after:   y = (x H) @ (H.T @ W)          since H H.T = I (H need not be symmetric)

The function does not change. The input of down_proj is a product of activations, which no offline
rotation can reach; it has the largest outliers of a layer (QuaRot, section 3, stage 1a). The
experts of a mixture have one size and one H: one node turns the rows of all of them before they are
grouped, and every expert's weight takes the inverse.

Where no Hadamard matrix of the size exists, blocks of it are rotated, or zeros are appended:

    after:   y = ([x, 0] H) @ (H.T @ [W; 0])            H of the next size that has a matrix

which mixes all features, at the price of the padded columns ("dimension expansion").
"""

from dataclasses import replace
from functools import partial

import onnx_ir as ir

from quarot_onnx.decoder import Decoder
from quarot_onnx.hadamard import Plan, Policy, plan
from quarot_onnx.handles import is_grouping
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.online import describe, insert_hadamard, module_of


class InsertR4Pass(Pass):
    """Rotate down_proj's input online, and its weight offline."""

    effect = Effect.EQUIVALENT

    def __init__(self, decoder: Decoder, policy: Policy = "block") -> None:
        super().__init__(decoder)
        self.downs = [mlp.down for layer in decoder.layers for mlp in layer.mlps]
        self.plans: dict[int, Plan] = {
            size: plan(size, policy=policy)
            for size in dict.fromkeys(d.in_features for d in self.downs)
        }

    def requires(self) -> None:
        """The input of down_proj must still be float."""
        self.refuse_after("QuantizeActivations")

    def rewrite(self) -> Report:
        """Insert one node per down_proj or group of experts, none where the dimension is odd."""
        turned: set[ir.Node] = set()
        skipped: dict[str, list[str]] = {}
        for down in self.downs:
            size = down.in_features
            found = self.plans[size]
            if found.kind == "none":
                skipped.setdefault(found.reason, []).append(down.name)
                continue
            place = down.grouping or down.node
            if found.kind == "padded":
                down.pad_inputs(found.padded_size)
                found = replace(found, size=found.padded_size)  # of what is padded already
            if place not in turned:
                self._insert(place, self.plans[size])
                turned.add(place)
            down.weight.compose(0, partial(found.apply, axis=0))
        used = [found for found in self.plans.values() if found.kind != "none"]
        return self.report(len(turned), "; ".join(describe(found) for found in used), skipped)

    def _insert(self, place: ir.Node, found: Plan) -> None:
        """Turn what `place` reads: a linear's input, or the rows that it groups for experts."""
        insert_hadamard(self.decoder.model, place, 0, found, f"{module_of(place)}/R4")
        for rows in place.outputs if is_grouping(place) else ():
            assert rows.shape is not None
            rows.shape = ir.Shape([*rows.shape[:-1], found.padded_size])
