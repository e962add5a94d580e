// SPDX-License-Identifier: Apache-2.0
// The part of the ABI that launches nothing: versions, status texts, device limits, emulator knobs.
#include "device.hpp"

namespace qr {

#if defined(__CUDACC__)

const DeviceLimits& device_limits() {
  constexpr int kMaxDevices = 64;
  static DeviceLimits limits[kMaxDevices + 1] = {};  // the last one stays zero
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMaxDevices) {
    cudaGetLastError();
    return limits[kMaxDevices];
  }
  DeviceLimits& l = limits[device];
  if (l.multiprocessors == 0) {  // two threads may both ask: they write the same values
    int major = 0, minor = 0, per_block = 0, per_multiprocessor = 0, count = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                           device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    l.compute_capability = 10 * major + minor;
    l.shared_bytes_per_block = static_cast<size_t>(per_block);
    l.shared_bytes_per_multiprocessor = static_cast<size_t>(per_multiprocessor);
    l.multiprocessors = count;
  }
  return l;
}

#else

// Few multiprocessors, so that persistent kernels loop even over the small problems of the tests.
const DeviceLimits& device_limits() {
  static thread_local DeviceLimits limits;
  limits = {emu::options().compute_capability, 2, emu::kMaxSharedBytes,
            emu::kMaxSharedBytes + 1024};
  return limits;
}

#endif

}  // namespace qr

extern "C" {

QR_EXPORT int qr_abi_version(void) { return QR_ABI_VERSION; }

QR_EXPORT const char* qr_status_string(int status) {
  switch (status) {
    case QR_OK:
      return "ok";
    case QR_ERROR_NULL_POINTER:
      return "a required pointer is null";
    case QR_ERROR_MISALIGNED:
      return "a pointer is not 16-byte aligned";
    case QR_ERROR_UNSUPPORTED_DTYPE:
      return "the dtype is not one that this entry point takes";
    case QR_ERROR_UNSUPPORTED_SHAPE:
      return "the sizes are outside the table of supported shapes";
    case QR_ERROR_UNSUPPORTED_PLAN:
      return "the Hadamard plan is outside the table of supported plans";
    case QR_ERROR_UNSUPPORTED_LAYOUT:
      return "the kernel does not read or write this layout";
    case QR_ERROR_WORKSPACE_TOO_SMALL:
      return "the workspace is smaller than its *_workspace_size()";
    case QR_ERROR_BAD_ARGUMENT:
      return "an argument is out of range";
    case QR_ERROR_ARCHITECTURE:
      return "the library has no code for this device";
    case QR_ERROR_LAUNCH:
      return "the CUDA runtime refused the launch";
    default:
      return "unknown status";
  }
}

#if defined(__CUDACC__)

QR_EXPORT const char* qr_backend(void) { return "cuda"; }

#else

QR_EXPORT const char* qr_backend(void) { return "emulation"; }

QR_EXPORT void qr_emulation_configure(const qr_emulation_options* options) {
  emu::Options& o = emu::options();
  o.seed = options->seed;
  o.workers = options->workers;
  o.compute_capability = options->compute_capability;
  o.check_races = options->check_races != 0;
  o.count_banks = options->count_banks != 0;
}

QR_EXPORT void qr_emulation_reset_counters(void) {
  emu::Counters& c = emu::counters();
  c.blocks = c.matrix_loads = c.matrix_load_conflicts = c.vector_accesses = c.vector_conflicts =
      c.mma_instructions = c.async_copies = 0;
}

QR_EXPORT void qr_emulation_read_counters(qr_emulation_counters* counters) {
  const emu::Counters& c = emu::counters();
  *counters = {c.blocks,           c.matrix_loads,     c.matrix_load_conflicts, c.vector_accesses,
               c.vector_conflicts, c.mma_instructions, c.async_copies};
}

#endif

}  // extern "C"
