// SPDX-License-Identifier: Apache-2.0
// The operators that have a plugin, one function each.
#pragma once

#include <algorithm>

#include "operator.hpp"

namespace quarot {

Operator const& hadamard();
Operator const& hadamardHeads();
Operator const& quantizeInt4();
Operator const& int4Gemm();
Operator const& kvAppend();
Operator const& kvAttention();

}  // namespace quarot
