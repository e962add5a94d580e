# SPDX-License-Identifier: Apache-2.0
"""From an artifact to TensorRT: lower the graph, lint it, build an engine.

``lowering`` puts `model.onnx` into the form that TensorRT's parser and the plugins take, ``lint``
says what they would refuse, ``engine`` builds through the one ``adapter`` for TensorRT 10 and 11.
Only ``adapter`` imports tensorrt.
"""
