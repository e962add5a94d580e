# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: the numbers, the rotation plan, the outliers before and after."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quarot_onnx.activations import SITES, Activation, Statistics
from quarot_onnx.artifacts import DATA, MODEL
from quarot_onnx.errors import InputError
from quarot_onnx.pages import (
    AFTER,
    BEFORE,
    INK,
    STYLE,
    inline,
    matplotlib,
    number,
    render,
    surface_figure,
    write_page,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_TEMPLATE = "report.html.jinja"
_TOKENS = 256  # of the sample that the figures show
_NEW_TOKENS = 64  # of the generated sample


# --- Content --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What the model is, from its configuration.

    Attributes:
        name: for a person.
        architecture: ``model_type``.
        parameters: how many.
        dtype: of the float parts of the export.
    """

    name: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    parameters: int
    dtype: str

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, name: str, parameters: int, dtype: str
    ) -> "ModelFacts":
        """The facts in a Hugging Face ``config.json``."""
        from quarot_onnx.export.architectures import dimensions  # noqa: PLC0415  # for this only

        sizes = dimensions(config)
        return cls(
            name=name,
            architecture=config["model_type"],
            layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.feed_forwards[0].size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            vocabulary_size=sizes.vocabulary_size,
            parameters=parameters,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Perplexity:
    """Perplexities on one text, and the command that printed them.

    Attributes:
        quantized: of the artifact.
        float32: of the Hugging Face model.
        unrotated: of the same bits without rotations.
        folded: of the same bits with norm scales folded and no rotation.
        decoded: of the artifact, token by token through its cache.
        text: what was read, such as ``32 windows of 256 tokens``.
        command: prints these numbers.
    """

    quantized: float
    float32: float | None = None
    unrotated: float | None = None
    folded: float | None = None
    decoded: float | None = None
    text: str = ""
    command: str = ""

    @property
    def damage_removed(self) -> float | None:
        """1 - log(quantized / float32) / log(unrotated / float32), where all are known."""
        if self.float32 is None or self.unrotated is None:
            return None
        damage = math.log(self.unrotated / self.float32)
        if not (0 < damage < math.inf and math.isfinite(self.quantized)):
            return None
        return 1 - math.log(self.quantized / self.float32) / damage


@dataclass(frozen=True)
class Size:
    """Bytes before and after.

    Attributes:
        before: unquantized, in bytes: weights in the export's float dtype, the cache in float32.
        after: as the artifact holds it, in bytes.
        bits_per_weight: of the linears of the layers, with their scales; for weights on disk.
        command: prints these numbers.
    """

    before: int
    after: int
    bits_per_weight: float | None = None
    command: str = ""

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.before / self.after


Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Stage:
    """One stage of the validation; `value` and `threshold` where it measures something."""

    name: str
    status: Status
    detail: str = ""
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Validation:
    """A validation run, and the command that made it."""

    stages: tuple[Stage, ...]
    command: str = ""

    def count(self, status: Status) -> int:
        """How many stages ended so."""
        return sum(stage.status == status for stage in self.stages)


@dataclass(frozen=True)
class Sample:
    """A text that the artifact generated, and the command that did it."""

    prompt: str
    completion: str
    command: str = ""


@dataclass(frozen=True)
class PassEntry:
    """What one pass did; an entry of the manifest's ``passes``."""

    name: str
    effect: str
    sites: int
    detail: str = ""
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    certificates: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> tuple["PassEntry", ...]:
        """The entries of a manifest, in order."""
        return tuple(cls(**entry) for entry in manifest["passes"])


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page; what is None or empty is left out.

    Attributes:
        title: of the page.
        model: the facts.
        recipe: its name.
        bits: of weights, activations and cache, such as ``W4A4KV4``.
        passes: from the manifest; the rotation plan is read off them.
        weights: all of them, before and after.
        cache: of one token in the cache of all layers, in float32 and as the artifact keeps it.
        activations: what `quarot_onnx.activations.capture` returned.
        activations_text: what was read for them, such as ``256 tokens of heldout.txt``.
        commands: (what it does, command line), to reproduce everything in order.
        timing: (what, seconds).
    """

    title: str
    model: ModelFacts
    recipe: str
    bits: str = "W4A4KV4"
    perplexity: Perplexity | None = None
    weights: Size | None = None
    cache: Size | None = None
    validation: Validation | None = None
    passes: tuple[PassEntry, ...] = ()
    activations: Mapping[str, Activation] | None = None
    activations_text: str = ""
    sample: Sample | None = None
    commands: tuple[tuple[str, str], ...] = ()
    timing: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class PlannedRotation:
    """One line of the rotation plan.

    Attributes:
        name: as in the field.
        where: what it turns.
        size: the dimension.
        runs: ``fused into weights``, ``online``, ``skipped`` or ``not in the recipe``.
        matrix: kind and factors.
        reason: why something was skipped.
    """

    name: str
    where: str
    size: int
    runs: str
    matrix: str = ""
    reason: str = ""


def rotation_plan(model: ModelFacts, passes: Sequence[PassEntry]) -> tuple[PlannedRotation, ...]:
    """Every rotation of QuaRot and what became of it."""
    done = {entry.name: entry for entry in passes}
    places = (
        ("R1", "residual stream", model.hidden_size, "FuseR1"),
        ("R2", "values, per head", model.head_dim, "FuseR2"),
        ("heads", "input of o_proj, across heads", model.num_heads, "InsertHeadsHadamard"),
        ("R3", "queries and keys, per head, after RoPE", model.head_dim, "InsertR3"),
        ("R4", "input of down_proj", model.intermediate_size, "InsertR4"),
    )
    plan = []
    for name, where, size, key in places:
        entry = done.get(key)
        if entry is None:
            plan.append(PlannedRotation(name, where, size, "not in the recipe"))
            continue
        runs = "fused into weights" if key.startswith("Fuse") else "online"
        plan.append(
            PlannedRotation(
                name,
                where,
                size,
                runs if entry.sites else "skipped",
                entry.detail,
                "; ".join(entry.skipped),
            )
        )
    return tuple(plan)


# --- The page -------------------------------------------------------------------------------------


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page.

    Raises:
        MissingDependencyError: Jinja2 or, for figures, Matplotlib is not installed.
        ResourceError: `path` cannot be written.
    """
    write_page(path, _render(content))


def report_artifact(
    path: Path,
    artifact: Path,
    reference: Path,
    text: str | Path,
    *,
    prompt: str = "",
    evaluation: Mapping[str, Any] | None = None,
    validation: Mapping[str, Any] | None = None,
) -> None:
    """Write the page of an artifact: captures activations and, given a prompt, generates.

    Args:
        path: the HTML file.
        artifact: a directory that ``quarot-onnx export`` wrote.
        reference: the Hugging Face directory it came from.
        text: a file or a data set; its first tokens are shown.
        prompt: what to continue; nothing is generated where it is empty.
        evaluation: what ``quarot-onnx eval --save-json`` wrote.
        validation: what ``quarot-onnx validate --save-json`` wrote.

    Raises:
        QuarotError: what reading the artifact, capturing, generating and writing raise.
    """
    from quarot_onnx.activations import capture  # noqa: PLC0415
    from quarot_onnx.export.checkpoint import Checkpoint  # noqa: PLC0415
    from quarot_onnx.forecast import FLOAT_BYTES, forecast  # noqa: PLC0415
    from quarot_onnx.inspection import inspect  # noqa: PLC0415
    from quarot_onnx.recipe import Recipe  # noqa: PLC0415
    from quarot_onnx.runtime import load_tokenizer  # noqa: PLC0415
    from quarot_onnx.texts import read  # noqa: PLC0415

    found = inspect(artifact)
    recipe, dtype = Recipe.model_validate(found.manifest["recipe"]), found.manifest["dtype"]
    checkpoint = Checkpoint(reference)
    planned = forecast(checkpoint, recipe, dtype)
    tokens = load_tokenizer(artifact).encode(read(text))[:_TOKENS]
    folder = reference.resolve()
    name = folder.parent.name if folder.name == "model" else folder.name
    bits = f"W{recipe.weights.bits}A{recipe.activations.bits}KV{recipe.kv_cache.bits}"
    linears = [row for row in found.linears if row.layer is not None]
    inspected = _command("inspect", artifact)
    measured = [*_evaluated(evaluation), "--text", text, "--reference", reference]
    content = ReportContent(
        title=f"{name} in {bits}",
        model=ModelFacts.from_config(
            checkpoint.config, name=name, parameters=planned.parameters, dtype=dtype
        ),
        recipe=recipe.name,
        bits=bits,
        perplexity=_perplexity(evaluation, _command("eval", artifact, *measured)),
        weights=Size(
            planned.parameters * FLOAT_BYTES[dtype],
            sum((artifact / file).stat().st_size for file in (MODEL, DATA)),
            8
            * sum(row.bytes for row in linears)
            / sum(row.in_features * row.out_features for row in linears),
            inspected,
        ),
        cache=Size(
            planned.float_cache_bytes_per_token, planned.cache_bytes_per_token, None, inspected
        ),
        validation=_validation(
            validation, _command("validate", artifact, "--reference", reference)
        ),
        passes=PassEntry.from_manifest(found.manifest),
        activations=capture(checkpoint, recipe, tokens),
        activations_text=f"the first {len(tokens)} tokens of {Path(text).name}",
        sample=_sample(artifact, prompt) if prompt else None,
        commands=(
            ("Export", _command("export", reference, artifact, "--recipe", recipe.name)),
            ("Validate", _command("validate", artifact, "--reference", reference)),
            ("Measure", _command("eval", artifact, *measured)),
            ("See what is inside", inspected),
        ),
    )
    write_report(path, content)


def _command(*words: object) -> str:
    return shlex.join(["quarot-onnx", *(str(word) for word in words)])


def _evaluated(evaluation: Mapping[str, Any] | None) -> list[object]:
    if evaluation is None:
        return []
    options: list[object] = ["--decode"] if "decode" in evaluation else []
    for key in ("windows", "window_length"):
        if key in evaluation:
            options += [f"--{key.replace('_', '-')}", evaluation[key]]
    return options


def _perplexity(evaluation: Mapping[str, Any] | None, command: str) -> Perplexity | None:
    if evaluation is None:
        return None
    try:
        baselines = evaluation.get("baselines") or {}
        return Perplexity(
            quantized=float(evaluation["perplexity"]),
            float32=baselines.get("fp32"),
            unrotated=baselines.get("unrotated"),
            folded=baselines.get("folded"),
            decoded=(evaluation.get("decode") or {}).get("perplexity"),
            text=f"{evaluation['windows']} windows of {evaluation['window_length']} tokens",
            command=command,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"evaluation: not what `quarot-onnx eval --save-json` writes ({error!r}); run it again"
        ) from error


def _validation(validation: Mapping[str, Any] | None, command: str) -> Validation | None:
    if validation is None:
        return None
    try:
        stages = tuple(
            Stage(
                str(stage["id"]),
                stage["status"],
                str(stage.get("detail") or ""),
                stage.get("value"),
                stage.get("threshold"),
            )
            for stage in validation["stages"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"validation: not what `quarot-onnx validate --save-json` writes ({error!r}); "
            "run it again"
        ) from error
    return Validation(stages, command)


def _sample(artifact: Path, prompt: str) -> Sample:
    from quarot_onnx.runtime import OnnxModel, eos_token_ids, load_tokenizer  # noqa: PLC0415
    from quarot_onnx.runtime.generation import generate  # noqa: PLC0415

    tokenizer = load_tokenizer(artifact)
    ids = generate(
        OnnxModel(artifact),
        tokenizer.encode(prompt),
        max_new_tokens=_NEW_TOKENS,
        eos_token_ids=eos_token_ids(artifact),
    )
    completion = "".join(tokenizer.stream(ids))
    return Sample(prompt, completion, _command("generate", artifact, "--prompt", prompt))


def _render(content: ReportContent) -> str:
    activations = content.activations or {}
    return render(
        _TEMPLATE,
        content=content,
        model=content.model,
        rotations=rotation_plan(content.model, content.passes),
        bars=_damage_bars(content.perplexity),
        surfaces=_surface_figures(activations),
        layers=_layer_figures(activations),
        total_seconds=sum(seconds for _, seconds in content.timing),
    )


@dataclass(frozen=True)
class _Bar:
    label: str
    perplexity: float
    damage: float
    percent: float
    kind: str


def _damage_bars(perplexity: Perplexity | None) -> list[_Bar]:
    """Log-perplexity above fp32, as bars relative to the longest."""
    if perplexity is None or perplexity.float32 is None:
        return []
    rows = [
        ("as it is, no rotation", perplexity.unrotated, "before"),
        ("norm scales folded, no rotation", perplexity.folded, "before"),
        ("rotated", perplexity.quantized, "after"),
    ]
    damages = [
        (label, value, math.log(value / perplexity.float32), kind)
        for label, value, kind in rows
        if value is not None and math.isfinite(value) and value > 0
    ]
    longest = max((damage for _, _, damage, _ in damages), default=0.0)
    if longest <= 0 or len(damages) < 2:
        return []
    return [
        _Bar(label, value, damage, max(0.0, 100 * damage / longest), kind)
        for label, value, damage, kind in damages
    ]


# --- Figures --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _SurfaceFigure:
    """One site of the drawn layer: two figures and what they say in numbers."""

    site: str
    layer: int
    before: "Markup"
    after: "Markup"
    peak_before: float
    peak_after: float
    statistics_before: Statistics
    statistics_after: Statistics


@dataclass(frozen=True)
class _LayerFigure:
    """One site through all layers."""

    site: str
    figure: "Markup"


def _surface_figures(activations: Mapping[str, Activation]) -> list[_SurfaceFigure]:
    found = []
    for site, activation in activations.items():
        for layer, surface in activation.surfaces.items():
            before, after = np.abs(surface.before), np.abs(surface.after)
            peaks = float(before.max()), float(after.max())
            limit = max(*peaks, 1e-30)
            pictures = {
                when: inline(
                    surface_figure(values, limit),
                    f"surface-{site}-{layer}-{when}",
                    f"Magnitude of the {SITES[site]} of layer {layer} by token and channel, "
                    f"{when} rotation; the largest is {number(float(values.max()), 3)}",
                )
                for when, values in (("before", before), ("after", after))
            }
            found.append(
                _SurfaceFigure(
                    site=SITES[site],
                    layer=layer,
                    before=pictures["before"],
                    after=pictures["after"],
                    peak_before=peaks[0],
                    peak_after=peaks[1],
                    statistics_before=activation.before[layer],
                    statistics_after=activation.after[layer],
                )
            )
    return found


def _layer_figures(activations: Mapping[str, Activation]) -> list[_LayerFigure]:
    if not activations:
        return []
    everything = [s for a in activations.values() for s in (*a.before, *a.after)]
    peak = max(s.max_over_rms for s in everything)
    finite = [s.snr_db for s in everything if math.isfinite(s.snr_db)] or [0.0]
    limits = (min(0.0, *finite), max(finite) * 1.08)
    return [
        _LayerFigure(
            SITES[site],
            inline(
                _layer_figure(activation, peak * 1.15, limits),
                f"layers-{site}",
                f"The {SITES[site]} by layer, before and after rotation: max/rms from "
                f"{number(_mean_of(activation.before, 'max_over_rms'), 3)} to "
                f"{number(_mean_of(activation.after, 'max_over_rms'), 3)} on average",
            ),
        )
        for site, activation in activations.items()
    ]


def _mean_of(entries: Sequence[Any], name: str) -> float:
    return float(np.mean([getattr(entry, name) for entry in entries]))


def _layer_figure(activation: Activation, peak: float, limits: tuple[float, float]) -> "Figure":
    mpl = matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415

    layers = range(len(activation.before))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 3.5))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
        figure.subplots_adjust(left=0.15, right=0.98, top=0.93, bottom=0.11, hspace=0.3)
        for axes, name in ((above, "max_over_rms"), (below, "snr_db")):
            for entries, colour in ((activation.before, BEFORE), (activation.after, AFTER)):
                values = [getattr(entry, name) for entry in entries]
                axes.plot(layers, values, color=colour, marker="o", markersize=3.2, clip_on=False)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        above.axhline(
            _gaussian_peak(activation.group_size), color=INK, linewidth=0.9, linestyle=(0, (3, 3))
        )
        above.set_yscale("log", base=2)
        above.set_ylim(1, peak)
        above.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        above.minorticks_off()
        above.set_title("max / rms", loc="left", fontsize=8.5)
        below.set_ylim(*limits)
        below.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
        below.set_title("4-bit SNR, dB", loc="left", fontsize=8.5)
        below.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
        below.set_xlabel("layer")
        margin = 0.5 if len(layers) == 1 else 0.04 * (len(layers) - 1)
        below.set_xlim(-margin, len(layers) - 1 + margin)
    return figure


def _gaussian_peak(channels: int) -> float:
    """The median of max|x| over `channels` standard normal numbers."""
    return statistics.NormalDist().inv_cdf((1 + 0.5 ** (1 / channels)) / 2)
