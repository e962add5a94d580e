# SPDX-License-Identifier: Apache-2.0
"""Hugging Face decoder LLMs to rotated W4A4KV4 ONNX.

    from pathlib import Path
    from quarot_onnx.pipeline import export
    from quarot_onnx.recipe import load_recipe

    export(Path("model_dir"), Path("out_dir"), load_recipe("w4a4kv4"))

Read `quarot_onnx.pipeline` first. Importing this package itself imports nothing.
"""
