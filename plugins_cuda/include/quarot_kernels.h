// SPDX-License-Identifier: Apache-2.0
//
// The C ABI of the QuaRot kernels: raw device pointers, sizes, a caller's workspace, a stream, a
// status.
//
// Two libraries export exactly this ABI: libquarot_kernels.so (nvcc; pointers are device pointers,
// the stream is a cudaStream_t) and libquarot_kernels_cpu.so (the same kernel sources under the
// emulator in emu/; pointers are host pointers, the stream is ignored). One test suite drives both.
//
// Rules that every entry point keeps:
//   * it checks its arguments against the table of supported shapes (kernels/shapes.hpp) and
//   returns a qr_status;
//     nothing is launched when the status is not QR_OK; sizes are checked before tensors, so that a
//     call with x, q or k NULL returns QR_ERROR_NULL_POINTER exactly where its sizes are supported;
//   * it never allocates, synchronizes, throws or reads device memory on the host: a call can be
//   captured in a CUDA graph;
//   * scratch memory is the caller's: *_workspace_size() gives its size in bytes; 256-byte
//   alignment is enough;
//   * every tensor pointer is 16-byte aligned and every tensor is dense and row-major unless
//   strides are given;
//   * packed INT4 holds two codes per byte, the even index in the low nibble. "s4" codes are two's
//   complement
//     (-8..7), "u4" codes are 0..15.
#ifndef QUAROT_KERNELS_H_
#define QUAROT_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Increases when a struct or the meaning of an argument changes.
#define QR_ABI_VERSION 3

#if defined(_WIN32)
#define QR_EXPORT __declspec(dllexport)
#else
#define QR_EXPORT __attribute__((visibility("default")))
#endif

typedef enum qr_status {
  QR_OK = 0,
  QR_ERROR_NULL_POINTER = 1,       // a required pointer is NULL
  QR_ERROR_MISALIGNED = 2,         // a pointer is not 16-byte aligned
  QR_ERROR_UNSUPPORTED_DTYPE = 3,  // a dtype is not one that the entry point lists
  QR_ERROR_UNSUPPORTED_SHAPE = 4,  // sizes outside the table of supported shapes
  QR_ERROR_UNSUPPORTED_PLAN = 5,   // a Hadamard plan outside the table of supported plans
  QR_ERROR_UNSUPPORTED_LAYOUT =
      6,  // an operand layout that this architecture's kernel does not read
  QR_ERROR_WORKSPACE_TOO_SMALL = 7,  // workspace_bytes < *_workspace_size()
  QR_ERROR_BAD_ARGUMENT = 8,  // another argument is out of range (a clip ratio, a split count)
  QR_ERROR_ARCHITECTURE = 9,  // the library has no code for this device
  QR_ERROR_LAUNCH = 10        // the CUDA runtime refused the launch
} qr_status;

// One sentence for a status, never NULL.
QR_EXPORT const char* qr_status_string(int status);
QR_EXPORT int qr_abi_version(void);
// "cuda" or "emulation".
QR_EXPORT const char* qr_backend(void);

typedef enum qr_dtype {
  QR_DTYPE_FP16 = 0,
  QR_DTYPE_BF16 = 1,
  QR_DTYPE_INT32 =
      2  // GEMM output only: the exact sums, for tests and for callers that scale elsewhere
} qr_dtype;

// A byte order of INT4 codes and its version: "QR" (0x5152), the order, the version. The same
// values are in quarot_onnx/plugins/layouts.py, where each order is defined in NumPy.
typedef enum qr_layout {
  // Weights [n, k/2] bytes, s4, low nibble first: what ONNX stores.
  QR_LAYOUT_WEIGHTS_PACKED_V1 = 0x51520101,
  // Weights [n/64, k/64, 4 warps, 32 lanes, 16 bytes], n padded to 64 and k to 128 with zero codes:
  // a lane's 16
  // bytes are its tensor-core A operand for 64 x 64 codes.
  QR_LAYOUT_WEIGHTS_FRAGMENTS_V1 = 0x51520201,
  // Activations [rows, k/2] bytes, s4, low nibble first. 0.5 B per element.
  QR_LAYOUT_ACTIVATIONS_PACKED_V1 = 0x51520301,
  // Activations [k/128, rows, 128] signed bytes, rows padded to 8 and k to 128. Of each 64 codes
  // the 32 even ones
  // come first, then the 32 odd ones; 16-byte chunk c of row r lies at chunk c ^ (r % 8): the
  // 128-byte swizzle of
  // wgmma, so that a linear bulk copy loads a tile. 1 B per element. Padding rows are not written
  // and not used.
  QR_LAYOUT_ACTIVATIONS_SPLIT_V1 = 0x51520401
} qr_layout;

// ---------------------------------------------------------------------------------------------------------
// Hadamard transforms and quantization of activations
// ---------------------------------------------------------------------------------------------------------

#define QR_MAX_DENSE_FACTORS 3

// y = x (I ⊗ D_1 ⊗ D_2 ⊗ .. ⊗ S ⊗ I_inner) on the last axis: y[..., j] = sum_i x[..., i] H[i, j].
// D_i are dense orthonormal ±1/sqrt(order) matrices (tensor cores), S is the Sylvester matrix of
// order `butterflies` (a fast transform). The row length is a multiple of the product of all orders
// and inner; the leading identity (block-diagonal transforms) fills the rest. inner = 1 is the
// ordinary transform; inner = head_dim is the transform across heads. qr_make_hadamard_plan fills
// this from a list of Kronecker factors.
typedef struct qr_hadamard_plan {
  int32_t dense[QR_MAX_DENSE_FACTORS];  // orders, slowest index first, multiples of 4 up to 192; 0
                                        // where unused
  int32_t butterflies;                  // a power of two; 1: none; 0: no transform at all
  int32_t inner;                        // a power of two, >= 1
  // Signs of the dense factors, one after the other, as qr_make_hadamard_plan writes them; device
  // memory, 16-byte aligned; may be NULL when there is no dense factor.
  const uint32_t* signs;
} qr_hadamard_plan;

// Number of 32-bit sign words of the plan that qr_make_hadamard_plan makes of these factors; 0 when
// it needs none or refuses them.
QR_EXPORT size_t qr_hadamard_sign_words(const int32_t* factors, int32_t num_factors);
// Host function. Turns H_f1 ⊗ H_f2 ⊗ .. (any order, as an ONNX node's `factors`) into a plan:
// trailing powers of two become butterflies; a power of two in front of another factor is
// multiplied into it (Sylvester ⊗ H_f). `matrices` holds the ±1 matrices H_f [f, f] (int8,
// row-major, H[i, j]) of those factors that are not powers of two, in order, one after the other.
// `words` (host memory) receives the signs; the caller copies them to the device and sets
// plan->signs. With both NULL only the plan's sizes are filled in.
QR_EXPORT int qr_make_hadamard_plan(const int32_t* factors, int32_t num_factors, int32_t inner,
                                    const int8_t* matrices, uint32_t* words,
                                    qr_hadamard_plan* plan);

// What happens to a row before the Hadamard transform. The result is rounded once to `dtype`, so a
// fused call equals the sequence of separate operators.
typedef enum qr_prologue {
  QR_PROLOGUE_NONE = 0,
  QR_PROLOGUE_RMSNORM = 1,  // x / sqrt(mean(x^2) + epsilon) * norm_weight (all in fp32)
  QR_PROLOGUE_SILU_MUL = 2  // gate / (1 + exp(-gate)) * up, with gate = x
} qr_prologue;

typedef enum qr_epilogue {
  QR_EPILOGUE_STORE = 0,  // y in `dtype`
  QR_EPILOGUE_QUANTIZE =
      1  // symmetric INT4 codes in `activation_layout` and one fp32 scale per row
} qr_epilogue;

typedef struct qr_transform_args {
  int32_t dtype;              // qr_dtype of x, up, norm_weight and y: fp16 or bf16
  int32_t prologue;           // qr_prologue
  int32_t epilogue;           // qr_epilogue
  int32_t activation_layout;  // qr_layout of `codes`
  int64_t rows;               // tokens; 0 is allowed and does nothing
  int64_t n;                  // row length, a multiple of 128
  const void* x;              // [rows, n] dtype; row r starts at x + r * x_stride elements
  int64_t
      x_stride;  // elements between rows, a multiple of 8, >= n (gate and up may share one matrix)
  const void* up;           // [rows, n] dtype, only with QR_PROLOGUE_SILU_MUL
  int64_t up_stride;        // elements between rows of up
  const void* norm_weight;  // [n] dtype or NULL (all ones), only with QR_PROLOGUE_RMSNORM
  float epsilon;            // of the RMSNorm
  float clip_ratio;  // scale = max|y| * (clip_ratio / 7), 1 for a zero row; 0 < clip_ratio <= 1
  qr_hadamard_plan hadamard;  // butterflies = 0: none
  void* y;                    // [rows, n] dtype (QR_EPILOGUE_STORE)
  void* codes;                // in activation_layout (QR_EPILOGUE_QUANTIZE)
  float* scale;               // [rows] (QR_EPILOGUE_QUANTIZE)
  void* workspace;            // qr_transform_workspace_size() bytes; NULL where that is 0
  size_t workspace_bytes;
} qr_transform_args;

// Prologue, Hadamard transform, epilogue, in one pass over the data: FWHT alone, FWHT + quantize,
// RMSNorm + quantize (no factors), SiLU(gate)*up + FWHT + quantize, transform across heads, plain
// quantize. A row that the shared memory of a block cannot hold on the current device (see the
// table in docs/kernels.md) passes through the workspace as fp32 instead.
//
// Bytes for rows, n, hadamard and prologue of `args`, on the current device; 0 for most shapes, and
// for arguments that qr_transform refuses. What it holds before does not matter.
QR_EXPORT size_t qr_transform_workspace_size(const qr_transform_args* args);
QR_EXPORT int qr_transform(const qr_transform_args* args, void* stream);

// ---------------------------------------------------------------------------------------------------------
// INT4 x INT4 GEMM
// ---------------------------------------------------------------------------------------------------------

// Bytes of an [n, k] weight in `layout`; 0 when the shape or the layout is not supported.
QR_EXPORT size_t qr_weight_bytes(int32_t layout, int64_t n, int64_t k);
// Device to device: packed order [n, k/2] to `layout`. Run once at load time.
QR_EXPORT int qr_pack_weight(int32_t layout, int64_t n, int64_t k, const void* packed, void* out,
                             void* stream);
// Device to device: w_sum[n] = sum over k of the weight's codes, for asymmetric activations.
QR_EXPORT int qr_weight_sums(int64_t n, int64_t k, const void* packed, int32_t* w_sum,
                             void* stream);
// Device to device: activations from packed order [m, k/2] to split order.
QR_EXPORT int qr_split_activations(int64_t m, int64_t k, const void* packed, void* split,
                                   void* stream);

// Which kernel runs. AUTO picks by compute capability and m; the others exist for tests and
// benchmarks.
typedef enum qr_gemm_kernel {
  QR_GEMM_AUTO = 0,
  QR_GEMM_MMA_S4 = 1,    // mma.sync m16n8k64 s4 (sm_80..89 only)
  QR_GEMM_MMA_S8 = 2,    // mma.sync m16n8k32 s8 after register unpacking (every architecture)
  QR_GEMM_WGMMA_S8 = 3,  // wgmma m64nNk32 s8, weights from registers (sm_90a only)
  QR_GEMM_DECODE = 4,    // split-K for m <= 16 (every architecture)
  QR_GEMM_CUTLASS = 5    // optional backend for sm_80..89, when the library was built with it
} qr_gemm_kernel;

// y[m, n] = (acc - zero_m * w_sum_n) * scale_m * w_scale_n + bias_n, acc = sum_k q[m, k] w[n, k]
// exact in int32, scaled in fp32 in that order, rounded once to out_dtype. out_dtype =
// QR_DTYPE_INT32 stores acc itself.
typedef struct qr_gemm_args {
  int32_t kernel;             // qr_gemm_kernel
  int32_t out_dtype;          // qr_dtype of y
  int32_t activation_layout;  // qr_layout of q
  int32_t weight_layout;      // qr_layout of w
  int64_t m, n, k;            // tokens, out features, in features
  const void* q;              // activation codes in activation_layout
  const float* scale;         // [m]
  const float* zero;          // [m], integer-valued, or NULL (symmetric activations)
  const void* w;              // weight codes in weight_layout
  const float* w_scale;       // [n]
  const int32_t* w_sum;       // [n], required with zero
  const float* bias;          // [n] fp32 or NULL, added before the rounding
  void* y;                    // [m, n] out_dtype; row r starts at y + r * y_stride elements
  int64_t y_stride;           // elements between rows of y, >= n
  int32_t split_k;            // decode kernel: number of K slices; 0 chooses
  void* workspace;  // qr_gemm_workspace_size() bytes; zeroed once by qr_gemm_workspace_init(), left
                    // zeroed
  size_t workspace_bytes;
} qr_gemm_args;

QR_EXPORT size_t qr_gemm_workspace_size(const qr_gemm_args* args);
// Zeroes the workspace (stream-ordered, capture-safe). Once per workspace is enough: every GEMM
// leaves it zeroed.
QR_EXPORT int qr_gemm_workspace_init(void* workspace, size_t workspace_bytes, void* stream);
QR_EXPORT int qr_gemm(const qr_gemm_args* args, void* stream);

// The layouts that the fastest kernel reads on a device of compute capability 10 * major + minor
// for m tokens. A graph builder asks this once and makes the quantizing kernel write that
// activation layout.
QR_EXPORT int qr_gemm_preferred_layouts(int32_t compute_capability, int64_t m,
                                        int32_t* activation_layout, int32_t* weight_layout);

// ---------------------------------------------------------------------------------------------------------
// INT4 KV cache
// ---------------------------------------------------------------------------------------------------------

// One tensor (K or V) of a cache: u4 codes with an fp32 scale and an integer-valued fp32 zero point
// per token per kv head; value = (code - zero) * scale.
typedef struct qr_kv_cache {
  uint8_t* codes;  // [batch, kv_heads, capacity, head_dim/2]
  float* scale;    // [batch, kv_heads, capacity]
  float* zero;     // [batch, kv_heads, capacity]
} qr_kv_cache;

typedef struct qr_kv_append_args {
  int32_t dtype;  // qr_dtype of k and v
  int32_t batch, kv_heads, head_dim;
  int64_t tokens;      // new tokens per sequence; 0 is allowed
  int64_t capacity;    // tokens that the cache has room for, a multiple of 4
  const void* k;       // K after RoPE; element (b, h, t, d) at k + b*strides[0] + h*strides[1] +
                       // t*strides[2] + d
  const void* v;       // V, same strides; NULL: there is only K, and `value` is not looked at
  int64_t strides[3];  // elements; multiples of 8
  const int32_t*
      lengths;       // [batch] device memory: tokens already in the cache, or NULL: `start` for all
  int32_t start;     // used when lengths is NULL
  int32_t rotate_k;  // 1: apply the R3 Hadamard of head_dim to K before quantizing
  float clip_ratio;  // 0 < clip_ratio <= 1
  qr_kv_cache key, value;
} qr_kv_append_args;

// Quantizes the new K and V per token per head and writes them at [lengths[b], lengths[b] +
// tokens). Tokens that would fall beyond the capacity are dropped, never written out of bounds.
QR_EXPORT int qr_kv_append(const qr_kv_append_args* args, void* stream);

typedef struct qr_kv_attention_args {
  int32_t dtype;     // qr_dtype of q and y
  int32_t epilogue;  // qr_epilogue: y, or INT4 codes for o_proj
  int32_t activation_layout;
  int32_t batch, heads, kv_heads, head_dim;
  int64_t query_tokens;  // query tokens per sequence: 1 in decode
  int64_t capacity;      // of the cache
  int64_t max_length;    // upper bound of every length after the append; sets the grid, so a graph
                         // can be replayed
  const void*
      q;  // after RoPE; element (b, h, t, d) at q + b*strides[0] + h*strides[1] + t*strides[2] + d
  int64_t strides[3];      // elements; multiples of 8
  qr_kv_cache key, value;  // read only
  const int32_t* lengths;  // [batch] device memory: tokens in the cache BEFORE the query tokens
                           // were appended, or NULL: max_length - query_tokens. Query t attends to
                           // positions 0 .. lengths[b] + t.
  const uint8_t*
      mask;  // [batch, query_tokens, max_length], 0 = masked (in addition to causality), or NULL
  float softmax_scale;              // usually 1/sqrt(head_dim)
  int32_t rotate_q;                 // 1: apply the R3 Hadamard of head_dim to q first
  int32_t split_kv;                 // number of KV slices; 0 chooses
  qr_hadamard_plan heads_hadamard;  // across heads, applied to the output row; inner must be
                                    // head_dim; butterflies = 0: none
  float clip_ratio;                 // QR_EPILOGUE_QUANTIZE
  void* y;       // [batch, query_tokens, heads * head_dim] dtype (QR_EPILOGUE_STORE)
  void* codes;   // in activation_layout, rows = batch * query_tokens (QR_EPILOGUE_QUANTIZE)
  float* scale;  // [batch * query_tokens]
  void* workspace;
  size_t workspace_bytes;
} qr_kv_attention_args;

QR_EXPORT size_t qr_kv_attention_workspace_size(const qr_kv_attention_args* args);
// softmax(softmax_scale * q K^T + mask) V over the packed cache, causal, with grouped queries
// (query head h reads kv head h / (heads / kv_heads)). query_tokens <= 8 runs the split-KV decode
// kernel; more runs the tiled prefill kernel.
QR_EXPORT int qr_kv_attention(const qr_kv_attention_args* args, void* stream);

// Cache to dense: values [batch, kv_heads, tokens, head_dim] of positions 0 .. tokens-1, for a
// chunked prefill that hands K and V to another attention kernel.
QR_EXPORT int qr_kv_dequantize(int32_t dtype, int32_t batch, int32_t kv_heads, int32_t head_dim,
                               int64_t capacity, int64_t tokens, const qr_kv_cache* cache,
                               void* values, void* stream);

// ---------------------------------------------------------------------------------------------------------
// Emulation build only (qr_backend() == "emulation"): knobs and counters of the emulator.
// ---------------------------------------------------------------------------------------------------------

typedef struct qr_emulation_counters {
  int64_t blocks;        // thread blocks run
  int64_t matrix_loads;  // 8x8 phases of ldmatrix / stmatrix
  int64_t
      matrix_load_conflicts;  // extra cycles of those phases through shared-memory bank conflicts
  int64_t vector_accesses;    // checked shared-memory vector accesses (warp-level), see emu/
  int64_t vector_conflicts;   // their extra cycles
  int64_t mma_instructions;   // mma.sync and wgmma warp-level instructions
  int64_t async_copies;       // cp.async and bulk copies
} qr_emulation_counters;

typedef struct qr_emulation_options {
  uint32_t seed;    // 0: threads run in index order and copies land late; else both are random
  int32_t workers;  // operating-system threads
  int32_t compute_capability;  // what host dispatch believes it runs on (80, 86, 89, 90, 120)
  int32_t check_races;         // 1: watch every byte of shared memory
  int32_t count_banks;         // 1: count bank conflicts of vector accesses (slow)
} qr_emulation_options;

QR_EXPORT void qr_emulation_configure(const qr_emulation_options* options);
QR_EXPORT void qr_emulation_reset_counters(void);
QR_EXPORT void qr_emulation_read_counters(qr_emulation_counters* counters);

#ifdef __cplusplus
}
#endif

#endif  // QUAROT_KERNELS_H_
