// SPDX-License-Identifier: Apache-2.0
// Warp-level instructions: shuffles, ldmatrix, movmatrix, mma.sync. Each is a rendezvous of 32
// lanes; the last lane to arrive computes the result of all from the fragment maps of the PTX
// manual.
#pragma once

#include "shared_memory.hpp"
#include "types.hpp"

namespace emu {

enum Operation {
  kSyncWarp = 1,
  kShuffle,
  kLdmatrix,
  kLdmatrixTransposed,
  kMovmatrix,
  kMmaS4,
  kMmaS8,
  kMmaF16,
  kMmaBf16,
  kWarpReduce,
  kFirstFreeOperation = 100  // for emu/hopper.hpp
};

inline void sync_warp() {
  const char in = 0;
  char out = 0;
  warp_collective(kSyncWarp, &in, &out, [](const char* const*, char* const*) {
    const uint64_t epoch = ++block->epoch;  // any value larger than before will do
    for (unsigned l = 0; l < kWarpSize; l++)
      block->threads[warp() * kWarpSize + l].warp_epoch = epoch;
  });
}

struct ShuffleInput {
  uint32_t value;
  unsigned source;
};

// Lane l receives the value of lane source(l).
inline uint32_t shuffle(uint32_t value, unsigned source) {
  const ShuffleInput in{value, source};
  uint32_t out = 0;
  warp_collective(kShuffle, &in, &out, [](const ShuffleInput* const* ins, uint32_t* const* outs) {
    for (unsigned l = 0; l < kWarpSize; l++) *outs[l] = ins[ins[l]->source % kWarpSize]->value;
  });
  return out;
}

template <class T>
inline T shuffle_any(T value, unsigned source) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit values");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shuffle(bits, source);
  memcpy(&value, &bits, 4);
  return value;
}

struct Registers {
  uint32_t r[4];
};

// `count` 8x8 matrices of 16-bit elements. Lanes 8i..8i+7 give the row addresses of matrix i. Lane
// l gets, of each, row l/4, columns 2(l%4) and +1; transposed, rows 2(l%4) and +1 of column l/4.
inline void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row) {
  const unsigned my_matrix = lane() / 8;
  if (static_cast<int>(my_matrix) < count) check_read(shared_offset(row, 16), 16);
  Registers out{};
  struct Input {
    const unsigned char* row;
    int count;
  } in{static_cast<const unsigned char*>(row), count};
  warp_collective((transposed ? kLdmatrixTransposed : kLdmatrix) + 1000 * count, &in, &out,
                  [transposed](const Input* const* ins, Registers* const* outs) {
                    for (int m = 0; m < ins[0]->count; m++) {
                      uint32_t addresses[8];
                      uint16_t matrix[8][8];
                      for (int i = 0; i < 8; i++) {
                        addresses[i] = static_cast<uint32_t>(ins[m * 8 + i]->row - block->shared);
                        memcpy(matrix[i], ins[m * 8 + i]->row, 16);
                      }
                      counters().matrix_loads++;
                      counters().matrix_load_conflicts += phase_conflicts(addresses, 8, 16);
                      for (unsigned l = 0; l < kWarpSize; l++) {
                        const unsigned g = l / 4, q = l % 4;
                        const uint16_t low = transposed ? matrix[2 * q][g] : matrix[g][2 * q];
                        const uint16_t high =
                            transposed ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
                        outs[l]->r[m] = low | static_cast<uint32_t>(high) << 16;
                      }
                    }
                  });
  for (int m = 0; m < count; m++) registers[m] = out.r[m];
}

// movmatrix.trans: an 8x8 matrix of 16-bit elements, one row piece per lane, transposed across the
// warp.
inline uint32_t transpose_8x8(uint32_t value) {
  uint32_t out = 0;
  warp_collective(kMovmatrix, &value, &out, [](const uint32_t* const* ins, uint32_t* const* outs) {
    for (unsigned l = 0; l < kWarpSize; l++) {
      const unsigned g = l / 4, q = l % 4;
      const auto element = [&](unsigned row, unsigned column) {
        return (*ins[row * 4 + column / 2] >> (16 * (column % 2))) & 0xffff;
      };
      *outs[l] = element(2 * q, g) | element(2 * q + 1, g) << 16;
    }
  });
  return out;
}

// Operands of one lane of mma.m16n8k*: four A registers, two B registers.
struct MmaInput {
  uint32_t a[4], b[2];
};
template <class Number>
struct MmaSums {
  Number d[4];
};

// A 16 x k, B k x 8 from the PTX fragment maps; D = A B. kPerRegister: elements in a 32-bit
// register (8 nibbles, 4 bytes, 2 halves); k is 8 * kPerRegister. decode(register, i) is element
// i's value.
template <int kPerRegister, class Number, class Decode>
inline void mma_product(const MmaInput* const* ins, MmaSums<Number>* const* outs, Decode decode) {
  constexpr int kDepth = 8 * kPerRegister;
  Number a[16][kDepth], b[8][kDepth];
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, q = l % 4;
    for (int e = 0; e < kPerRegister; e++) {
      for (int r = 0; r < 4; r++)
        a[g + (r & 1) * 8][q * kPerRegister + e + (r >> 1) * 4 * kPerRegister] =
            decode(ins[l]->a[r], e);
      for (int r = 0; r < 2; r++)
        b[g][q * kPerRegister + e + r * 4 * kPerRegister] = decode(ins[l]->b[r], e);
    }
  }
  for (int l = 0; l < 32; l++)
    for (int r = 0; r < 4; r++) {
      Number sum = 0;
      for (int k = 0; k < kDepth; k++)
        sum += a[l / 4 + (r >> 1) * 8][k] * b[l % 4 * 2 + (r & 1)][k];
      outs[l]->d[r] = sum;
    }
}

template <int kPerRegister, class Number, class Decode>
inline void mma(int operation, Number* c, const uint32_t* a, const uint32_t* b, Decode decode) {
  MmaInput in;
  memcpy(in.a, a, sizeof in.a);
  memcpy(in.b, b, sizeof in.b);
  MmaSums<Number> out;
  warp_collective(operation, &in, &out,
                  [decode](const MmaInput* const* ins, MmaSums<Number>* const* outs) {
                    counters().mma_instructions++;
                    mma_product<kPerRegister, Number>(ins, outs, decode);
                  });
  for (int r = 0; r < 4; r++) c[r] += out.d[r];
}

inline int nibble(uint32_t word, int i) { return static_cast<int32_t>(word << (28 - 4 * i)) >> 28; }
inline int byte(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
inline float half(uint32_t word, int i) {
  return float_from_half(static_cast<uint16_t>(word >> (16 * i)));
}
inline float bfloat(uint32_t word, int i) {
  return float_from_bfloat(static_cast<uint16_t>(word >> (16 * i)));
}

}  // namespace emu

inline void __syncwarp(unsigned = ~0u) { emu::sync_warp(); }
template <class T>
inline T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return emu::shuffle_any(value, emu::lane() ^ mask);
}
template <class T>
inline T __shfl_sync(unsigned, T value, unsigned source) {
  return emu::shuffle_any(value, source);
}
template <class T>
inline T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned source = emu::lane() + delta;
  return emu::shuffle_any(value, source < emu::kWarpSize ? source : emu::lane());
}
