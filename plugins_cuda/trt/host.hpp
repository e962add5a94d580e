// SPDX-License-Identifier: Apache-2.0
// The process around the plugins: the TensorRT libraries loaded in it, their registries and
// loggers.
//
// TensorRT 11 put its loggers and its registry's destructor elsewhere in the tables of virtual
// functions, so one library that serves both versions asks the loaded TensorRT which it is, and
// declares both tables itself. Nothing here links to TensorRT: everything is looked up in what the
// process has already loaded.
#pragma once

#include <string>

#include "tensorrt.hpp"

namespace quarot {

enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };

// To TensorRT's logger; errors and warnings to stderr where there is none.
void log(Severity severity, std::string const& message) noexcept;

// The ILoggerFinder that TensorRT's registry hands to a library which it loads.
void setLoggerFinder(void* finder) noexcept;

// Registers the creators with every loaded TensorRT library that does not know them yet, or, where
// `registry` is not null, with that one. The number registered; -1 where there is no TensorRT.
int32_t registerCreators(nvinfer1::IPluginCreatorInterface* const* creators, int32_t count,
                         void* registry) noexcept;

// Takes back what registerCreators registered.
void deregisterCreators() noexcept;

}  // namespace quarot
