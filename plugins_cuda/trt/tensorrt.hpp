// SPDX-License-Identifier: Apache-2.0
// TensorRT's plugin interfaces: NVIDIA's headers with -DQR_TENSORRT_HEADERS (make TRT_INCLUDE=dir),
// else tensorrt_abi.h; and what must be true of either.
#pragma once

#ifdef QR_TENSORRT_HEADERS
#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#if NV_TENSORRT_MAJOR != 10 && NV_TENSORRT_MAJOR != 11
#error "the plugins are written for TensorRT 10 and 11"
#elif NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3
#error "aliased plugin I/O needs the headers of TensorRT 10.3 or later"
#endif
#else
#include "tensorrt_abi.h"
#endif

static_assert(sizeof(void*) == 8, "the ABI is written down for 64-bit systems");
static_assert(sizeof(nvinfer1::Dims) == 72 && nvinfer1::Dims::MAX_DIMS == 8, "Dims");
static_assert(sizeof(nvinfer1::DimsExprs) == 72, "DimsExprs");
static_assert(sizeof(nvinfer1::PluginField) == 24, "PluginField");
static_assert(sizeof(nvinfer1::PluginFieldCollection) == 16, "PluginFieldCollection");
static_assert(sizeof(nvinfer1::PluginTensorDesc) == 88, "PluginTensorDesc");
static_assert(sizeof(nvinfer1::DynamicPluginTensorDesc) == 304, "DynamicPluginTensorDesc");
static_assert(sizeof(nvinfer1::IPluginV3) == 8 && sizeof(nvinfer1::IPluginCreatorV3One) == 8,
              "an interface is a pointer to its virtual functions");
static_assert(static_cast<int32_t>(nvinfer1::DataType::kBF16) == 7 &&
                  static_cast<int32_t>(nvinfer1::PluginFieldType::kINT64) == 10,
              "enumerators");
