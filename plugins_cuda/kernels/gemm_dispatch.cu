// SPDX-License-Identifier: Apache-2.0
// qr_gemm: checks the arguments, picks the kernel for the device, and launches it.
//
//   compute capability   m <= 16              more tokens
//   8.0, 8.6, 8.9        decode, s4           mma.sync s4
//   9.0                  decode, s8           wgmma s8 (split activations), mma.sync s8 (packed)
//   10.0 and later       decode, s8           mma.sync s8
//
// An s4 kernel is never launched on 9.0 or later, where ptxas would emulate it by some hundred
// instructions per mma; nor does it exist there: its body compiles to a trap.
#include "device.hpp"
#include "gemm.cuh"
#include "gemm_checks.hpp"
#include "gemm_launch.hpp"

namespace qr {

static bool has_s4(const DeviceLimits& device) {
  return device.compute_capability >= 80 && device.compute_capability < 90;
}

// The kernel that runs, or a status. `m` is passed apart: the workspace query tries several.
static int choose_kernel(const DeviceLimits& device, const qr_gemm_args& args, int64_t m,
                         int* kernel) {
  const bool packed = args.activation_layout == QR_LAYOUT_ACTIVATIONS_PACKED_V1;
  const bool split = args.activation_layout == QR_LAYOUT_ACTIVATIONS_SPLIT_V1;
  if (!packed && !split) return QR_ERROR_UNSUPPORTED_LAYOUT;
  if (args.weight_layout != QR_LAYOUT_WEIGHTS_FRAGMENTS_V1) return QR_ERROR_UNSUPPORTED_LAYOUT;
  if (device.compute_capability < 80) return QR_ERROR_ARCHITECTURE;
  *kernel = args.kernel;
  if (*kernel == QR_GEMM_AUTO) {
    if (m <= 16)
      *kernel = QR_GEMM_DECODE;
    else if (has_s4(device))
      *kernel = QR_GEMM_MMA_S4;
    else
      *kernel = split ? QR_GEMM_WGMMA_S8 : QR_GEMM_MMA_S8;
  }
  switch (*kernel) {
    case QR_GEMM_MMA_S4:
      if (!has_s4(device)) return QR_ERROR_ARCHITECTURE;
      return packed ? QR_OK : QR_ERROR_UNSUPPORTED_LAYOUT;
    case QR_GEMM_MMA_S8:
      return packed ? QR_OK : QR_ERROR_UNSUPPORTED_LAYOUT;
    case QR_GEMM_WGMMA_S8:
      if (device.compute_capability != 90)
        return args.kernel == QR_GEMM_AUTO ? QR_ERROR_UNSUPPORTED_LAYOUT : QR_ERROR_ARCHITECTURE;
      return split ? QR_OK : QR_ERROR_UNSUPPORTED_LAYOUT;
    case QR_GEMM_DECODE:
      if (m > 16) return QR_ERROR_UNSUPPORTED_SHAPE;
      return packed || !has_s4(device) ? QR_OK : QR_ERROR_UNSUPPORTED_LAYOUT;
    case QR_GEMM_CUTLASS:
      return QR_ERROR_ARCHITECTURE;  // no such backend in this library
    default:
      return QR_ERROR_BAD_ARGUMENT;
  }
}

static GemmPlan make_plan(const DeviceLimits& device, int kernel, int64_t m,
                          const qr_gemm_args& args) {
  const int n = int(args.n), k = int(args.k), splits = args.split_k;
  if (kernel == QR_GEMM_DECODE) return plan_decode(device, int(m), n, k, splits);
  if (kernel == QR_GEMM_WGMMA_S8) return plan_sm90(device, int(m), n, k, splits);
  return plan_mma(device, int(m), n, k, splits);
}

static size_t counter_bytes(const GemmPlan& plan) {
  return (plan.counters * sizeof(int32_t) + 255) / 256 * 256;
}
static size_t workspace_bytes(const GemmPlan& plan) {
  return counter_bytes(plan) + plan.sums * sizeof(int32_t);
}

static int check_sizes(const qr_gemm_args& args) {
  QR_RETURN_IF_ERROR(check_weight_shape(args.n, args.k));
  QR_RETURN_IF_ERROR(check_activation_shape(args.m, args.k));
  return args.split_k < 0 ? QR_ERROR_BAD_ARGUMENT : QR_OK;
}

}  // namespace qr

using namespace qr;

extern "C" {

// Enough for every number of tokens up to args->m, so that a plugin may ask once with its maximum.
size_t qr_gemm_workspace_size(const qr_gemm_args* args) {
  if (!args || check_sizes(*args) != QR_OK || args->m == 0) return 0;
  const DeviceLimits& device = device_limits();
  size_t most = 0;
  const auto consider = [&](int64_t m) {
    int kernel;
    if (choose_kernel(device, *args, m, &kernel) != QR_OK) return;
    const size_t bytes = workspace_bytes(make_plan(device, kernel, m, *args));
    most = bytes > most ? bytes : most;
  };
  // A plan that chooses its own splits makes none once its tiles, of at most 256 tokens, fill the
  // machine.
  const int64_t splitting = int64_t(256) * device.multiprocessors;
  for (int64_t m = 8; m < args->m && m <= splitting; m += 8) consider(m);
  consider(args->m);
  return most;
}

int qr_gemm_workspace_init(void* workspace, size_t bytes, void* stream) {
  if (bytes == 0) return QR_OK;
  QR_RETURN_IF_ERROR(check_pointer(workspace));
#if defined(__CUDACC__)
  if (cudaMemsetAsync(workspace, 0, bytes, static_cast<cudaStream_t>(stream)) != cudaSuccess)
    return refused_launch();
#else
  (void)stream;
  memset(workspace, 0, bytes);
#endif
  return QR_OK;
}

int qr_gemm(const qr_gemm_args* args, void* stream) {
  // ---- arguments
  if (!args) return QR_ERROR_NULL_POINTER;
  const bool raw = args->out_dtype == QR_DTYPE_INT32;
  if (!raw && !is_activation_dtype(args->out_dtype)) return QR_ERROR_UNSUPPORTED_DTYPE;
  QR_RETURN_IF_ERROR(check_sizes(*args));
  if (args->y_stride < args->n || (!raw && args->y_stride % 8)) return QR_ERROR_UNSUPPORTED_SHAPE;
  const DeviceLimits& device = device_limits();
  int kernel;
  QR_RETURN_IF_ERROR(choose_kernel(device, *args, args->m, &kernel));
  if (args->m == 0) return QR_OK;
  QR_RETURN_IF_ERROR(check_pointer(args->q));
  QR_RETURN_IF_ERROR(check_pointer(args->w));
  QR_RETURN_IF_ERROR(check_pointer(args->y));
  if (!raw) {
    QR_RETURN_IF_ERROR(check_pointer(args->scale));
    QR_RETURN_IF_ERROR(check_pointer(args->w_scale));
    QR_RETURN_IF_ERROR(check_optional_pointer(args->bias));
    QR_RETURN_IF_ERROR(check_optional_pointer(args->zero));
    if (args->zero) QR_RETURN_IF_ERROR(check_pointer(args->w_sum));
  }

  // ---- plan
  const GemmPlan plan = make_plan(device, kernel, args->m, *args);
  if (plan.splits > 1) {
    QR_RETURN_IF_ERROR(check_pointer(args->workspace));
    if (args->workspace_bytes < workspace_bytes(plan)) return QR_ERROR_WORKSPACE_TOO_SMALL;
  }
  GemmArgs p{};
  p.q = args->q;
  p.scale = args->scale;
  p.zero = args->zero;
  p.w = static_cast<const uint8_t*>(args->w);
  p.w_scale = args->w_scale;
  p.w_sum = args->w_sum;
  p.bias = args->bias;
  p.y = args->y;
  p.y_stride = args->y_stride;
  if (plan.splits > 1) {
    unsigned char* workspace = static_cast<unsigned char*>(args->workspace);
    p.counters = reinterpret_cast<int32_t*>(workspace);
    p.sums = reinterpret_cast<int32_t*>(workspace + counter_bytes(plan));
  }
  p.m = int(args->m);
  p.n = int(args->n);
  p.k = int(args->k);
  p.out_dtype = args->out_dtype;
  p.steps_per_split = plan.steps_per_split;
  p.splits = plan.splits;

  // ---- launch
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const bool split = args->activation_layout == QR_LAYOUT_ACTIVATIONS_SPLIT_V1;
  if (kernel == QR_GEMM_DECODE) return launch_decode(plan, p, has_s4(device), split, on);
  if (kernel == QR_GEMM_WGMMA_S8) return launch_sm90(plan, p, device, on);
  return launch_mma(plan, p, kernel == QR_GEMM_MMA_S4, on);
}

int qr_gemm_preferred_layouts(int32_t compute_capability, int64_t m, int32_t* activation_layout,
                              int32_t* weight_layout) {
  if (!activation_layout || !weight_layout) return QR_ERROR_NULL_POINTER;
  if (compute_capability < 80) return QR_ERROR_ARCHITECTURE;
  if (m < 0 || m > kMaxTokens) return QR_ERROR_UNSUPPORTED_SHAPE;
  // On 9.0 the decode kernel reads split order too, so that a model needs one order for every m.
  *activation_layout =
      compute_capability == 90 ? QR_LAYOUT_ACTIVATIONS_SPLIT_V1 : QR_LAYOUT_ACTIVATIONS_PACKED_V1;
  *weight_layout = QR_LAYOUT_WEIGHTS_FRAGMENTS_V1;
  return QR_OK;
}

}  // extern "C"
