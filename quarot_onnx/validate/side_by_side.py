# SPDX-License-Identifier: Apache-2.0
"""Stage ``outputs``: PyTorch, ONNX Runtime and TensorRT side by side, by Polygraphy's comparator.

Every host runs the same tokens twice: ``logits`` is one prefill, ``logits_decode`` the same last
tokens one at a time through the host's own cache. The first host is the judge: PyTorch with the
artifact's codes, or Hugging Face where the recipe rounds nothing.

A file of tolerances, given with ``--tolerances``, holds one table per output (a shell pattern)::

    [logits]
    atol = 0.05             # absolute, and relative to the judge; both default to 0
    rtol = 0.0
    stat = "mean"           # of the errors: elemwise, max, mean, median; mean where not given

It must name every output. Without a file an output passes where its mean error is at most one and a
half times what rounding itself moves it, see `check_outputs`.
"""

import time
import tomllib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, TypeAdapter, ValidationError

from quarot_onnx.errors import InputError
from quarot_onnx.runtime import CausalModel, Ids
from quarot_onnx.validate.subject import Subject
from quarot_onnx.validate.verdict import Finding, Skip

OUTPUTS = ("logits", "logits_decode")
"""What is compared."""

_DECODED = 4  # tokens of each row that also go one at a time


class Tolerance(BaseModel):
    """How far one output may be from the judge's, in Polygraphy's terms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    atol: NonNegativeFloat = 0.0
    rtol: NonNegativeFloat = 0.0
    stat: Literal["elemwise", "max", "mean", "median"] = "mean"


def load_tolerances(path: Path) -> dict[str, Tolerance]:
    """The tolerance of every output in `OUTPUTS`, from the first pattern in `path` that fits it.

    Raises:
        InputError: the file is no such TOML, or an output fits no pattern.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        patterns = TypeAdapter(dict[str, Tolerance]).validate_python(content)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error}); see --tolerances") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {where}: {first['msg']}; a table has atol, rtol and stat"
        ) from error
    found: dict[str, Tolerance] = {}
    for output in OUTPUTS:
        fits = [tolerance for name, tolerance in patterns.items() if fnmatchcase(output, name)]
        if not fits:
            raise InputError(f"{path}: no table for output {output}; add [{output}]")
        found[output] = fits[0]
    return found


@dataclass(frozen=True)
class _Measured:
    """One output of one host: mean |difference| to the judge's, and Polygraphy's verdict."""

    host: str
    output: str
    error: float
    passed: bool


class CausalRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy is untyped
    """Any `CausalModel` as a Polygraphy runner with the outputs of `OUTPUTS`."""

    def __init__(self, model: CausalModel, name: str) -> None:
        super().__init__(name=name)
        self._model = model

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Token ids."""
        return TensorMetadata().add("input_ids", dtype=np.int64, shape=(None, None))

    def infer_impl(self, feed_dict: dict[str, Any]) -> "OrderedDict[str, NDArray[np.float32]]":
        """``logits`` [B, S, V] of all tokens, and of the last ones after a prefill of the rest."""
        start = time.perf_counter()
        outputs = run_twice(self._model, feed_dict["input_ids"])
        self.inference_time = time.perf_counter() - start
        return OrderedDict(outputs)


def run_twice(model: CausalModel, ids: Ids) -> dict[str, NDArray[np.float32]]:
    """The outputs of `OUTPUTS` for `ids` [B, S]."""
    logits, _ = model.step(ids, model.new_cache(len(ids)))
    split = ids.shape[1] - _DECODED
    _, cache = model.step(ids[:, :split], model.new_cache(len(ids)))
    decoded = []
    for position in range(split, ids.shape[1]):
        step, cache = model.step(ids[:, position : position + 1], cache)
        decoded.append(step)
    return {"logits": logits, "logits_decode": np.concatenate(decoded, axis=1)}


def check_outputs(subject: Subject) -> Finding:
    """Fails on a host whose logits, by prefill or through its cache, leave the judge's.

    Two correct hosts differ in codes that fall on a tie, which can add up to the distance of two
    roundings: sqrt(2) times what rounding itself does, which the judge measures by leaving it out.
    """
    hosts = _hosts(subject)
    names = [name for name, _ in hosts]
    if len(hosts) < 2:
        raise Skip(f"only {names[0]} can run it, so there is nothing to compare")
    tolerances = subject.tolerances or _derived(subject)
    measured: list[_Measured] = []
    comparison = SimpleCompareFunc(
        atol={name: tolerance.atol for name, tolerance in tolerances.items()},
        rtol={name: tolerance.rtol for name, tolerance in tolerances.items()},
        check_error_stat={name: tolerance.stat for name, tolerance in tolerances.items()},
    )

    def compare(found: Any, judge: Any) -> "OrderedDict[str, bool]":
        verdicts = comparison(found, judge)
        passed = OrderedDict((output, bool(verdicts.get(output))) for output in OUTPUTS)
        for output in OUTPUTS:
            error = float(np.abs(found[output] - judge[output]).mean())
            measured.append(_Measured(found.runner_name, output, error, passed[output]))
        return passed

    runners = [CausalRunner(model, name) for name, model in hosts]
    pairs = [(index, 0) for index in range(1, len(hosts))]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[{"input_ids": subject.ids}])
        passed = Comparator.compare_accuracy(results, compare_func=compare, comparisons=pairs)
    has_passed = bool(passed) and len(measured) == len(pairs) * len(OUTPUTS)
    refused = [m for m in measured if not m.passed]
    worst = max(refused or measured, key=lambda m: m.error)
    allowed = tolerances[worst.output]
    detail = (
        f"{' | '.join(names)}: {worst.output} of {worst.host} is {worst.error:.2g} from "
        f"{names[0]}'s in the mean; allowed: {allowed.stat} within {allowed.atol:.2g} + "
        f"{allowed.rtol:.2g} |x|"
    )
    threshold = allowed.atol if allowed.stat == "mean" and not allowed.rtol else None
    return Finding("mean |difference| of logits", worst.error, threshold, detail, has_passed)


def _hosts(subject: Subject) -> list[tuple[str, CausalModel]]:
    """What runs the artifact, the judge first."""
    model = subject.need_model()
    judge = _judge(subject)
    hosts: list[tuple[str, CausalModel]] = [] if judge is None else [("PyTorch", judge)]
    hosts.append((subject.runtime, model))
    with suppress(Skip, InputError):  # stage trt says why
        hosts.append(("tensorrt", subject.engine_model))
    return hosts


def _judge(subject: Subject) -> CausalModel | None:
    """PyTorch, where it computes what the graph should compute."""
    try:
        return subject.fake_quant
    except Skip:
        is_exact = not subject.recipe.is_lossy and subject.reference is not None
        return subject.judge if is_exact else None


def _derived(subject: Subject) -> dict[str, Tolerance]:
    """What `check_outputs` allows where no file says it."""
    judge = _judge(subject)
    if judge is None:
        raise Skip("PyTorch cannot judge this family; give --tolerances")
    rounded = run_twice(judge, subject.ids)
    noise = dict.fromkeys(OUTPUTS, 0.0)
    if subject.recipe.is_lossy:
        settings = subject.fake_quant.settings
        settings.is_quantizing = False
        plain = run_twice(judge, subject.ids)
        settings.is_quantizing = True
        noise = {name: float(np.abs(rounded[name] - plain[name]).mean()) for name in OUTPUTS}
    return {
        name: Tolerance(
            atol=max(subject.tolerance * float(np.abs(rounded[name]).max()), 1.5 * noise[name])
        )
        for name in OUTPUTS
    }
