// SPDX-License-Identifier: Apache-2.0
// Small kernels, right and wrong, for test_emulator.py: ./emulator_cases NAME SEED runs one of
// them. A right one prints "ok"; a wrong one must be stopped by the emulator.
#include <cstdio>
#include <string>

#include "../../plugins_cuda/kernels/common.cuh"

using namespace qr;

namespace {

int result[4096];

// Neighbours exchange through shared memory, with or without what makes that legal.
template <bool kBarrier>
void exchange_kernel() {
  QR_DYN_SMEM(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = threadIdx.x;
  store_shared<int>(values + t, t * t);
  if (kBarrier) __syncthreads();
  result[t] = load_shared<int>(values + (t + 32) % 64);
}

// The same within a warp, where __syncwarp is enough.
template <bool kBarrier>
void exchange_in_warp_kernel() {
  QR_DYN_SMEM(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = threadIdx.x;
  store_shared<int>(values + t, t * t);
  if (kBarrier) __syncwarp();
  result[t] = load_shared<int>(values + (t ^ 1));
}

// Reads, then overwrites what others may still be reading.
void overwrite_kernel() {
  QR_DYN_SMEM(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = threadIdx.x;
  store_shared<int>(values + t, t);
  __syncthreads();
  result[t] = load_shared<int>(values + (t + 32) % 64);
  store_shared<int>(values + t, -1);
}

void two_writers_kernel() {
  QR_DYN_SMEM(shared);
  store_shared<int>(shared, static_cast<int>(threadIdx.x));
}

void divergent_barrier_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

void early_return_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

void partial_barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

void divergent_shuffle_kernel() {
  if (threadIdx.x % 32 < 16) result[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

void mixed_operations_kernel() {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    result[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

void out_of_bounds_kernel() {
  QR_DYN_SMEM(shared);
  store_shared<int>(shared + 4 * 64 + 4 * threadIdx.x, 1);
}

void raw_out_of_bounds_kernel() {  // through a plain pointer: found in the guard zone at the
                                   // block's end
  QR_DYN_SMEM(shared);
  if (threadIdx.x == 0) shared[256] = 1;
}

void misaligned_kernel() {
  QR_DYN_SMEM(shared);
  if (threadIdx.x == 0) store_shared<int>(shared + 2, 1);
}

void poison_kernel() {
  QR_DYN_SMEM(shared);
  result[threadIdx.x] = load_shared<int>(shared + 4 * threadIdx.x) == static_cast<int>(0xA5A5A5A5);
}

// 16 bytes per lane by cp.async; kWait = groups that may be pending when they are read.
template <int kWait>
void async_kernel(const int* source) {
  QR_DYN_SMEM(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = threadIdx.x;
  cp_async16(values + 4 * t, source + 4 * t, true);
  cp_commit();
  cp_async16(values + 128 + 4 * t, source, false);
  cp_commit();
  cp_wait<kWait>();
  __syncwarp();
  result[t] = load_shared<int>(values + (4 * t + 4) % 128) + load_shared<int>(values + 128 + 4 * t);
}

// D = A B with A[i][k] = i + k, B[k][j] = (k == j) (+ 8 columns): D[i][j] = i + j.
void mma_kernel() {
  const int l = lane(), g = l / 4, q = l % 4;
  const auto a = [](int row, int k) { return static_cast<float>(row + k); };
  const uint32_t ra[4] = {pack_pair<f16>(a(g, 2 * q), a(g, 2 * q + 1)),
                          pack_pair<f16>(a(g + 8, 2 * q), a(g + 8, 2 * q + 1)),
                          pack_pair<f16>(a(g, 2 * q + 8), a(g, 2 * q + 9)),
                          pack_pair<f16>(a(g + 8, 2 * q + 8), a(g + 8, 2 * q + 9))};
  const uint32_t rb[2] = {pack_pair<f16>(2 * q == g, 2 * q + 1 == g), pack_pair<f16>(0.f, 0.f)};
  float c[4] = {100, 100, 100, 100};
  mma_16<f16>(c, ra, rb);
  for (int r = 0; r < 4; r++) {
    const int row = g + (r >> 1) * 8, column = 2 * q + (r & 1);
    result[row * 8 + column] = c[r] == 100 + row + column;
  }
}

// Rows of 128 bytes, 8 of them at one column: eight-way conflict; swizzled: none.
template <bool kSwizzled>
void ldmatrix_kernel() {
  QR_DYN_SMEM(shared);
  const int l = lane(), row = l % 8, chunk = l / 8;
  for (int i = l; i < 8 * 64; i += 32) {  // element (r, c) of 16 bits is 64 r + c
    const int r = i / 64, c = i % 64, place = kSwizzled ? (c / 8) ^ r : c / 8;
    store_shared<uint16_t>(shared + r * 128 + place * 16 + c % 8 * 2, static_cast<uint16_t>(i));
  }
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, shared + row * 128 + (kSwizzled ? chunk ^ row : chunk) * 16);
  for (int m = 0; m < 4; m++) {
    const uint32_t want = static_cast<uint32_t>(64 * (l / 4) + 8 * m + l % 4 * 2);
    result[m * 32 + l] = r[m] == (want | (want + 1) << 16);
  }
  const uint32_t back = transpose_fragment(transpose_fragment(r[0]));
  result[l] &= back == r[0];
}

template <int kStride>
void bank_kernel() {
  QR_DYN_SMEM(shared);
  store_shared<int>(shared + 4 * kStride * threadIdx.x, 1);
}

bool all_set(int count) {
  for (int i = 0; i < count; i++)
    if (!result[i]) return false;
  return true;
}

bool run(const std::string& name) {
  static int source[128];
  for (int i = 0; i < 128; i++) source[i] = i + 1;
  emu::Counters& counters = emu::counters();
  if (name == "exchange") {
    QR_LAUNCH((exchange_kernel<true>), 3, 64, 256, nullptr);
    for (int t = 0; t < 64; t++)
      if (result[t] != (t + 32) % 64 * ((t + 32) % 64)) return false;
    return true;
  }
  if (name == "no-barrier")
    return QR_LAUNCH((exchange_kernel<false>), 1, 64, 256, nullptr) == QR_OK;
  if (name == "exchange-in-warp")
    return QR_LAUNCH((exchange_in_warp_kernel<true>), 1, 64, 256, nullptr) == QR_OK &&
           result[1] == 0 && result[0] == 1;
  if (name == "no-warp-barrier")
    return QR_LAUNCH((exchange_in_warp_kernel<false>), 1, 64, 256, nullptr) == QR_OK;
  if (name == "overwrite") return QR_LAUNCH(overwrite_kernel, 1, 64, 256, nullptr) == QR_OK;
  if (name == "two-writers") return QR_LAUNCH(two_writers_kernel, 1, 64, 256, nullptr) == QR_OK;
  if (name == "divergent-barrier")
    return QR_LAUNCH(divergent_barrier_kernel, 1, 64, 0, nullptr) == QR_OK;
  if (name == "early-return") return QR_LAUNCH(early_return_kernel, 1, 64, 0, nullptr) == QR_OK;
  if (name == "partial-barrier")
    return QR_LAUNCH(partial_barrier_kernel, 1, 64, 0, nullptr) == QR_OK;
  if (name == "divergent-shuffle")
    return QR_LAUNCH(divergent_shuffle_kernel, 1, 32, 0, nullptr) == QR_OK;
  if (name == "mixed-operations")
    return QR_LAUNCH(mixed_operations_kernel, 1, 32, 0, nullptr) == QR_OK;
  if (name == "out-of-bounds") return QR_LAUNCH(out_of_bounds_kernel, 1, 64, 256, nullptr) == QR_OK;
  if (name == "raw-out-of-bounds")
    return QR_LAUNCH(raw_out_of_bounds_kernel, 1, 64, 256, nullptr) == QR_OK;
  if (name == "misaligned") return QR_LAUNCH(misaligned_kernel, 1, 64, 256, nullptr) == QR_OK;
  if (name == "odd-block") return QR_LAUNCH(poison_kernel, 1, 33, 256, nullptr) == QR_OK;
  if (name == "poison")
    return QR_LAUNCH(poison_kernel, 2, 64, 256, nullptr) == QR_OK && all_set(64);
  if (name == "async") {
    QR_LAUNCH((async_kernel<0>), 1, 32, 1024, nullptr, source);
    for (int t = 0; t < 32; t++)
      if (result[t] != (4 * t + 4) % 128 + 1) return false;
    return true;
  }
  if (name == "async-no-wait") {
    QR_LAUNCH((async_kernel<1>), 1, 32, 1024, nullptr, source);
    for (int t = 0; t < 32; t++)
      if (result[t] != (4 * t + 4) % 128 + 1) return false;
    return true;
  }
  if (name == "mma") return QR_LAUNCH(mma_kernel, 1, 32, 0, nullptr) == QR_OK && all_set(128);
  if (name == "ldmatrix")
    return QR_LAUNCH((ldmatrix_kernel<true>), 1, 32, 1024, nullptr) == QR_OK && all_set(128) &&
           counters.matrix_loads == 4 && counters.matrix_load_conflicts == 0;
  if (name == "ldmatrix-conflicts")
    return QR_LAUNCH((ldmatrix_kernel<false>), 1, 32, 1024, nullptr) == QR_OK && all_set(128) &&
           counters.matrix_load_conflicts == 4 * 7;
  emu::options().count_banks = true;
  if (name == "banks-1")
    return QR_LAUNCH((bank_kernel<1>), 1, 64, 16384, nullptr) == QR_OK &&
           counters.vector_accesses == 2 && counters.vector_conflicts == 0;
  if (name == "banks-2")
    return QR_LAUNCH((bank_kernel<2>), 1, 64, 16384, nullptr) == QR_OK &&
           counters.vector_conflicts == 2;
  if (name == "banks-32")
    return QR_LAUNCH((bank_kernel<32>), 1, 64, 16384, nullptr) == QR_OK &&
           counters.vector_conflicts == 2 * 31;
  if (name == "too-many-threads")
    return QR_LAUNCH(poison_kernel, 1, 2048, 0, nullptr) == QR_ERROR_LAUNCH;
  if (name == "too-much-shared-memory")
    return QR_LAUNCH(poison_kernel, 1, 64, 300 << 10, nullptr) == QR_ERROR_LAUNCH;
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  emu::options().seed = static_cast<uint32_t>(std::stoi(argv[2]));
  const bool ok = run(argv[1]);
  std::puts(ok ? "ok" : "wrong");
  return ok ? 0 : 1;
}
