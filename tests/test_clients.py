# SPDX-License-Identifier: Apache-2.0
"""The real onnxruntime-genai and lm-eval run an artifact with a float cache as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarot_onnx.export.genai import GENAI_CONFIG
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.runtime import OnnxModel, load_tokenizer
from tests.conftest import Exported, HuggingFace

EMBEDDED = Path(__file__).parents[1] / "examples" / "tiny_llama" / "model"
FLOAT_CACHE = ("kv_cache.io=float",)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW_TOKENS = 24


def _python(program: str, argument: Any) -> Any:
    """What a program prints as JSON on its last line; it gets JSON as its argument."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(argument)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def float_cache(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clients") / "float-cache"
    export(EMBEDDED, out, load_recipe("w4a4kv4", FLOAT_CACHE), certify=False)
    return out


# --- onnxruntime-genai ----------------------------------------------------------------------------

GENAI = """
import json, sys
import numpy as np
import onnxruntime_genai as genai

asked = json.loads(sys.argv[1])
found = []
for artifact in asked["artifacts"]:
    model = genai.Model(genai.Config(artifact))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=asked["length"], do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(asked["prompt"], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found.append([int(token) for token in generator.get_sequence(0)])
print(json.dumps(found))
"""


def _greedy(artifact: Path) -> list[int]:
    """The prompt and the likeliest tokens after it, by ONNX Runtime and nothing else."""
    model = OnnxModel(artifact, threads=1)
    tokens = list(PROMPT)
    logits, cache = model.step(np.array([PROMPT]), model.new_cache(1))
    for _ in range(NEW_TOKENS):
        tokens.append(int(logits[0, -1].argmax()))
        logits, cache = model.step(np.array([tokens[-1:]]), cache)
    return tokens


def test_onnxruntime_genai_generates_the_tokens_of_the_runtime(
    exported: Exported, float_cache: Path
) -> None:
    cases = [
        ("llama", "rotate-only", (), "float16"),
        ("qwen3-head-dim", "w4a4kv4", FLOAT_CACHE, "float32"),
        ("opt", "w4a4kv4", FLOAT_CACHE, "float32"),
    ]
    artifacts = [float_cache, *(exported(*case) for case in cases)]
    found = _python(
        GENAI,
        {
            "artifacts": [str(path) for path in artifacts],
            "prompt": PROMPT,
            "length": len(PROMPT) + NEW_TOKENS,
        },
    )
    expected = [_greedy(path) for path in artifacts]
    assert found == expected
    assert len(set(expected[0][len(PROMPT) :])) > 8  # a trained model does not repeat itself


def test_a_packed_cache_gets_no_genai_config(exported: Exported) -> None:
    assert not (exported("llama", "w4a4kv4") / GENAI_CONFIG).exists()


def test_generation_settings_reach_genai(hugging_face: HuggingFace, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in hugging_face("llama").iterdir():
        (source / path.name).symlink_to(path)
    (source / "generation_config.json").unlink()
    settings = {"eos_token_id": [7, 9], "bos_token_id": 5, "do_sample": True, "top_k": 3,
                "temperature": 0.5, "top_p": 0.75}  # fmt: skip
    (source / "generation_config.json").write_text(json.dumps(settings))
    export(source, tmp_path / "out", load_recipe("float"), certify=False)
    written = json.loads((tmp_path / "out" / GENAI_CONFIG).read_text())
    ids = {name: written["model"][f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert ids == {"bos": 5, "eos": [7, 9], "pad": 7}
    settings = {name: settings[name] for name in ("do_sample", "temperature", "top_k", "top_p")}
    assert settings.items() <= written["search"].items()
    assert written["model"]["context_length"] == written["search"]["max_length"] == 512


# --- lm-eval --------------------------------------------------------------------------------------

LM_EVAL = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

asked = json.loads(sys.argv[1])
found = {}
for backend in ("onnxruntime", "onnxruntime-genai"):
    results = lm_eval.simple_evaluate(
        model=backend, model_args={"pretrained": asked["artifact"]}, tasks=["choice", "rolling"],
        task_manager=TaskManager(include_path=asked["tasks"], include_defaults=False),
    )
    found[backend] = {
        "accuracy": results["results"]["choice"]["acc,none"],
        "choices": [[p[0] for p in s["filtered_resps"]] for s in results["samples"]["choice"]],
        "rolling": [s["filtered_resps"][0] for s in results["samples"]["rolling"]],
    }
print(json.dumps(found))
"""

DOCUMENTS: list[dict[str, Any]] = [
    {"prompt": "Return the number of", "choices": [" items", " zqxj"], "answer": 0},
    {"prompt": "def __init__(", "choices": ["xyzzy", "self"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}]
"""


def test_lm_eval_scores_with_the_likelihoods_of_the_runtime(
    float_cache: Path, tmp_path: Path
) -> None:
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, kind, rest in (
        ("choice", "multiple_choice", CHOICE),
        ("rolling", "loglikelihood_rolling", ROLLING),
    ):
        task = TASK.format(name=name, data=data, kind=kind) + rest
        (tmp_path / f"{name}.yaml").write_text(task)
    found = _python(LM_EVAL, {"artifact": str(float_cache), "tasks": str(tmp_path)})

    model, tokenizer = OnnxModel(float_cache, threads=1), load_tokenizer(float_cache)

    def likelihood(context: list[int], text: str) -> float:
        target = tokenizer.encode(text, add_special_tokens=False)
        logits, _ = model.step(np.array([context + target]), model.new_cache(1))
        scores = logits[0, len(context) - 1 : -1].astype(np.float64)
        scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        return float(scores[np.arange(len(target)), target].sum())

    begin = json.loads((float_cache / GENAI_CONFIG).read_text())["model"]["bos_token_id"]
    rolling = [likelihood([begin], str(document["prompt"])) for document in DOCUMENTS]
    choices = []
    for document in DOCUMENTS:
        context = tokenizer.encode(document["prompt"], add_special_tokens=False)
        choices.append([likelihood(context, f" {choice}") for choice in document["choices"]])
    for backend in ("onnxruntime", "onnxruntime-genai"):
        assert found[backend]["accuracy"] == 1.0
        np.testing.assert_allclose(np.ravel(found[backend]["rolling"]), rolling, rtol=1e-4)
        np.testing.assert_allclose(found[backend]["choices"], choices, rtol=1e-4)
