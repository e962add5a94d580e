// SPDX-License-Identifier: Apache-2.0
// New K and V into the packed cache, and the cache back to dense values.
//
//   K --> Hadamard of head_dim (R3) --> min, max --> scale, zero, codes --> packed, in place
//   V ------------------------------->
//
// One head of one token is a group: 16 or 32 lanes hold it in registers, so the Hadamard is a few
// register butterflies and 4 or 5 shuffles, and nothing touches shared memory. The kernel is bound
// by latency in decode (one launch for K and V together) and by memory in prefill.
#include "kv_cache.cuh"

namespace qr {

namespace {

constexpr int kAppendThreads = 128;

struct AppendParams {
  const void* source[2];  // K, V: element (b, h, t, d) at b * strides[0] + h * strides[1] + t *
                          // strides[2] + d
  CacheView cache[2];
  int64_t strides[3], tokens, capacity;
  const int32_t* lengths;  // [batch] or null
  int batch, kv_heads, start, rotate_k;
  float clip_ratio, clip_over_qmax;
};

}  // namespace

// T: f16 or bf16. kHeadDim: 64, 128 or 256. blockIdx.y: 0 is K, 1 is V (where there is one).
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kAppendThreads) kv_append_kernel(const AppendParams p) {
  constexpr int kLanes = kHeadDim == 64 ? 16 : 32, kEach = kHeadDim / kLanes;
  const int part = blockIdx.y, in_group = lane() % kLanes, d = in_group * kEach;
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x) / kLanes;
  const int64_t groups = static_cast<int64_t>(p.batch) * p.kv_heads * p.tokens;
  const int64_t t = group % p.tokens, head = group / p.tokens % p.kv_heads;
  const int64_t b = group / p.tokens / p.kv_heads;
  const bool valid = group < groups;

  // ---- load
  uint32_t words[kEach / 2] = {};
  if (valid) {
    const uint16_t* x = static_cast<const uint16_t*>(p.source[part]) + b * p.strides[0] +
                        head * p.strides[1] + t * p.strides[2] + d;
    memcpy(words, __builtin_assume_aligned(x, kEach * 2), sizeof words);
  }
  float v[kEach];
#pragma unroll
  for (int i = 0; i < kEach / 2; i++) {
    const float2 pair = unpack_pair<T>(words[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }

  // ---- R3
  if (part == 0 && p.rotate_k) {
    hadamard_of_lanes<kLanes>(v, in_group);
#pragma unroll
    for (int i = 0; i < kEach; i++) v[i] = __fmul_rn(v[i], head_norm<kHeadDim>());
  }

  // ---- quantize: the range includes 0, so that the zero point is a code
  float low = 0.f, high = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    low = fminf(low, v[i]);
    high = fmaxf(high, v[i]);
  }
  low = warp_min<kLanes>(low);
  high = warp_max<kLanes>(high);
  const float span = __fsub_rn(high, low);
  const float scale = span == 0.f ? 1.f : __fmul_rn(span, p.clip_over_qmax);
  const float zero = rintf(__fdiv_rn(__fmul_rn(-low, p.clip_ratio), scale));
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const float code = fminf(fmaxf(__fadd_rn(rintf(__fdiv_rn(v[i], scale)), zero), 0.f), 15.f);
    codes |= static_cast<uint32_t>(code) << (4 * i);
  }

  // ---- store, in place; what does not fit is dropped
  if (!valid) return;
  const int64_t position = (p.lengths ? p.lengths[b] : p.start) + t;
  if (position < 0 || position >= p.capacity) return;
  const CacheView& cache = p.cache[part];
  const int64_t slot = (b * p.kv_heads + head) * p.capacity + position;
  uint8_t* out = cache.codes + slot * (kHeadDim / 2) + d / 2;
  if constexpr (kEach == 8)
    *reinterpret_cast<uint32_t*>(out) = codes;
  else
    *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(codes);
  if (in_group == 0) {
    cache.scale[slot] = scale;
    cache.zero[slot] = zero;
  }
}

// One thread: 8 codes. values: [batch * kv_heads, tokens, head_dim] of T.
template <class T>
__global__ void __launch_bounds__(kAppendThreads) kv_dequantize_kernel(const CacheView cache,
                                                                       int64_t heads,
                                                                       int64_t capacity,
                                                                       int64_t tokens, int head_dim,
                                                                       T* values) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  const int words = head_dim / 8;
  const int64_t token = index / words;
  if (token >= heads * tokens) return;
  const int64_t slot = token / tokens * capacity + token % tokens;
  const int word = static_cast<int>(index % words);
  const uint32_t codes = reinterpret_cast<const uint32_t*>(cache.codes)[slot * words + word];
  const float scale = cache.scale[slot], zero = cache.zero[slot];
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    out[i] = pack_pair<T>((static_cast<float>(codes >> (8 * i) & 15) - zero) * scale,
                          (static_cast<float>(codes >> (8 * i + 4) & 15) - zero) * scale);
  reinterpret_cast<uint4*>(values)[token * words + word] =
      make_uint4(out[0], out[1], out[2], out[3]);
}

namespace {

template <class T>
int launch_append(const AppendParams& p, int head_dim, cudaStream_t stream) {
  const int64_t lanes = head_dim == 64 ? 16 : 32;
  const int64_t blocks =
      (p.batch * p.kv_heads * p.tokens * lanes + kAppendThreads - 1) / kAppendThreads;
  if (blocks > 0x7fffffff) return QR_ERROR_UNSUPPORTED_SHAPE;
  const dim3 grid(static_cast<unsigned>(blocks), p.source[1] ? 2 : 1);
  if (head_dim == 64)
    return QR_LAUNCH((kv_append_kernel<T, 64>), grid, kAppendThreads, 0, stream, p);
  if (head_dim == 128)
    return QR_LAUNCH((kv_append_kernel<T, 128>), grid, kAppendThreads, 0, stream, p);
  return QR_LAUNCH((kv_append_kernel<T, 256>), grid, kAppendThreads, 0, stream, p);
}

template <class T>
int launch_dequantize(const CacheView& cache, int64_t heads, int64_t capacity, int64_t tokens,
                      int head_dim, void* values, cudaStream_t stream) {
  const int64_t blocks = (heads * tokens * (head_dim / 8) + kAppendThreads - 1) / kAppendThreads;
  if (blocks > 0x7fffffff) return QR_ERROR_UNSUPPORTED_SHAPE;
  return QR_LAUNCH((kv_dequantize_kernel<T>), static_cast<unsigned>(blocks), kAppendThreads, 0,
                   stream, cache, heads, capacity, tokens, head_dim, static_cast<T*>(values));
}

}  // namespace

}  // namespace qr

extern "C" QR_EXPORT int qr_kv_append(const qr_kv_append_args* a, void* stream) {
  using namespace qr;
  if (!a) return QR_ERROR_NULL_POINTER;
  if (!is_activation_dtype(a->dtype)) return QR_ERROR_UNSUPPORTED_DTYPE;
  QR_RETURN_IF_ERROR(check_cache_shape(a->batch, a->kv_heads, a->head_dim, a->capacity));
  if (a->tokens < 0) return QR_ERROR_UNSUPPORTED_SHAPE;
  if (!(a->clip_ratio > 0 && a->clip_ratio <= 1)) return QR_ERROR_BAD_ARGUMENT;
  QR_RETURN_IF_ERROR(check_pointer(a->k));
  QR_RETURN_IF_ERROR(check_strides(a->strides));
  QR_RETURN_IF_ERROR(check_cache(a->key));
  if (a->v) {
    QR_RETURN_IF_ERROR(check_pointer(a->v));
    QR_RETURN_IF_ERROR(check_cache(a->value));
  }
  if (a->tokens == 0) return QR_OK;
  AppendParams p{};
  p.source[0] = a->k;
  p.source[1] = a->v;
  p.cache[0] = view_of(a->key);
  p.cache[1] = view_of(a->value);
  for (int i = 0; i < 3; i++) p.strides[i] = a->strides[i];
  p.tokens = a->tokens;
  p.capacity = a->capacity;
  p.lengths = a->lengths;
  p.batch = a->batch;
  p.kv_heads = a->kv_heads;
  p.start = a->start;
  p.rotate_k = a->rotate_k;
  p.clip_ratio = a->clip_ratio;
  p.clip_over_qmax = a->clip_ratio / 15.f;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return a->dtype == QR_DTYPE_FP16 ? launch_append<f16>(p, a->head_dim, s)
                                   : launch_append<bf16>(p, a->head_dim, s);
}

extern "C" QR_EXPORT int qr_kv_dequantize(int32_t dtype, int32_t batch, int32_t kv_heads,
                                          int32_t head_dim, int64_t capacity, int64_t tokens,
                                          const qr_kv_cache* cache, void* values, void* stream) {
  using namespace qr;
  if (!cache) return QR_ERROR_NULL_POINTER;
  if (!is_activation_dtype(dtype)) return QR_ERROR_UNSUPPORTED_DTYPE;
  QR_RETURN_IF_ERROR(check_cache_shape(batch, kv_heads, head_dim, capacity));
  if (tokens < 0 || tokens > capacity) return QR_ERROR_UNSUPPORTED_SHAPE;
  QR_RETURN_IF_ERROR(check_cache(*cache));
  QR_RETURN_IF_ERROR(check_pointer(values));
  if (tokens == 0) return QR_OK;
  const int64_t heads = static_cast<int64_t>(batch) * kv_heads;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return dtype == QR_DTYPE_FP16
             ? launch_dequantize<f16>(view_of(*cache), heads, capacity, tokens, head_dim, values, s)
             : launch_dequantize<bf16>(view_of(*cache), heads, capacity, tokens, head_dim, values,
                                       s);
}
