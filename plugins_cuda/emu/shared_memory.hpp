// SPDX-License-Identifier: Apache-2.0
// Shared memory under emulation: bounds, alignment, races, bank conflicts.
//
// Kernels reach shared memory through load_shared / store_shared (common.cuh), ldmatrix and
// cp.async; all of them report here. Plain pointer accesses work too, but are only poisoned, not
// checked.
//
// Races. Every byte remembers its last writer and readers with the barrier epochs of that moment.
// Two accesses of different threads, one a write, are ordered when the later thread has passed a
// block barrier since the earlier access (block_epoch), or both are in one warp and it has passed a
// __syncwarp (warp_epoch). Anything else is a race on a GPU even when it happens to work.
//
// Banks. 32 banks of 4 bytes. A warp's access takes one phase per 128 bytes requested: all lanes
// for 4-byte elements, half-warps for 8, quarter-warps for 16. A phase costs as many cycles as the
// most distinct words it wants from one bank. Lanes are matched by source line and visit number.
#pragma once

#include "scheduler.hpp"

namespace emu {

inline uint32_t shared_offset(const void* pointer, size_t bytes) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - block->shared;
  if (offset < 0 || offset + bytes > block->shared_bytes) fail("an access outside shared memory");
  if (offset % bytes) fail("a misaligned access to shared memory");
  return static_cast<uint32_t>(offset);
}

inline void check_read(uint32_t offset, size_t bytes) {
  if (!options().check_races) return;
  const Thread& t = current();
  const int me = static_cast<int>(t.linear), my_warp = me / static_cast<int>(kWarpSize);
  for (size_t i = 0; i < bytes; i++) {
    ByteHistory& h = block->history[offset + i];
    if (h.writer >= 0 && h.writer != me && h.write_block_epoch >= t.block_epoch &&
        !(h.writer / static_cast<int>(kWarpSize) == my_warp && h.write_warp_epoch < t.warp_epoch))
      fail("race: shared memory read that no barrier separates from another thread's write");
    if (h.read_block_epoch < t.block_epoch || h.reader == -1) {
      h.reader = me;
      h.reader_warp = my_warp;
      h.read_warp_epoch = t.warp_epoch;
    } else if (h.reader != me) {
      h.reader = h.reader_warp == my_warp && h.reader != -3 ? -2 : -3;
      h.read_warp_epoch = std::max(h.read_warp_epoch, t.warp_epoch);
    }
    h.read_block_epoch = std::max(h.read_block_epoch, t.block_epoch);
  }
}

inline void check_write(uint32_t offset, size_t bytes) {
  if (!options().check_races) return;
  const Thread& t = current();
  const int me = static_cast<int>(t.linear), my_warp = me / static_cast<int>(kWarpSize);
  for (size_t i = 0; i < bytes; i++) {
    ByteHistory& h = block->history[offset + i];
    if (h.writer >= 0 && h.writer != me && h.write_block_epoch >= t.block_epoch &&
        !(h.writer / static_cast<int>(kWarpSize) == my_warp && h.write_warp_epoch < t.warp_epoch))
      fail("race: two threads write one byte of shared memory with no barrier between");
    if (h.reader != -1 && h.reader != me && h.read_block_epoch >= t.block_epoch &&
        !(h.reader != -3 && h.reader_warp == my_warp && h.read_warp_epoch < t.warp_epoch))
      fail("race: shared memory overwritten with no barrier after another thread's read");
    h.writer = me;
    h.write_block_epoch = t.block_epoch;
    h.write_warp_epoch = t.warp_epoch;
    h.reader = -1;
  }
}

// Cycles beyond the first of one phase: distinct 4-byte words that fall on the busiest bank, less
// one.
inline int phase_conflicts(const uint32_t* addresses, unsigned lanes, unsigned bytes) {
  std::vector<uint32_t> words;
  for (unsigned l = 0; l < lanes; l++)
    for (unsigned b = 0; b < bytes; b += 4) words.push_back((addresses[l] + b) / 4);
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  int per_bank[32] = {}, busiest = 1;
  for (uint32_t word : words) busiest = std::max(busiest, ++per_bank[word % 32]);
  return busiest - 1;
}

inline void count_access(const WarpAccess& access) {
  const unsigned per_phase = access.bytes <= 4 ? 32 : 128 / access.bytes;
  int conflicts = 0;
  for (unsigned first = 0; first < kWarpSize; first += per_phase) {
    uint32_t addresses[kWarpSize];
    unsigned lanes = 0;
    for (unsigned l = first; l < first + per_phase; l++)
      if (access.present >> l & 1) addresses[lanes++] = access.address[l];
    conflicts += phase_conflicts(addresses, lanes, std::max(4u, access.bytes));
  }
  counters().vector_accesses++;
  counters().vector_conflicts += conflicts;
}

inline void record_access(uint32_t offset, unsigned bytes, int site) {
  if (!options().count_banks) return;
  const uint64_t key = (static_cast<uint64_t>(site) << 32) | current().site_visits[site]++;
  auto& pending = block->accesses[warp()];
  WarpAccess& access = pending[key];
  access.bytes = bytes;
  access.address[lane()] = bytes < 4 ? offset & ~3u : offset;  // lanes arrive in any order
  access.present |= 1u << lane();
  access.lanes++;
  if (access.lanes == kWarpSize) {
    count_access(access);
    pending.erase(key);
  }
}

template <class T>
inline T shared_load(const void* pointer, int site) {
  const uint32_t offset = shared_offset(pointer, sizeof(T));
  check_read(offset, sizeof(T));
  record_access(offset, sizeof(T), site);
  T value;
  memcpy(&value, pointer, sizeof(T));
  return value;
}

template <class T>
inline void shared_store(void* pointer, const T& value, int site) {
  const uint32_t offset = shared_offset(pointer, sizeof(T));
  check_write(offset, sizeof(T));
  record_access(offset, sizeof(T), site);
  memcpy(pointer, &value, sizeof(T));
}

}  // namespace emu
