# SPDX-License-Identifier: Apache-2.0
"""The PyTorch side: what the exported graph is judged by.

`HuggingFaceModel` is the original in float32. `FakeQuantModel` is the function that the artifact's
graph should compute: Hugging Face's own modules with the artifact's initializers as weights, the
online Hadamards of its recipe, and plain fake quantization of activations and cache. It shares the
codes with the artifact and nothing of the graph or of the operators, so a difference between the
two is a wrong graph or a wrong operator. Whether the codes belong to the model is another question,
which `quarot_onnx.validate` answers by comparing weights.

Both are `quarot_onnx.runtime.CausalModel`s.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import eager_mask

from quarot_onnx.artifacts import MANIFEST, MODEL, load_manifest
from quarot_onnx.errors import InputError, UnsupportedModelError
from quarot_onnx.export.architectures import LLAMA_MODULES, dimensions, load_config
from quarot_onnx.export.checkpoint import Checkpoint, read_json
from quarot_onnx.hadamard import Plan, plan
from quarot_onnx.recipe import Recipe
from quarot_onnx.rounding import Rounding, roundings_of
from quarot_onnx.runtime import Cache, Ids, Logits, checked_mask, position_ids
from quarot_onnx.transforms import Transforms, inverse
from quarot_onnx.weights import Float64

ATTENTION_NAME = "quarot_fake_quant"
_FLOAT_BITS = 16
_EXACT_FLOAT32 = 1 << 24  # every integer up to here is a float32


# --- A Hugging Face module as a CausalModel -------------------------------------------------------


class TorchModel:
    """A Hugging Face causal model in float32 on the CPU, as a `quarot_onnx.runtime.CausalModel`.

    Attributes:
        model: the module.
        config: its configuration.
    """

    def __init__(self, model: Any, *, threads: int | None = None) -> None:
        self.model = model
        self.config = model.config
        self._threads = threads

    @property
    def vocabulary_size(self) -> int:
        """How many logits there are for a token."""
        return int(self.config.vocab_size)

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` rows: name -> tensor [batch, kv_heads, 0, head_dim]."""
        heads, size = _cache_shape(self.config)
        return {
            f"past_key_values.{index}.{kind}": torch.empty(batch, heads, 0, size)
            for index in range(self.config.num_hidden_layers)
            for kind in ("key", "value")
        }

    def step(
        self, input_ids: Ids, cache: Cache, attention_mask: Ids | None = None
    ) -> tuple[Logits, Cache]:
        """Logits [B, S, vocabulary] of `input_ids` [B, S], and the cache with them appended.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        past = next(iter(cache.values())).shape[2]
        mask = checked_mask(input_ids, past, attention_mask, self.vocabulary_size)
        held = DynamicCache()  # without a config: sliding layers keep every token, the mask slides
        held.layers = [
            _layer(cache[f"past_key_values.{i}.key"], cache[f"past_key_values.{i}.value"])
            for i in range(self.config.num_hidden_layers)
        ]
        with torch.inference_mode(), _limited_threads(self._threads):
            output = self.model(
                input_ids=torch.from_numpy(np.ascontiguousarray(input_ids, dtype=np.int64)),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(position_ids(mask, input_ids.shape[1])),
                past_key_values=held,
                use_cache=True,
            )
        present: Cache = {}
        for index, layer in enumerate(held.layers):
            present[f"past_key_values.{index}.key"] = layer.keys  # type: ignore[union-attr]
            present[f"past_key_values.{index}.value"] = layer.values  # type: ignore[union-attr]
        return output.logits.float().numpy(), present


def _cache_shape(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(size)


def _layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()  # type: ignore[no-untyped-call]
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    return layer


@contextmanager
def _limited_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class HuggingFaceModel(TorchModel):
    """The original model in float32 with eager attention."""

    def __init__(self, model_dir: Path, *, threads: int | None = None) -> None:
        """Load `model_dir`.

        Raises:
            InputError: a weight is missing, damaged or not finite.
            UnsupportedModelError: an architecture that cannot be exported either.
        """
        checkpoint = Checkpoint(model_dir)
        config = load_config(model_dir, checkpoint.config)
        with _quiet_transformers():
            try:
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    model_dir,
                    config=config,
                    dtype=torch.float32,
                    attn_implementation="eager",
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            except (OSError, ValueError, RuntimeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise InputError(
                    f"{model_dir}: transformers cannot load it ({reason}); download it again"
                ) from error
        model, loading = loaded
        missing = sorted(loading["missing_keys"])
        if missing:
            raise InputError(
                f"{model_dir}: tensor {missing[0]} is missing from the weights ({len(missing)} in "
                "all); download the model again"
            )
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise InputError(
                    f"{model_dir}: tensor {name} has values that are not finite; "
                    "download it again or repair the model"
                )
        super().__init__(model.eval(), threads=threads)

    def states(self, input_ids: Ids) -> tuple[list[NDArray[np.float32]], Logits]:
        """The residual stream [B, S, hidden_size] around each layer, first to last, and the logits.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        depth = self.config.num_hidden_layers
        lists = (m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        layers = next(m for m in lists if len(m) == depth)  # the outermost, so never the experts
        states: list[NDArray[np.float32]] = []
        hooks = [layers[0].register_forward_pre_hook(_recording_input(states), with_kwargs=True)]
        hooks += [layer.register_forward_hook(_recording(states)) for layer in layers]
        try:
            logits, _ = self.step(input_ids, self.new_cache(len(input_ids)))
        finally:
            for hook in hooks:
                hook.remove()
        return states, logits


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without progress bars and load reports: what is wrong is said in our own words."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- Fake quantization, written from the paper ----------------------------------------------------


@dataclass
class Settings:
    """What the modules of one `FakeQuantModel` do.

    Attributes:
        recipe: rotations and bits.
        is_quantizing: whether activations and cache are rounded; off, the model shows how far the
            rounding alone moves the logits.
    """

    recipe: Recipe
    is_quantizing: bool = True


@dataclass(frozen=True)
class OnlineHadamard:
    """``[x, 0] (I ⊗ A ⊗ B ⊗ I_inner)`` on the last axis with `zeros` zeros, in float32."""

    A: torch.Tensor
    B: torch.Tensor
    inner: int = 1
    zeros: int = 0

    @classmethod
    def of(cls, plan: Plan, inner: int = 1) -> "OnlineHadamard":
        """The one that `plan` describes."""
        a, b = (torch.from_numpy(matrix).float() for matrix in plan.matrices())
        return cls(a, b, inner, plan.padded_size - plan.size)

    @classmethod
    def given(cls, A: Float64, B: Float64 | None = None, inner: int = 1) -> "OnlineHadamard":
        """One of other matrices, which need not be orthogonal: ``A ⊗ B ⊗ I_inner``."""
        b = np.ones((1, 1)) if B is None else B
        return cls(torch.from_numpy(A).float(), torch.from_numpy(b).float(), inner)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The rotated x [..., n]; n + zeros is a multiple of the matrix's order."""
        x = torch.nn.functional.pad(x, (0, self.zeros)) if self.zeros else x
        folded = x.reshape(*x.shape[:-1], -1, len(self.A), len(self.B), self.inner)
        by_b = torch.einsum("...abi,bd->...adi", folded, self.B)
        return torch.einsum("...adi,ac->...cdi", by_b, self.A).reshape(x.shape)


def _rounded(x: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes without their zero point [..., groups, size] and their step [..., groups, 1].

    x [..., features] is cut into groups of `rounding.group_size`.
    """
    x = x.reshape(*x.shape[:-1], -1, rounding.group_size)
    if rounding.symmetric:
        top = 2 ** (rounding.bits - 1) - 1
        span, bottom, zero = x.abs().amax(dim=-1, keepdim=True), -top - 1, torch.zeros(())
    else:
        top, bottom = 2**rounding.bits - 1, 0
        low = x.amin(dim=-1, keepdim=True).clamp(max=0)
        span = x.amax(dim=-1, keepdim=True).clamp(min=0) - low
    step = span * (rounding.clip_ratio / top)
    step = torch.where(step == 0, torch.ones_like(step), step)
    if not rounding.symmetric:
        zero = torch.round(-low * rounding.clip_ratio / step)
    return torch.clamp(torch.round(x / step) + zero, bottom, top) - zero, step


class CodeLinear(torch.nn.Module):
    """A linear over integer codes: rotate online, quantize, multiply exactly, scale.

    Args:
        weight: codes without their zero points, or floats where `scale` is None; [out, in].
        scale: of each output [out], or of groups of its inputs [groups, out].
        bias: [out] or None.
        rotate: in front, or None.
        rounding: of the input, or None.
        settings: shared by the model.
        outliers: input features that stay float [n], and their weights [out, n]; or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        rotate: OnlineHadamard | None,
        rounding: Rounding | None,
        settings: Settings,
        outliers: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias
        self.outliers = outliers
        self.rotate = rotate
        self.rounding = rounding
        self.settings = settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y [..., out] of x [..., in]."""
        if self.rotate is not None:
            x = self.rotate(x)
        beside = self.bias
        if self.outliers is not None:
            features, weight = self.outliers
            outlying = functional.linear(x[..., features], weight)
            beside = outlying if beside is None else outlying + beside
            x = x.index_fill(-1, features, 0.0)
        if self.rounding is not None and self.settings.is_quantizing:
            y = self._product(*_rounded(x, self.rounding), self.rounding)
        elif self.scale is not None and self.scale.dim() == 2:
            y = functional.linear(x, self.weight * self._by_part(self.weight.shape[1]).T)
        else:
            y = functional.linear(x, self.weight)
        if self.scale is not None and self.scale.dim() == 1:
            y = y * self.scale
        return y if beside is None else y + beside

    def _by_part(self, parts: int) -> torch.Tensor:
        """The scales [groups, out] for each of `parts` equal parts of the inputs; [parts, out]."""
        assert self.scale is not None
        return self.scale.repeat_interleave(parts // len(self.scale), dim=0)

    def _product(self, codes: torch.Tensor, step: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        """Codes [..., groups, size] with their step [..., groups, 1] -> [..., out].

        Parts that have one scale of the weight and one step are summed exactly.
        """
        is_grouped = self.scale is not None and self.scale.dim() == 2
        out_features, in_features = self.weight.shape
        of_weight = in_features // len(self.scale) if is_grouped else in_features  # type: ignore[arg-type]
        size = math.gcd(rounding.group_size, of_weight)
        largest = 2 ** (rounding.bits + self.settings.recipe.weights.most_bits) * size
        exact = torch.float32 if largest < _EXACT_FLOAT32 else torch.float64
        weight = self.weight.to(exact).reshape(out_features, -1, size)
        parts = codes.to(exact).reshape(*codes.shape[:-2], -1, size)
        sums = torch.einsum("...gi,ogi->...go", parts, weight).float()
        sums = sums * step.repeat_interleave(rounding.group_size // size, dim=-2)
        return (sums * self._by_part(in_features // size) if is_grouped else sums).sum(dim=-2)


def _quantize_cache(x: torch.Tensor, rounding: Rounding | None) -> torch.Tensor:
    """Keys or values [B, H, T, D], rounded; as they are where None."""
    if rounding is None:
        return x
    codes, step = _rounded(x, rounding)
    return (codes * step).flatten(-2)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a rounded cache: q [B, Hq, S, D], k and v [B, H, T, D] -> [B, S, Hq, D].

    The cache holds floats and is rounded at every step: a token is rounded by itself, so the result
    is that of rounding it once.
    """
    assert attention_mask is not None, "no mask: the reference would not be causal"
    settings: Settings = module.quarot_settings  # type: ignore[assignment]
    r3: tuple[OnlineHadamard, OnlineHadamard] | None = module.quarot_r3  # type: ignore[assignment]
    if r3 is not None:
        query, key = r3[0](query), r3[1](key)
    if settings.is_quantizing:
        roundings: dict[str, Rounding | None] = module.quarot_roundings  # type: ignore[assignment]
        key = _quantize_cache(key, roundings["key"])
        value = _quantize_cache(value, roundings["value"])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(2, 3) + attention_mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None


class FakeQuantModel(TorchModel):
    """What the graph of `artifact` should compute, in plain PyTorch float32.

    Attributes:
        settings: shared by all modules.
    """

    def __init__(self, artifact: Path, *, threads: int | None = None) -> None:
        """Build Hugging Face's modules around the artifact's weights.

        Raises:
            InputError: not an artifact, or an initializer is missing or has another shape than
                config.json implies.
            UnsupportedModelError: config.json is of an unknown architecture.
        """
        manifest = load_manifest(artifact)
        raw = read_json(artifact / "config.json")
        if not isinstance(raw, dict) or "model_type" not in raw:
            raise InputError(f"{artifact / 'config.json'}: has no model_type; export again")
        config = load_config(artifact, raw)
        if config.model_type not in LLAMA_MODULES:
            raise UnsupportedModelError(
                f"{artifact}: a PyTorch model of its codes is written for "
                f"{', '.join(LLAMA_MODULES)}, not for {config.model_type}; validate a rotate-only "
                "export"
            )
        self.settings = Settings(Recipe.model_validate(manifest["recipe"]))
        transformers.AttentionInterface.register(ATTENTION_NAME, _attend)
        transformers.AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)
        config.tie_word_embeddings = False
        config.dtype = torch.float32
        config._attn_implementation = ATTENTION_NAME
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        rotary = type(model.model.rotary_emb)(config=config)  # its tables are computed, not stored
        model.model.rotary_emb = rotary
        roundings = {
            name.strip("/").replace("/", "."): rounding
            for name, rounding in roundings_of(manifest).items()
        }
        _fill(model, read_initializers(artifact), self.settings, roundings, artifact)
        super().__init__(model.eval(), threads=threads)

    def embed(self, input_ids: Ids) -> NDArray[np.float32]:
        """The residual stream [B, S, hidden_size] before the first layer."""
        with torch.inference_mode():
            embedded: NDArray[np.float32] = self.model.model.embed_tokens(
                torch.from_numpy(input_ids)
            ).numpy()
        return embedded

    def forced(
        self, input_ids: Ids, states: Sequence[NDArray[Any]]
    ) -> tuple[list[NDArray[np.float32]], Logits]:
        """Each layer's output for the residual state that another implementation gave it.

        Errors of one layer do not reach the next: a code that rounds the other way stays there.

        Args:
            input_ids: [B, S].
            states: the residual stream [B, S, hidden_size] before each layer, and before the last
                norm: num_hidden_layers + 1 of them.

        Returns:
            The residual stream after each layer, and the logits.
        """
        layers = [*self.model.model.layers, self.model.model.norm]
        outputs: list[NDArray[np.float32]] = []
        hooks = [
            layer.register_forward_pre_hook(_replacing(state), with_kwargs=True)
            for layer, state in zip(layers, states, strict=True)
        ]
        hooks += [layer.register_forward_hook(_recording(outputs)) for layer in layers[:-1]]
        try:
            logits, _ = self.step(input_ids, self.new_cache(len(input_ids)))
        finally:
            for hook in hooks:
                hook.remove()
        return outputs, logits


def _replacing(state: NDArray[Any]) -> Any:
    tensor = torch.from_numpy(np.ascontiguousarray(state, dtype=np.float32))

    def hook(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return (tensor, *arguments[1:]), keywords

    return hook


def _recording(outputs: list[NDArray[np.float32]]) -> Any:
    def hook(_: Any, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        outputs.append(tensor.numpy().copy())

    return hook


def _recording_input(states: list[NDArray[np.float32]]) -> Any:
    def hook(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensor = arguments[0] if arguments else keywords["hidden_states"]
        states.append(tensor.numpy().copy())

    return hook


def read_initializers(artifact: Path) -> Mapping[str, ir.TensorProtocol]:
    """The initializers of an artifact's graph by name; external ones are read when used.

    Raises:
        InputError: ``model.onnx`` cannot be parsed.
    """
    model = load_graph(artifact)
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def load_graph(artifact: Path) -> ir.Model:
    """The graph of an artifact; its external data stays on disk.

    Raises:
        InputError: ``model.onnx`` cannot be parsed.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415

    path = artifact / MODEL
    try:
        return ir.load(path)
    except (OSError, DecodeError, ValueError, ir.serde.SerdeError) as error:
        raise InputError(f"{path}: is damaged ({type(error).__name__}); export again") from error


def _tensor(
    initializers: Mapping[str, ir.TensorProtocol], name: str, artifact: Path
) -> torch.Tensor:
    if name not in initializers:
        raise InputError(f"{artifact / MODEL}: no initializer {name}; export again")
    return torch.from_numpy(initializers[name].numpy().astype(np.float32))


_READERS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)  # of the first and of the second norm of a layer


def outlier_features(
    initializers: Mapping[str, ir.TensorProtocol], module: str
) -> NDArray[np.int64] | None:
    """The input features of linear `module` that stay float; None where all are codes.

    The graph names them after the first of the linears that read the same input.
    """
    if f"{module}.weight_outliers" not in initializers:
        return None
    root, layers, index, reader = module.split(".", 3)
    for first in next((readers for readers in _READERS if reader in readers), (reader,)):
        at = f"/{root}/{layers}.{index}/{first.replace('.', '/')}"
        held = initializers.get(f"{at}/outliers.features")
        if held is not None:
            features: NDArray[np.int64] = np.array(held.numpy())
            return features
    return None


def _outliers(
    initializers: Mapping[str, ir.TensorProtocol], module: str, artifact: Path
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of linear `module`: the features that stay float and their weights [out, features]."""
    features = outlier_features(initializers, module)
    if features is None:
        return None
    weight = _tensor(initializers, f"{module}.weight_outliers", artifact)
    return torch.from_numpy(features), weight.T.contiguous()


def _in_front_of_linears(
    recipe: Recipe, config: Any, given: Transforms
) -> dict[str, OnlineHadamard]:
    """By the linear's module: the recipe's Hadamards, or the matrices that stand in their place."""
    heads, size = config.num_attention_heads, _cache_shape(config)[1]
    across = plan(heads, policy="full")
    r4 = plan(config.intermediate_size, policy=recipe.rotations.r4_policy)
    online: dict[str, OnlineHadamard] = {}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        if (matrix := given.heads(index)) is not None:
            online[f"{layer}.self_attn.o_proj"] = OnlineHadamard.given(matrix, inner=size)
        elif recipe.rotations.heads and across.kind == "full":
            online[f"{layer}.self_attn.o_proj"] = OnlineHadamard.of(across, inner=size)
        for which, readers in enumerate(_READERS):
            if (factors := given.inputs(index, which)) is not None:
                turn = OnlineHadamard.given(*factors)
                online |= dict.fromkeys((f"{layer}.{reader}" for reader in readers), turn)
        if (factors := given.down(index)) is not None:
            online[f"{layer}.mlp.down_proj"] = OnlineHadamard.given(*factors)
        elif recipe.rotations.r4 and r4.kind != "none":
            online[f"{layer}.mlp.down_proj"] = OnlineHadamard.of(r4)
    return online


def _recorded(
    roundings: Mapping[str, Rounding], site: str, setting: str, bits: int, artifact: Path
) -> Rounding | None:
    """How `site` is rounded; None where `setting` of the recipe leaves it float.

    Raises:
        InputError: the recipe rounds it and no pass records how.
    """
    if bits == _FLOAT_BITS:
        return None
    if site not in roundings:
        raise InputError(
            f"{artifact / MANIFEST}: no pass records how {site} is rounded, at {setting} = {bits}; "
            "export again"
        )
    return roundings[site]


def _fill(
    model: Any,
    initializers: Mapping[str, ir.TensorProtocol],
    settings: Settings,
    roundings: Mapping[str, Rounding],
    artifact: Path,
) -> None:
    """Put the artifact's weights and the recipe's online Hadamards into `model`."""
    given = Transforms.of_artifact(artifact, dimensions(model.config.to_dict()))
    online = _in_front_of_linears(settings.recipe, model.config, given)
    bits = settings.recipe.activations.bits
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            linear = _code_linear(
                module,
                name,
                initializers,
                online.get(name),
                _recorded(roundings, name, "activations.bits", bits, artifact),
                settings,
                artifact,
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    for index, layer in enumerate(model.model.layers):
        _set_attention(layer.self_attn, index, settings, given, roundings, artifact)
    for name, parameter in list(model.named_parameters()):
        value = _tensor(initializers, name, artifact)
        if name == "lm_head.weight":
            value = value.T.contiguous()
        if value.shape != parameter.shape:
            raise InputError(
                f"{artifact / MODEL}: initializer {name} has shape {list(value.shape)} where "
                f"config.json implies {list(parameter.shape)}; export again"
            )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, torch.nn.Parameter(value, requires_grad=False))


def _code_linear(
    module: torch.nn.Linear,
    name: str,
    initializers: Mapping[str, ir.TensorProtocol],
    rotate: OnlineHadamard | None,
    rounding: Rounding | None,
    settings: Settings,
    artifact: Path,
) -> CodeLinear:
    """What takes the place of the linear `name`."""
    weight = f"{name}.weight"
    scale = f"{weight}_scale" if f"{weight}_scale" in initializers else None
    codes = _tensor(initializers, weight, artifact)
    if f"{weight}_zero" in initializers:
        zero = _tensor(initializers, f"{weight}_zero", artifact)
        codes = (codes.reshape(len(zero), -1, zero.shape[1]) - zero[:, None]).flatten(0, 1)
    out_features, in_features = module.weight.shape
    in_features += 0 if rotate is None else rotate.zeros
    if tuple(codes.shape) != (in_features, out_features):
        raise InputError(
            f"{artifact / MODEL}: initializer {weight} has shape {list(codes.shape)} where "
            f"config.json implies {[in_features, out_features]}; export again"
        )
    return CodeLinear(
        codes.T.contiguous(),
        None if scale is None else _tensor(initializers, scale, artifact),
        None if module.bias is None else _tensor(initializers, f"{name}.bias", artifact),
        rotate,
        rounding,
        settings,
        _outliers(initializers, name, artifact),
    )


def _set_attention(
    attention: Any,
    index: int,
    settings: Settings,
    given: Transforms,
    roundings: Mapping[str, Rounding],
    artifact: Path,
) -> None:
    """Tell the attention of layer `index` what it does to keys, queries and the cache."""
    attention.quarot_settings, attention.quarot_r3 = settings, None
    site, bits = f"model.layers.{index}.self_attn.cached_", settings.recipe.kv_cache.bits
    attention.quarot_roundings = {
        kind: _recorded(roundings, f"{site}{kind}", "kv_cache.bits", bits, artifact)
        for kind in ("key", "value")
    }
    r3 = plan(attention.head_dim)
    if (matrix := given.key(index)) is not None:
        turns = inverse(matrix).T, matrix
        attention.quarot_r3 = tuple(OnlineHadamard.given(turn) for turn in turns)
    elif settings.recipe.rotations.r3 and r3.kind != "none":
        attention.quarot_r3 = (OnlineHadamard.of(r3),) * 2
