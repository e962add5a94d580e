# SPDX-License-Identifier: Apache-2.0
"""Search clip ratios: the quantizers keep their places and get other clips.

    before:  scale = clip_ratio * max|x| / qmax
    after:   the same, with the clip_ratio that gives the model the least loss on calibration text

Lossy: a clip cuts off the largest values of a row and rounds the others more finely. Gradual
binary search: Maisonnave et al., arXiv 2504.13989.
"""

import math
from collections.abc import Sequence

from quarot_onnx.calibration.clip_search import search_clips
from quarot_onnx.calibration.journal import Journal
from quarot_onnx.calibration.layers import Progress
from quarot_onnx.calibration.tokens import Calibration
from quarot_onnx.decoder import Decoder
from quarot_onnx.passes.base import Effect, Pass, Report
from quarot_onnx.passes.quantize_activations import QuantizeActivationsPass
from quarot_onnx.passes.quantize_kv_cache import QuantizeKvCachePass

_ORDER = ("qkv", "keys", "values", "o_proj", "gate_up", "down_proj")  # of computation in a layer


class SearchClipsPass(Pass):
    """Set the clip ratio of the quantizers that earlier passes have put in place."""

    effect = Effect.LOSSY

    def __init__(
        self,
        decoder: Decoder,
        calibration: Calibration,
        quantized: Sequence[QuantizeActivationsPass | QuantizeKvCachePass],
        *,
        journal: Journal | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`quantized`: the passes whose quantizers are searched; they run before this one."""
        super().__init__(decoder)
        self.calibration = calibration
        self.quantized = quantized
        self.journal = journal or Journal()
        self.progress = progress

    def rewrite(self) -> Report:
        """Search every site, in the order of computation; finished ones are in the journal."""
        found = [quantizer for each in self.quantized for quantizer in each.quantizers]
        found.sort(key=lambda each: (each.site.layer, _ORDER.index(each.site.kind)))
        logits = next(v for v in self.decoder.model.graph.outputs if v.name == "logits")
        records = [
            {
                **quantizer.site.describe(),
                "clip_ratio": quantizer.clip_ratio,
                "clip_ratio_before": before,
                "perplexity": math.exp(loss),
            }
            for quantizer, before, loss in search_clips(
                self.decoder, self.calibration, logits, found, self.journal, self.progress
            )
        ]
        detail = f"by perplexity on {self.calibration.tokens.size} tokens"
        return self.report(len(records), detail, records=records)
