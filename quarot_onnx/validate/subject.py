# SPDX-License-Identifier: Apache-2.0
"""The artifact under test and what it is judged by, each part loaded when a stage first needs it.

torch is imported by the first stage that needs PyTorch, not with this module.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from quarot_onnx.artifacts import MODEL, load_manifest
from quarot_onnx.errors import InputError, MissingDependencyError
from quarot_onnx.export.architectures import LLAMA_MODULES
from quarot_onnx.export.checkpoint import Checkpoint
from quarot_onnx.recipe import Recipe
from quarot_onnx.runtime import Ids, Logits, OnnxModel, load_tokenizer, position_ids
from quarot_onnx.validate.verdict import Skip

if TYPE_CHECKING:
    from quarot_onnx.reference import FakeQuantModel, HuggingFaceModel
    from quarot_onnx.runtime.tensorrt import EngineModel
    from quarot_onnx.validate.side_by_side import Tolerance

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_ELEMENT_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_TOLERANCE = {
    "float32": 1e-4,
    "float16": 16 * _EPSILON["float16"],
    "bfloat16": 16 * _EPSILON["bfloat16"],
}

_BATCH, _LENGTH = 2, 48
_PROMPT = (
    "The ship left the harbour at dawn, and by noon the coast was a grey line behind it. Nobody "
    "on deck spoke of the storm. The captain had said that it would pass to the south, and the "
    "captain had been right before. In the evening the wind turned. First the small sails went, "
    "then the lamp at the bow, and then, one after the other, the men began to look at the sky. "
    "What they saw there none of them would forget: a wall of cloud, as high as a mountain, "
    "coming on without a sound. The youngest asked what they should do now, and the oldest of "
    "them laughed and said that there was nothing to be done but to hold on to whatever was "
    "nearest and wait for the morning."
)
"""Text for models with a tokenizer; without one, tokens are drawn at random."""


class Subject:
    """An artifact under validation.

    Properties raise InputError where a file is damaged, which is the finding of the stage that
    asked. The methods `need_...` skip a stage that cannot run.

    Attributes:
        artifact: the directory.
        reference: the Hugging Face directory it was exported from, if given.
        runtime: where the graph runs.
        threads: of one operator.
        manifest: the content of ``manifest.json``.
        recipe: the artifact's.
        dtype: the artifact's float dtype: float32, float16 or bfloat16.
        element_type: `dtype` as ONNX spells it.
        epsilon: the spacing of `dtype` at 1.
        tolerance: max|difference| / max|logit| of two computations of one function in `dtype`.
        tolerances: of the outputs that hosts are compared by; empty where no file gave them.
        engine: the directory of an engine made of the artifact, if given.
        triton_repository: the directory of a repository made of it, if given.
        is_loaded: the runtime took the graph; `check_load` sets it.
        is_finite: all weights and logits are finite; `check_finite` sets it.
    """

    def __init__(
        self,
        artifact: Path,
        reference: Path | None,
        *,
        runtime: str = "ort-cpu",
        threads: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        self.artifact, self.reference = artifact, reference
        self.runtime, self.threads = runtime, threads
        self.manifest = load_manifest(artifact)
        try:
            self.recipe = Recipe.model_validate(self.manifest["recipe"])
            self.dtype = str(self.manifest["dtype"])
            self.element_type = _ELEMENT_TYPES[self.dtype]
            self.epsilon = _EPSILON[self.dtype]
            self.tolerance = _TOLERANCE[self.dtype] if tolerance is None else tolerance
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{artifact}/manifest.json: recipe or dtype is damaged; export again"
            ) from error
        self.is_loaded = False
        self.is_finite = False
        self.tolerances: dict[str, Tolerance] = {}
        self.engine: Path | None = None
        self.triton_repository: Path | None = None

    # --- The artifact ---

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``; its sizes are integers."""
        path = self.artifact / "config.json"
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); export again") from error
        width = "ffn_dim" if "ffn_dim" in config else "intermediate_size"
        for key in (*_SIZES, width):
            if type(config.get(key)) is not int:
                raise InputError(f"{path}: {key} = {config.get(key)!r}; export again")
        return config

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.num_heads)

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.num_heads)

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """``model.onnx`` without the external data."""
        path = self.artifact / MODEL
        try:
            return onnx.load(str(path), load_external_data=False)
        except (OSError, DecodeError) as error:
            raise InputError(f"{path}: cannot be parsed ({error}); export again") from error

    @cached_property
    def model(self) -> OnnxModel:
        """The graph in `runtime`; stages after `check_load` ask `need_model` for it."""
        return OnnxModel(self.artifact, runtime=self.runtime, threads=self.threads)

    @cached_property
    def engine_model(self) -> "EngineModel":
        """The engine in TensorRT.

        Raises:
            Skip: none was given, or this machine cannot run it.
        """
        if self.engine is None:
            raise Skip("no engine was given (--engine)")
        try:
            from quarot_onnx.runtime.tensorrt import EngineModel  # noqa: PLC0415

            return EngineModel(self.engine)
        except MissingDependencyError as error:
            raise Skip(str(error)) from error

    # --- What judges it ---

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The reference's weights."""
        return Checkpoint(self.need_reference())

    @cached_property
    def judge(self) -> "HuggingFaceModel":
        """The reference in PyTorch."""
        from quarot_onnx.reference import HuggingFaceModel  # noqa: PLC0415  # imports torch

        return HuggingFaceModel(self.need_reference(), threads=self.threads)

    @cached_property
    def fake_quant(self) -> "FakeQuantModel":
        """PyTorch with the artifact's own codes.

        Raises:
            Skip: none is written for the family.
        """
        if not self.has_llama_modules:
            raise Skip(
                f"no PyTorch model of the codes is written for {self.config.get('model_type')}; "
                "its layers are compared with a new export"
            )
        from quarot_onnx.reference import FakeQuantModel  # noqa: PLC0415  # imports torch

        return FakeQuantModel(self.artifact, threads=self.threads)

    # --- What is run ---

    @cached_property
    def ids(self) -> Ids:
        """Tokens [B, S] to run: English where the model has a tokenizer."""
        count = _BATCH * _LENGTH
        try:
            found = load_tokenizer(self.artifact).encode(_PROMPT, add_special_tokens=False)
        except InputError:
            generator = np.random.default_rng(0)
            found = generator.integers(0, self.model.vocabulary_size, count).tolist()
        repeated = (found * (count // max(len(found), 1) + 1))[:count]
        return np.array(repeated, np.int64).reshape(_BATCH, _LENGTH)

    @property
    def feed(self) -> dict[str, Any]:
        """Every input of the graph by name, for one prefill of `ids`."""
        batch, length = self.ids.shape
        mask = np.ones_like(self.ids)
        return {
            "input_ids": self.ids,
            "attention_mask": mask,
            "position_ids": position_ids(mask, length),
            **self.model.empty_past(batch),
        }

    @cached_property
    def expected(self) -> tuple[Logits, Logits]:
        """Of `ids` by `fake_quant`, with and without rounding of activations and cache."""
        model, batch = self.fake_quant, len(self.ids)
        rounded, _ = model.step(self.ids, model.new_cache(batch))
        model.settings.is_quantizing = False
        plain, _ = model.step(self.ids, model.new_cache(batch))
        model.settings.is_quantizing = True
        return rounded, plain

    # --- What a stage needs ---

    def need_reference(self) -> Path:
        """The reference's directory.

        Raises:
            Skip: there is none.
        """
        if self.reference is None:
            raise Skip("no reference was given")
        return self.reference

    @property
    def has_llama_modules(self) -> bool:
        """Whether modules are named and computed as Llama's: what `FakeQuantModel` is written for.

        Other families are compared with a new export, see `quarot_onnx.validate.twin`.
        """
        return self.config.get("model_type") in LLAMA_MODULES

    def need_finite(self) -> None:
        """Nothing, for an artifact whose numbers can be compared.

        Raises:
            Skip: `check_finite` did not pass.
        """
        if not self.is_finite:
            raise Skip("weights or logits are not finite")

    def need_model(self) -> OnnxModel:
        """The graph, which runs and gives finite logits.

        Raises:
            Skip: `check_load` or `check_finite` did not pass.
        """
        if not self.is_loaded:
            raise Skip("the graph was not loaded")
        self.need_finite()
        return self.model
