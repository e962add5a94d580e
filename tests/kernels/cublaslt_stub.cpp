// SPDX-License-Identifier: Apache-2.0
// The part of cuBLASLt that the benchmark's baseline calls, on the CPU: the prototypes of
// cublasLt.h, column-major s8 x s8 -> s32 with the first operand transposed, refusals with status 7
// (CUBLAS_STATUS_INVALID_VALUE). It shows that arguments arrive as the header wants them.
#include <cstdint>
#include <cstring>

namespace {

struct Operation {
  int compute_type, scale_type;
  int32_t transpose_a;
};
struct Matrix {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};
struct Preference {
  size_t workspace_bytes;
};
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};
constexpr uint64_t kAlgorithm = 0x0123456789abcdef;
constexpr int kInvalid = 7;
int handle;

}  // namespace

extern "C" {

int cublasLtCreate(void** out) {
  *out = &handle;
  return 0;
}
int cublasLtMatmulDescCreate(Operation** out, int compute_type, int scale_type) {
  *out = new Operation{compute_type, scale_type, 0};
  return compute_type == 72 && scale_type == 10 ? 0 : kInvalid;
}
int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value,
                                   size_t bytes) {
  if (attribute != 3 || bytes != sizeof(int32_t)) return kInvalid;
  memcpy(&operation->transpose_a, value, bytes);
  return 0;
}
int cublasLtMatrixLayoutCreate(Matrix** out, int type, uint64_t rows, uint64_t columns,
                               int64_t leading) {
  *out = new Matrix{type, rows, columns, leading};
  return (type == 3 || type == 10) && leading >= static_cast<int64_t>(rows) ? 0 : kInvalid;
}
int cublasLtMatmulPreferenceCreate(Preference** out) {
  *out = new Preference{0};
  return 0;
}
int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value,
                                         size_t bytes) {
  if (attribute != 1 || bytes != sizeof(size_t)) return kInvalid;
  memcpy(&preference->workspace_bytes, value, bytes);
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void* from, Operation* operation, Matrix* a, Matrix* b,
                                   Matrix* c, Matrix* d, Preference* preference, int requested,
                                   Heuristic* results, int* returned) {
  if (from != &handle || operation->transpose_a != 1 || requested != 1) return kInvalid;
  if (preference->workspace_bytes != size_t{64} << 20 || c != d) return kInvalid;
  if (a->rows != b->rows || a->columns != c->rows || b->columns != c->columns) return kInvalid;
  *returned = a->rows % 4 == 0;  // none, without an error, for odd sizes
  results->algorithm[0] = kAlgorithm;
  results->state = 0;
  return 0;
}
int cublasLtMatmul(void* from, Operation* operation, const void* alpha, const void* a_data,
                   Matrix* a, const void* b_data, Matrix* b, const void* beta, const void* c_data,
                   Matrix* c, void* d_data, Matrix* d, const Heuristic* algorithm, void* workspace,
                   size_t workspace_bytes, void* stream) {
  if (from != &handle || !operation || c_data != d_data || c != d || stream) return kInvalid;
  if (algorithm->algorithm[0] != kAlgorithm || !workspace || workspace_bytes != size_t{64} << 20)
    return kInvalid;
  const int32_t one = *static_cast<const int32_t*>(alpha);
  if (one != 1 || *static_cast<const int32_t*>(beta) != 0) return kInvalid;
  for (uint64_t column = 0; column < d->columns; column++)
    for (uint64_t row = 0; row < d->rows; row++) {
      int32_t sum = 0;
      for (uint64_t k = 0; k < a->rows; k++)
        sum += static_cast<const int8_t*>(a_data)[row * a->leading + k] *
               static_cast<const int8_t*>(b_data)[column * b->leading + k];
      static_cast<int32_t*>(d_data)[column * d->leading + row] = sum;
    }
  return 0;
}
}
