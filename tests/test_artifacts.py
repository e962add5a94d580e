# SPDX-License-Identifier: Apache-2.0
"""Artifacts appear whole or not at all, and say what is in them."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quarot_onnx import artifacts
from quarot_onnx.artifacts import (
    changed_files,
    load_manifest,
    publish,
    require_space,
    save_manifest,
    save_model,
)
from quarot_onnx.errors import InputError, ResourceError, UsageError
from quarot_onnx.quantizers.rtn import rtn
from quarot_onnx.weights import ArraySource, QuantizedWeight, Weight


def _publish(target: Path, *, force: bool = False, name: str = "new.txt") -> None:
    with publish(target, force=force) as staging:
        (staging / name).write_text("new")
        save_manifest(staging, {})


def _listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- Publishing -----------------------------------------------------------------------------------


def test_a_directory_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with publish(target) as staging:
        assert staging.parent == target.parent  # one rename, on one disk
        (staging / "file").write_text("content")
        assert not target.exists()
    assert _listing(target) == ["file"]
    assert _listing(target.parent) == ["out"]


def test_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _publish(tmp_path / "out")
    assert _listing(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [InputError("x: y; z"), KeyboardInterrupt(), RuntimeError()])
def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path, error: BaseException) -> None:
    def fill() -> None:
        with publish(tmp_path / "out") as staging:
            (staging / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fill()
    assert _listing(tmp_path) == []


def test_an_artifact_survives_a_failed_replacement(tmp_path: Path) -> None:
    _publish(tmp_path / "out")
    with pytest.raises(RuntimeError), publish(tmp_path / "out", force=True):
        raise RuntimeError
    assert _listing(tmp_path) == ["out"]
    assert changed_files(tmp_path / "out", load_manifest(tmp_path / "out")) == []


def test_an_artifact_survives_a_rename_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match="cannot be written"):
        _publish(tmp_path / "out", force=True, name="other.txt")
    assert _listing(tmp_path) == ["out"]
    assert "new.txt" in _listing(tmp_path / "out")


def test_force_replaces_an_artifact(tmp_path: Path) -> None:
    _publish(tmp_path / "out", name="old.txt")
    _publish(tmp_path / "out", force=True)
    assert _listing(tmp_path) == ["out"]
    assert _listing(tmp_path / "out") == ["manifest.json", "new.txt"]


def test_refuses_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    _publish(tmp_path / "out", name="old.txt")
    with pytest.raises(UsageError) as caught:
        _publish(tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out: exists and is not empty; choose another or add --force"
    )
    assert _listing(tmp_path / "out") == ["manifest.json", "old.txt"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_force_does_not_replace_what_is_not_ours(tmp_path: Path, kind) -> None:
    target = tmp_path / "precious"
    if kind == "directory":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.write_text("years of work")
    with pytest.raises(UsageError) as caught:
        _publish(target, force=True)
    assert str(caught.value) == (
        f"{target}: is not an artifact of quarot-onnx, so --force does not replace it; "
        "choose another directory"
    )
    kept = target / "thesis.tex" if kind == "directory" else target
    assert kept.read_text() == "years of work"
    assert _listing(tmp_path) == ["precious"]


def test_the_working_directory_and_a_link_may_be_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    _publish(tmp_path / "link")
    assert _listing(real) == ["manifest.json", "new.txt"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _publish(Path())
    assert "new.txt" in _listing(tmp_path / "here")
    assert _listing(tmp_path) == ["here", "link", "real"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.123-abc.partial"
    left.mkdir()
    (left / "model.onnx_data").write_text("half")
    other = tmp_path / ".output.123-abc.partial"
    other.mkdir()
    _publish(tmp_path / "out")
    assert "new.txt" in _listing(tmp_path / "out")
    assert _listing(tmp_path) == [other.name, "out"]


def test_an_artifact_that_a_killed_run_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    _publish(tmp_path / "out", name="old.txt")
    (tmp_path / "out").rename(tmp_path / ".out.123-abc.replaced")
    (tmp_path / ".out.123-abc.partial").mkdir()
    with pytest.raises(UsageError, match="exists and is not empty"):
        _publish(tmp_path / "out")
    assert _listing(tmp_path) == ["out"]
    assert "old.txt" in _listing(tmp_path / "out")


def test_two_exports_do_not_write_one_directory(tmp_path: Path) -> None:
    with publish(tmp_path / "out") as staging:
        with pytest.raises(UsageError, match="another export is writing it; wait"):
            _publish(tmp_path / "out")
        _publish(tmp_path / "elsewhere")
        (staging / "manifest.json").write_text("{}")
    assert _listing(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_is_named_as_such(tmp_path: Path, number) -> None:
    def fill() -> None:
        with publish(tmp_path / "out") as staging:
            (staging / "half").write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError) as caught:
        fill()
    assert caught.value.exit_code == 6
    assert str(caught.value) == (
        f"{tmp_path}/out: no space left while writing; free some or choose another disk"
    )
    assert _listing(tmp_path) == []


def test_a_parent_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as caught:
        _publish(tmp_path / "file" / "out")
    assert str(caught.value).endswith("cannot be written (File exists); choose another directory")
    assert str(tmp_path) in str(caught.value)


def test_a_read_only_parent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError) as caught:
        _publish(tmp_path / "locked" / "out")
    assert str(caught.value) == (
        f"{tmp_path}/locked: cannot be written (Permission denied); choose another directory"
    )


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        artifacts.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})
    )
    require_space(tmp_path / "not" / "there", 10**9)
    with pytest.raises(ResourceError) as caught:
        require_space(tmp_path / "not" / "there", 2 * 10**9)
    assert str(caught.value) == (
        f"{tmp_path}/not/there: needs 2.00 GB and 1.00 GB are free; "
        "free some or choose another disk"
    )


_SLOW = """
    import signal, sys, time
    from pathlib import Path
    from quarot_onnx.artifacts import publish
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with publish(Path(sys.argv[1])) as staging:
        (staging / "half").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_publishes_nothing(tmp_path: Path, number) -> None:
    program = [sys.executable, "-c", textwrap.dedent(_SLOW), str(tmp_path / "out")]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(number)
        returned = process.wait(10)
    assert not (tmp_path / "out").exists()
    if number == signal.SIGKILL:
        assert returned == -signal.SIGKILL
    else:
        assert _listing(tmp_path) == []
    if number == signal.SIGTERM:
        assert returned == 128 + signal.SIGTERM


def test_publishing_outside_the_main_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=_publish, args=(tmp_path / "out",))
    thread.start()
    thread.join()
    assert (tmp_path / "out").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_signal_handler_is_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    _publish(tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before


# --- The model ------------------------------------------------------------------------------------


def _model(shapes: dict[str, tuple[int, ...]]) -> ir.Model:
    """A graph whose initializers are lazy weights of ``arange``."""
    values = []
    for name, shape in shapes.items():
        array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        weight = Weight(name, ArraySource(array), ir.DataType.FLOAT)
        value = ir.Value(
            name=name, type=ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight
        )
        values.append(value)
    nodes = [ir.node("Identity", [value]) for value in values]
    for node in nodes:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = node.inputs[0].shape
        node.outputs[0].name = f"{node.inputs[0].name}_out"
    graph = ir.Graph(
        [],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=values,
        opset_imports={"": 23},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


SHAPES = {"small": (3,), "large": (300, 7), "odd": (513,), "page": (513, 515)}


def test_a_saved_model_reads_back(tmp_path: Path) -> None:
    save_model(_model(SHAPES), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    assert _listing(tmp_path) == ["model.onnx", "model.onnx_data"]
    for initializer in model.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        shape = SHAPES[initializer.name]
        np.testing.assert_array_equal(array, np.arange(np.prod(shape)).reshape(shape))


def test_small_tensors_are_inline_and_large_ones_aligned(tmp_path: Path) -> None:
    save_model(_model(SHAPES), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    held = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    assert held["small"] == {}
    assert held["large"]["location"] == "model.onnx_data"
    assert int(held["odd"]["offset"]) % 64 == 0
    assert int(held["page"]["offset"]) % 4096 == 0
    assert int(held["page"]["length"]) == 513 * 515 * 4


def test_saving_twice_gives_the_same_bytes_and_keeps_the_weights_lazy(tmp_path: Path) -> None:
    model = _model(SHAPES)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name)
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    held = [v.const_value for v in model.graph.initializers.values()]
    assert all(isinstance(tensor, Weight) for tensor in held)


def test_progress_counts_the_bytes_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    save_model(_model(SHAPES), tmp_path, lambda done, total: calls.append((done, total)))
    assert len(calls) == 3
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] >= calls[-1][1]


@pytest.mark.parametrize("shape", [(3,), (300, 7)], ids=["inline", "external"])
def test_a_damaged_weight_is_named_wherever_it_is_stored(tmp_path: Path, shape) -> None:
    class Damaged(ArraySource):
        def read(self, index):
            raise InputError("shard: tensor w is damaged; download it again")

    model = _model({"w": shape})
    weight = Weight("w", Damaged(np.zeros(shape)), ir.DataType.FLOAT)
    model.graph.initializers["w"].const_value = weight
    with pytest.raises(InputError, match="shard: tensor w is damaged"):
        save_model(model, tmp_path)
    assert model.graph.initializers["w"].const_value is weight


@pytest.mark.parametrize("shape", [(6, 4), (60, 70)], ids=["inline", "external"])
def test_codes_and_scales_are_stored_as_they_were_computed(tmp_path: Path, shape) -> None:
    model = _model({"w": shape})
    weight = model.graph.initializers.pop("w").const_value
    quantized = QuantizedWeight(weight, lambda w: rtn(w, bits=4), ir.DataType.INT4)
    for tensor in (quantized.codes, quantized.scale):
        model.graph.initializers[tensor.name] = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=tensor.shape,
            const_value=tensor,
        )
    save_model(model, tmp_path)
    stored = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    codes, scale = rtn(weight.float64(), bits=4)
    assert stored["w"].data_type == onnx.TensorProto.INT4
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored["w"]).astype(int), codes)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored["w_scale"]), scale)


def test_a_limit_on_file_sizes_is_no_space(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            pytest.raises(ResourceError, match="no space left"),
            publish(tmp_path / "o") as staging,
        ):
            save_model(_model(SHAPES), staging)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _listing(tmp_path) == []


# --- The manifest ---------------------------------------------------------------------------------


def test_a_manifest_lists_every_file_with_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("b")
    save_manifest(tmp_path, {"dtype": "float32"})
    manifest = load_manifest(tmp_path)
    assert manifest["dtype"] == "float32"
    assert sorted(manifest["files"]) == ["a", "sub/b"]
    assert manifest["files"]["a"] == (
        "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    )
    assert manifest["packages"]["numpy"] == np.__version__
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()


def test_changed_and_missing_files_are_found(tmp_path: Path) -> None:
    for name in ("kept", "changed", "removed"):
        (tmp_path / name).write_text(name)
    save_manifest(tmp_path, {})
    (tmp_path / "changed").write_text("x")
    (tmp_path / "removed").unlink()
    assert changed_files(tmp_path, load_manifest(tmp_path)) == ["changed", "removed"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest.json; give a directory that `quarot-onnx export` wrote"),
        ("{", "is damaged ("),
        ("[]", "is damaged ("),
        ("{}", "is damaged ("),
        ("\udc80", "is damaged ("),
        (json.dumps({"format_version": 99}), "format version 99, this quarot-onnx reads 1"),
    ],
    ids=["missing", "truncated", "a list", "empty", "not UTF-8", "newer"],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, content, message) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        load_manifest(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
