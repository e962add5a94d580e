# SPDX-License-Identifier: Apache-2.0
"""A real tritonserver on loopback serves the embedded model.

The server is that of the nvidia-pytriton wheel in an environment of its own (``.venv-triton``,
which ``make test`` makes; or ``QUAROT_TRITON_PYTHON``). Without one these tests are skipped, unless
``QUAROT_REQUIRE`` names ``triton``.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from quarot_onnx.errors import InputError, UsageError
from quarot_onnx.export.triton import triton_from_artifact
from quarot_onnx.export.triton.model_config import from_text
from quarot_onnx.export.triton.repository import INPUTS
from quarot_onnx.manifest import changed_files, load_manifest, save_manifest
from quarot_onnx.runtime import OnnxModel, eos_token_ids, load_tokenizer
from quarot_onnx.runtime.generation import generate
from tests.test_cli import Run, run  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[1]
STREAMS = 8  # fewer than the requests of the largest test: some wait
PROMPTS = [
    f"{start} {noun}"
    for start in ("Return the", "Create a")
    for noun in ("number", "file", "list of all", "path", "new thread", "x", "class", "same")
]


# --- The repository -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton") / "repository"
    triton_from_artifact(embedded, target, name="tiny", threads=1, max_streams=STREAMS)
    return target


def test_a_repository_is_whole_and_says_what_is_in_it(repository: Path, embedded: Path) -> None:
    manifest = load_manifest(repository)
    assert changed_files(repository, manifest) == []
    assert manifest["model"] == "tiny"
    assert manifest["parameters"]["context_length"] == "1024"
    served = repository / "tiny" / "1" / "artifact"
    assert load_manifest(served) == load_manifest(embedded)
    assert changed_files(served, load_manifest(served)) == []
    assert {path.name for path in repository.iterdir()} == {
        "client.py",
        "manifest.json",
        "run.sh",
        "tiny",
    }


def test_the_configuration_declares_what_the_openai_frontend_sends(repository: Path) -> None:
    config = from_text((repository / "tiny" / "config.pbtxt").read_text())
    assert config.backend == "python"
    assert config.model_transaction_policy.decoupled
    sent = {
        "text_input", "stream", "max_tokens", "stop_words", "top_p", "frequency_penalty",
        "presence_penalty", "seed", "temperature", "exclude_input_in_output",
        "return_num_input_tokens", "return_num_output_tokens",
    }  # fmt: skip
    assert {tensor.name for tensor in config.input} == sent == {name for name, _, _ in INPUTS}
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    assert {tensor.name for tensor in config.output} >= {"text_output"}


def test_refuses_a_configuration_that_is_none() -> None:
    with pytest.raises(InputError) as error:
        from_text('name: "a" colour: "red"', "here")
    assert re.match(r"here: is not a Triton model configuration \(.*colour.*\); ", str(error.value))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "with space", "ä", "x" * 101])
def test_refuses_a_name_that_triton_cannot_serve(embedded: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as error:
        triton_from_artifact(embedded, tmp_path / "out", name=name)
    assert str(error.value) == (
        f"--name {name!r}: a model's name is 1 to 100 letters, digits, '.', '_' or '-' and starts "
        "with a letter or a digit; choose another with --name"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_streams": 0}, "--max-streams 0: must be 1 or more"),
        ({"max_waiting": 0}, "--max-waiting 0: must be 1 or more"),
        ({"threads": 0}, "--threads 0: must be 1 or more"),
        ({"engine_model": True}, "--engine-model: {artifact} holds no engine; build one"),
        ({"runtime": "tensorrt"}, "--runtime tensorrt: {artifact} holds no engine; build one"),
        ({"runtime": "x"}, "--runtime x: no such runtime; choose ort-cpu, ort-cuda, tensorrt"),
    ],
)
def test_refuses_limits_and_runtimes_that_cannot_be(
    embedded: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        triton_from_artifact(embedded, tmp_path / "out", name="tiny", **options)
    assert str(error.value) == message.format(artifact=embedded)


def test_refuses_an_altered_artifact(embedded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(embedded, tmp_path / "copy"))
    with (copy / "model.onnx_data").open("r+b") as file:
        file.write(b"\x55")
    with pytest.raises(InputError, match=r"model\.onnx_data: is not what the manifest says; write"):
        triton_from_artifact(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_an_artifact_whose_tokenizer_a_server_cannot_read(
    embedded: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(embedded, tmp_path / "copy"))
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    save_manifest(copy, load_manifest(copy))
    with pytest.raises(InputError) as error:
        triton_from_artifact(copy, tmp_path / "out")
    assert str(error.value) == (
        f"{copy}/tokenizer.json: no such file, and the server reads no other tokenizer; "
        "save the model's fast tokenizer and export again"
    )


def test_replaces_a_repository_only_when_told(embedded: Path, tmp_path: Path) -> None:
    triton_from_artifact(embedded, tmp_path / "out", name="first")
    with pytest.raises(UsageError, match="exists and is not empty"):
        triton_from_artifact(embedded, tmp_path / "out", name="second")
    triton_from_artifact(embedded, tmp_path / "out", name="second", force=True)
    assert not (tmp_path / "out" / "first").exists()


def test_the_command_line_says_how_to_start_what_it_wrote(
    run: Run,  # noqa: F811
    embedded: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    result = run("triton", embedded, out, "--name", "tiny", "--max-streams", 4, "--threads", 2)
    assert result.code == 0
    lines = result.out.splitlines()
    assert "model tiny (context_length 1024, max_streams 4," in lines[0]
    assert lines[1] == f"next: {out}/run.sh"
    parameters = from_text((out / "tiny" / "config.pbtxt").read_text()).parameters
    assert {key: value.string_value for key, value in parameters.items()} == {
        "runtime": "ort-cpu",
        "context_length": "1024",
        "max_streams": "4",
        "max_waiting": "256",
        "threads": "2",
    }
    refused = run("triton", embedded, out, "--name", "tiny")
    assert (refused.code, "--force" in refused.err) == (2, True)
    again = run("triton", embedded, out, "--name", "tiny", "--force", "--json")
    assert json.loads(again.out)["parameters"]["max_streams"] == "16"


# --- The server -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        http, grpc, metrics: ports on loopback.
        python: of its environment.
        log: what it prints.
    """

    http: int
    grpc: int
    metrics: int
    python: Path
    log: Path

    def post(self, body: Any, endpoint: str = "generate") -> tuple[int, str]:
        """The status and the text that the server answers; `body` is JSON or bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.http}/v2/models/tiny/{endpoint}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def text(self, prompt: str, **options: Any) -> str:
        status, answer = self.post({"text_input": prompt, **options})
        assert status == 200, answer
        return str(json.loads(answer)["text_output"])

    def events(self, prompt: str, **options: Any) -> list[dict[str, Any]]:
        """The events of generate_stream."""
        body = {"text_input": prompt, "stream": True, **options}
        status, answer = self.post(body, "generate_stream")
        assert status == 200, answer
        return [json.loads(line[5:]) for line in answer.splitlines() if line.startswith("data:")]

    def stream(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of requests sent together over one gRPC stream."""
        script = Path(__file__).with_name("triton_client.py")
        done = subprocess.run(
            [self.python, script, f"127.0.0.1:{self.grpc}", "tiny"],
            input=json.dumps(requests), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    def metric(self, name: str, labels: str = "") -> float:
        url = f"http://127.0.0.1:{self.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            found = re.search(
                rf'^quarot_{name}{{model="tiny"{labels}}} (\S+)$', response.read().decode(), re.M
            )
        assert found, name
        return float(found[1])

    def wait_for(self, name: str, value: float, labels: str = "") -> None:
        """Wait until a metric has a value; a second is long."""
        until = time.monotonic() + 10
        while self.metric(name, labels) != value:
            assert time.monotonic() < until, f"{name}: {self.metric(name, labels)}, not {value}"
            time.sleep(0.02)


def server_python() -> Path:
    python = Path(os.environ.get("QUAROT_TRITON_PYTHON", ROOT / ".venv-triton" / "bin" / "python"))
    if not python.is_file():
        reason = (
            f"{python}: not there; `make test` installs the server, or set QUAROT_TRITON_PYTHON"
        )
        if "triton" in os.environ.get("QUAROT_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    return python


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@contextmanager
def _started(repository: Path, log: Path) -> Iterator[Server]:
    python = server_python()
    http, grpc, metrics = _free_ports(3)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "HTTP_PORT": str(http),
        "GRPC_PORT": str(grpc),
        "METRICS_PORT": str(metrics),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [repository / "run.sh", "--metrics-interval-ms=100", "--exit-timeout-secs=3"],
            stdout=output, stderr=output, env=environment, cwd=log.parent,
        )  # fmt: skip
        try:
            _wait_until_ready(process, http, log)
            yield Server(http, grpc, metrics, python, log)
        finally:  # Triton 2.51 keeps a model loaded after a gRPC stream sent a wrong shape
            process.terminate()
            process.wait(60)


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    said = log.read_text()[-3000:]
    if "no shared libpython" in said and "triton" not in os.environ.get("QUAROT_REQUIRE", ""):
        pytest.skip(said.strip())
    pytest.fail(f"the server did not start:\n{said}")


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with _started(repository, tmp_path_factory.mktemp("log") / "server.log") as started:
        yield started


@pytest.fixture(scope="module")
def expected(embedded: Path) -> Any:
    """(prompt, options) -> what `quarot-onnx generate` writes."""
    model, tokenizer = OnnxModel(embedded, threads=1), load_tokenizer(embedded)

    @cache
    def text(prompt: str, max_tokens: int, **options: Any) -> str:
        ids = generate(
            model, tokenizer.encode(prompt), max_new_tokens=max_tokens,
            eos_token_ids=eos_token_ids(embedded), **options,
        )  # fmt: skip
        return "".join(tokenizer.stream(ids))

    return text


def test_http_answers_with_the_text_of_generate(server: Server, expected: Any) -> None:
    assert server.text(PROMPTS[0], max_tokens=40) == expected(PROMPTS[0], 40)
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    sampled = server.text(PROMPTS[0], max_tokens=40, **options)
    assert sampled == expected(PROMPTS[0], 40, **options) != expected(PROMPTS[0], 40)


def test_the_command_line_writes_the_same_text(server: Server, embedded: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from quarot_onnx.cli import main; main()", "generate", embedded,
         "--prompt", PROMPTS[1], "--max-new-tokens", "24", "--json"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert server.text(PROMPTS[1], max_tokens=24) == json.loads(done.stdout)["completion"]


def test_generate_stream_sends_pieces_as_they_come(server: Server, expected: Any) -> None:
    events = server.events(PROMPTS[0], max_tokens=24, return_num_output_tokens=True)
    assert len(events) > 3  # pieces that are late are sent together
    assert "".join(event["text_output"] for event in events) == expected(PROMPTS[0], 24)
    assert [event.get("finish_reason") for event in events] == [None] * (len(events) - 1) + [
        "length"
    ]
    assert sum(event["num_output_tokens"] for event in events) == 24


def test_16_concurrent_streams_are_neither_lost_nor_mixed(server: Server, expected: Any) -> None:
    steps = server.metric("steps")
    lengths = [20 + 5 * (number % 7) for number in range(16)]
    answers = server.stream(
        [
            {"text_input": prompt, "max_tokens": length, "stream": True}
            for prompt, length in zip(PROMPTS, lengths, strict=True)
        ]
    )
    for prompt, length, answer in zip(PROMPTS, lengths, answers, strict=True):
        assert "".join(answer["pieces"]) == expected(prompt, length)
        assert answer["finish_reason"] == "length"
        assert len(answer["pieces"]) > 3
    assert server.metric("steps") - steps < sum(lengths) / 3  # one step served several


def test_16_concurrent_http_requests_answer_as_one_alone(server: Server, expected: Any) -> None:
    def ask(number: int) -> str:
        return server.text(PROMPTS[number], max_tokens=30, temperature=1.0, seed=number)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    for number, answer in enumerate(answers):
        assert answer == expected(PROMPTS[number], 30, temperature=1.0, seed=number)


def test_a_cancelled_stream_frees_its_place(server: Server, expected: Any) -> None:
    before = server.metric("finished_requests", ',reason="cancelled"')
    endless = {"text_input": PROMPTS[0], "max_tokens": 1000, "stream": True, "cancel_after": 2}
    answers = server.stream([endless] * STREAMS)
    assert all(len(answer["pieces"]) < 1000 for answer in answers)
    server.wait_for("finished_requests", before + STREAMS, ',reason="cancelled"')
    server.wait_for("active_streams", 0)
    assert server.text(PROMPTS[0], max_tokens=8) == expected(PROMPTS[0], 8)


def test_a_client_that_hangs_up_frees_its_place(server: Server) -> None:
    before = server.metric("finished_requests", ',reason="cancelled"')
    body = json.dumps({"text_input": PROMPTS[0], "max_tokens": 1000, "stream": True}).encode()
    head = (
        f"POST /v2/models/tiny/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", server.http)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        client.recv(100)
    server.wait_for("finished_requests", before + 1, ',reason="cancelled"')
    server.wait_for("active_streams", 0)


def test_stop_words_end_the_text_before_them(server: Server, expected: Any) -> None:
    whole = expected(PROMPTS[0], 40)
    word = whole[30:36]
    cut = whole[: whole.index(word)]
    status, answer = server.post(
        {"text_input": PROMPTS[0], "max_tokens": 40, "stop_words": ["nowhere", word]}
    )
    assert (status, json.loads(answer)["text_output"]) == (200, cut)
    assert json.loads(answer)["finish_reason"] == "stop"
    events = server.events(PROMPTS[0], max_tokens=40, stop_words=[word])
    assert "".join(event["text_output"] for event in events) == cut


def test_answers_count_tokens_and_echo_the_prompt_when_asked(server: Server) -> None:
    _, answer = server.post(
        {"text_input": PROMPTS[0], "max_tokens": 5, "exclude_input_in_output": False,
         "return_num_input_tokens": True, "return_num_output_tokens": True}
    )  # fmt: skip
    found = json.loads(answer)
    assert (found["num_input_tokens"], found["num_output_tokens"]) == (3, 5)
    assert found["text_output"].startswith(PROMPTS[0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": 4}, "text_input: is missing; send one prompt in a request"),
        ({"text_input": ""}, "text_input: has no tokens; give some text"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens: is 0; give 1 or more"),
        ({"text_input": "a", "max_tokens": -1}, "max_tokens: is -1; give 1 or more"),
        (
            {"text_input": "a", "max_tokens": 1024},
            "max_tokens: 1024 after a prompt of 1 tokens is more than the model takes, 1024; "
            "ask for 1023 or fewer",
        ),
        (
            {"text_input": "a " * 2000},
            "text_input: has 2001 tokens and the model takes 1024 with the answer; shorten it",
        ),
        ({"text_input": "a", "temperature": -0.5}, "temperature: is -0.5; give 0 or more"),
        ({"text_input": "a", "top_p": 0}, "top_p: is 0; give more than 0 and at most 1"),
        (
            {"text_input": "a", "presence_penalty": 3.0},
            "presence_penalty: is 3; give -2 to 2",
        ),
        ({"text_input": "a", "stop_words": [""]}, "stop_words: one is empty; leave it out"),
        (
            {"text_input": "a", "stop_words": list("abcdefghijklmnopq")},
            "stop_words: there are 17; give 16 or fewer",
        ),
    ],
)
def test_a_request_that_cannot_be_served_says_why(
    server: Server, body: dict[str, Any], message: str
) -> None:
    for endpoint in ("generate", "generate_stream"):
        status, answer = server.post(body, endpoint)
        assert status == 400
        assert json.loads(answer.removeprefix("data: "))["error"] == message


@pytest.mark.parametrize(
    "body",
    [
        b'{"text_input": ',
        b"\xff\x00",
        {"text_input": 3},
        {"text_input": ["a", "b"]},
        {"text_input": "a", "max_tokens": "many"},
        {"text_input": "a", "seed": -1},
    ],
)
def test_the_server_refuses_what_is_malformed_and_lives(
    server: Server, expected: Any, body: Any
) -> None:
    status, answer = server.post(body)
    assert status in (400, 500)
    assert json.loads(answer)["error"]
    assert server.text(PROMPTS[0], max_tokens=4) == expected(PROMPTS[0], 4)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"text_input": "\udcff\udcfe"},
            "text_input: is not UTF-8 (invalid start byte); encode it so",
        ),
        ({"text_input": ["a", "b"]}, "unexpected shape for input 'text_input'"),
        ({"text_input": "a", "top_p": [0.5, 0.5]}, "unexpected shape for input 'top_p'"),
        ({"text_input": "a", "max_tokens": -7}, "max_tokens: is -7; give 1 or more"),
    ],
)
def test_a_grpc_stream_gets_its_error(
    server: Server, expected: Any, request_: dict[str, Any], message: str
) -> None:
    (answer,) = server.stream([request_])
    assert message in answer["error"]
    assert server.text(PROMPTS[0], max_tokens=4) == expected(PROMPTS[0], 4)


def test_the_client_example_prints_the_prompt_and_the_text(
    server: Server, repository: Path, expected: Any
) -> None:
    command = [sys.executable, repository / "client.py", "--model", "tiny",
               "--url", f"http://127.0.0.1:{server.http}"]  # fmt: skip
    done = subprocess.run(
        [*command, PROMPTS[0], "--max-tokens", "12"], capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert done.stdout == f"{PROMPTS[0]}{expected(PROMPTS[0], 12)}\n"
    refused = subprocess.run(
        [*command, "", "--max-tokens", "12"], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.strip() == "text_input: has no tokens; give some text"


def require_tritonclients_schema_to_read(path: Path) -> None:
    """Fail unless the whole schema, as tritonclient carries it, reads what ours wrote."""
    program = (
        "import sys; from google.protobuf import text_format\n"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig\n"
        "config = text_format.Parse(open(sys.argv[1]).read(), ModelConfig())\n"
        "sys.stdout.buffer.write(config.SerializeToString(deterministic=True))"
    )
    done = subprocess.run(
        [server_python(), "-c", program, path], capture_output=True, check=True, timeout=60
    )
    ours = from_text(path.read_text())
    assert type(ours).FromString(done.stdout) == ours


def test_tritonclients_own_schema_reads_the_configuration(repository: Path) -> None:
    require_tritonclients_schema_to_read(repository / "tiny" / "config.pbtxt")


def test_an_artifact_that_does_not_load_keeps_the_server_from_starting(
    repository: Path, tmp_path: Path
) -> None:
    server_python()
    broken = Path(shutil.copytree(repository, tmp_path / "broken"))
    (broken / "tiny" / "1" / "artifact" / "model.onnx").write_bytes(b"no model")
    log = tmp_path / "server.log"
    with pytest.raises(pytest.fail.Exception), _started(broken, log):
        pass
    assert "model.onnx: ONNX Runtime refuses it" in log.read_text()


def test_run_sh_says_what_it_lacks(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    for tool in ("bash", "env", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        [repository / "run.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert re.fullmatch(
        r"run.sh: no tritonserver on PATH and python3 has no pytriton.*; pip install .*",
        done.stderr.strip(),
    )
