// SPDX-License-Identifier: Apache-2.0
// An operator as TensorRT's IPluginV3 and its creator.
#pragma once

#include "operator.hpp"

namespace quarot {

constexpr char const* kNAMESPACE{"quarot"};
constexpr char const* kVERSION{"1"};

// One creator for each of operators(), alive until the process ends.
std::vector<nvinfer1::IPluginCreatorInterface*> const& creators();

}  // namespace quarot
