// SPDX-License-Identifier: Apache-2.0
// cp.async under emulation. A copy may land any time between its issue and the wait that covers it;
// the two ends expose different bugs. Landing late, a missing or miscounted wait reads poison or an
// older tile. Landing early, a slot that others still read is overwritten under them. Seed 0 lands
// all copies late; other seeds choose per copy.
#pragma once

#include "shared_memory.hpp"

namespace emu {

struct AsyncCopy {
  void* destination;
  const void* source;
  uint32_t bytes;  // copied; the rest of `size` becomes zeros
  uint32_t size;
};

struct AsyncGroups {
  std::vector<std::vector<AsyncCopy>> groups{1};  // the last one is open
  uint32_t random = 0;
};

inline void land(const AsyncCopy& copy) {
  check_write(shared_offset(copy.destination, copy.size), copy.size);
  memcpy(copy.destination, copy.source, copy.bytes);
  memset(static_cast<char*>(copy.destination) + copy.bytes, 0, copy.size - copy.bytes);
}

inline void async_copy(void* destination, const void* source, uint32_t size, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(source) % size) fail("cp.async from a misaligned address");
  shared_offset(destination, size);
  counters().async_copies++;
  AsyncGroups& state = current().attachments.get<AsyncGroups>();
  if (options().seed) {
    state.random = state.random * 1664525u + 1013904223u + options().seed + current().linear;
    if (state.random >> 31) return land({destination, source, bytes, size});
  }
  state.groups.back().push_back({destination, source, bytes, size});
}

inline void async_commit() { current().attachments.get<AsyncGroups>().groups.emplace_back(); }

// All but the newest `pending` committed groups have landed when this returns.
inline void async_wait(size_t pending) {
  auto& groups = current().attachments.get<AsyncGroups>().groups;
  while (groups.size() > pending + 1) {
    for (const AsyncCopy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace emu
