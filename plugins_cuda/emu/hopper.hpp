// SPDX-License-Identifier: Apache-2.0
// Hopper's asynchronous instructions under emulation: the other side of kernels/hopper.cuh.
//
// mbarrier. State lives beside the block, keyed by the barrier's address. A completed phase has an
//   epoch; a thread that waited for it is ordered after everything before (the race detector's
//   notion), as after __syncthreads. A barrier that is used before it is initialized, arrived at
//   too often, or promised fewer bytes than land ends the process.
// Bulk copies. They land late, when somebody waits on their barrier, or (seed not 0, by chance) at
//   once and in any order; until then their destination is poisoned. Landing checks that nobody may
//   still read the place, from the point of view of the thread that issued the copy.
// wgmma. A rendezvous of the warpgroup's 128 threads. The product is computed when the instruction
//   is issued, from shared memory as the decoded descriptor and swizzle say; the accumulators
//   change only in wgmma_wait, which also verifies that neither the A registers nor the B rows were
//   touched in between. So reading an accumulator early, refilling a slot early, and reusing
//   operand registers early all show.
#pragma once

#include "emulation.hpp"

#define QR_HAS_WGMMA 1

namespace emu {

// Passes of check_read and check_write happen in the name of another thread.
class ActingAs {
 public:
  explicit ActingAs(Thread* thread) : saved_(block->current) { block->current = thread; }
  ~ActingAs() { block->current = saved_; }
  ActingAs(const ActingAs&) = delete;
  ActingAs& operator=(const ActingAs&) = delete;

 private:
  Thread* saved_;
};

struct BulkCopy {
  unsigned char* destination;
  const unsigned char* source;
  uint32_t bytes;
  uint64_t* barrier;
  Thread* issuer;
};

struct Mbarrier {
  int arrivals = 0;        // of a phase
  int pending = 0;         // still missing in this phase
  int64_t bytes = 0;       // promised and not landed
  uint64_t phase = 0;      // number of completed phases
  uint64_t completed = 0;  // epoch of the last completion
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
  std::vector<Thread*> waiting;
};

struct HopperBlock {
  std::map<const uint64_t*, Mbarrier> barriers;
  std::vector<BulkCopy> copies;  // in flight
  std::map<int, NamedBarrier> named;
  std::minstd_rand random{options().seed + 1};

  Mbarrier& barrier(const uint64_t* at) {
    const auto found = barriers.find(at);
    if (found == barriers.end()) fail("an mbarrier that was never initialized");
    return found->second;
  }
};

inline HopperBlock& hopper() { return block->attachments.get<HopperBlock>(); }

inline void complete_if_done(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  b.phase++;
  b.completed = ++block->epoch;
  block->progress++;
}

inline void arrive(uint64_t* at, int64_t bytes) {
  Mbarrier& b = hopper().barrier(at);
  if (b.pending == 0) fail("more arrivals at an mbarrier than its phase takes");
  b.pending--;
  b.bytes += bytes;
  block->progress++;
  complete_if_done(b);
}

inline void land(const BulkCopy& copy) {
  {
    const ActingAs issuer(copy.issuer);
    check_write(shared_offset(copy.destination, 16), copy.bytes);
  }
  const uint64_t epoch = ++block->epoch;  // only a wait that ends later covers these bytes
  if (options().check_races)
    for (uint32_t i = 0; i < copy.bytes; i++)
      block->history[copy.destination - block->shared + i].write_block_epoch = epoch;
  memcpy(copy.destination, copy.source, copy.bytes);
  Mbarrier& b = hopper().barrier(copy.barrier);
  b.bytes -= copy.bytes;
  block->progress++;
  complete_if_done(b);
}

// Lands copies that this barrier waits for: all of them, or with a seed one of them, by chance.
inline void land_some(const uint64_t* at) {
  HopperBlock& h = hopper();
  std::vector<size_t> mine;
  for (size_t i = 0; i < h.copies.size(); i++)
    if (h.copies[i].barrier == at) mine.push_back(i);
  if (mine.empty()) return;
  if (options().seed) mine = {mine[h.random() % mine.size()]};
  for (size_t i = mine.size(); i-- > 0;) {
    const BulkCopy copy = h.copies[mine[i]];
    h.copies.erase(h.copies.begin() + static_cast<ptrdiff_t>(mine[i]));
    land(copy);
  }
}

// ---------------------------------------------------------------------------------------------
// wgmma

enum HopperOperation { kWgmma = kFirstFreeOperation, kSetRegisters = kFirstFreeOperation + 1000 };

constexpr int kWgmmaDepth = 32;  // bytes of k in one instruction

// The bytes that a descriptor selects: row r (a column of B), byte i of its 32. K-major, 128-byte
// swizzle: bits 4..6 of the address are XORed with bits 7..9.
inline uint32_t wgmma_operand_offset(uint64_t descriptor, int row, int i) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const uint32_t group = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t linear = start + static_cast<uint32_t>(row / 8) * group + row % 8 * 128 + i;
  return linear ^ ((linear >> 7 & 7) << 4);
}

inline std::vector<int8_t> read_wgmma_operand(uint64_t descriptor, int columns) {
  if (descriptor >> 62 != 1) fail("wgmma: the emulator knows the 128-byte swizzle only");
  if ((static_cast<uint32_t>(descriptor & 0x3FFF) << 4) % 1024 >= 128)
    fail("wgmma: the operand's rows do not start on a multiple of 1024 bytes");
  std::vector<int8_t> operand(static_cast<size_t>(columns) * kWgmmaDepth);
  for (int row = 0; row < columns; row++)
    for (int i = 0; i < kWgmmaDepth; i += 16) {
      const uint32_t offset = wgmma_operand_offset(descriptor, row, i);
      check_read(shared_offset(block->shared + offset, 16), 16);
      memcpy(&operand[static_cast<size_t>(row) * kWgmmaDepth + i], block->shared + offset, 16);
    }
  return operand;
}

struct WgmmaInput {
  uint32_t a[4];
  uint64_t descriptor;
};

// One thread's part of an instruction in flight.
struct WgmmaInFlight {
  int* accumulators;
  std::vector<int> products;
  const uint32_t* a;
  uint32_t a_then[4];
  uint64_t descriptor;
  std::shared_ptr<std::vector<int8_t>> b_then;  // one thread of the warpgroup keeps it
  int columns;
};

struct WgmmaThread {
  bool fenced = false;
  std::vector<std::vector<WgmmaInFlight>> groups{1};  // the last one is open
};

inline WgmmaThread& wgmma_thread() { return current().attachments.get<WgmmaThread>(); }

struct WgmmaOutput {
  std::vector<int> products;
  std::shared_ptr<std::vector<int8_t>> b;
};

inline void wgmma(int* accumulators, const uint32_t* a, uint64_t descriptor, int columns) {
  WgmmaThread& state = wgmma_thread();
  if (!state.fenced) fail("wgmma without wgmma_fence after its registers were written");
  WgmmaInput in{{a[0], a[1], a[2], a[3]}, descriptor};
  WgmmaOutput out;
  warpgroup_collective(
      kWgmma + columns, &in, &out,
      [columns](const WgmmaInput* const* ins, WgmmaOutput* const* outs) {
        counters().mma_instructions += 4;
        for (int t = 1; t < 128; t++)
          if (ins[t]->descriptor != ins[0]->descriptor)
            fail("wgmma: the warpgroup's threads disagree on the descriptor");
        auto b =
            std::make_shared<std::vector<int8_t>>(read_wgmma_operand(ins[0]->descriptor, columns));
        int8_t rows[64][kWgmmaDepth];
        for (int t = 0; t < 128; t++)
          for (int r = 0; r < 4; r++)
            memcpy(&rows[t / 32 * 16 + t % 32 / 4 + (r & 1) * 8][t % 4 * 4 + (r >> 1) * 16],
                   &ins[t]->a[r], 4);
        for (int t = 0; t < 128; t++) {
          outs[t]->products.resize(static_cast<size_t>(columns) / 2);
          for (int i = 0; i < columns / 2; i++) {
            const int row = t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8;
            const int column = i / 4 * 8 + t % 4 * 2 + (i & 1);
            const int8_t* y = &(*b)[static_cast<size_t>(column) * kWgmmaDepth];
            int sum = 0;
            for (int k = 0; k < kWgmmaDepth; k++) sum += rows[row][k] * y[k];
            outs[t]->products[static_cast<size_t>(i)] = sum;
          }
        }
        outs[0]->b = b;
      });
  state.groups.back().push_back({accumulators,
                                 std::move(out.products),
                                 a,
                                 {a[0], a[1], a[2], a[3]},
                                 descriptor,
                                 out.b,
                                 columns});
}

inline void finish(const WgmmaInFlight& flight) {
  for (int r = 0; r < 4; r++)
    if (flight.a[r] != flight.a_then[r]) fail("wgmma: an A register was rewritten in flight");
  if (flight.b_then && *flight.b_then != read_wgmma_operand(flight.descriptor, flight.columns))
    fail("wgmma: its shared-memory operand was rewritten in flight");
  for (size_t i = 0; i < flight.products.size(); i++) flight.accumulators[i] += flight.products[i];
}

}  // namespace emu

namespace qr {

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emu::check_write(emu::shared_offset(barrier, 8), 8);
  emu::Mbarrier& b = emu::hopper().barriers[barrier];
  b = {};
  b.arrivals = b.pending = arrivals;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emu::arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { emu::arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  emu::Mbarrier& b = emu::hopper().barrier(barrier);
  emu::wait_until([&] {
    if ((b.phase & 1) == parity) emu::land_some(barrier);
    return (b.phase & 1) != parity;
  });
  emu::Thread& t = emu::current();
  t.block_epoch = std::max(t.block_epoch, b.completed);
}

inline void named_barrier(int id, int threads) {
  emu::NamedBarrier& b = emu::hopper().named[id];
  if (id < 1 || id > 15) emu::fail("a named barrier outside 1..15");
  const uint64_t generation = b.generation;
  emu::block->progress++;
  b.waiting.push_back(&emu::current());
  if (++b.arrived == threads) {
    const uint64_t epoch = ++emu::block->epoch;
    for (emu::Thread* t : b.waiting) t->block_epoch = epoch;
    b.waiting.clear();
    b.arrived = 0;
    b.generation++;
  } else {
    emu::wait_until([&] { return b.generation != generation; });
  }
}

template <int kRegisters>
inline void set_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
  const char in = 0;
  char out = 0;
  emu::warpgroup_collective(emu::kSetRegisters, &in, &out, [](const char* const*, char* const*) {});
}
template <int kRegisters>
inline void shrink_registers() {
  set_registers<kRegisters>();
}
template <int kRegisters>
inline void grow_registers() {
  set_registers<kRegisters>();
}

inline void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emu::fail("a bulk copy whose size or source is not a multiple of 16 bytes");
  const uint32_t offset = emu::shared_offset(shared, 16);
  if (offset + static_cast<uint32_t>(bytes) > emu::block->shared_bytes)
    emu::fail("a bulk copy past the end of shared memory");
  emu::counters().async_copies++;
  emu::HopperBlock& h = emu::hopper();
  h.barrier(barrier);  // initialized
  const emu::BulkCopy copy{static_cast<unsigned char*>(shared),
                           static_cast<const unsigned char*>(global), static_cast<uint32_t>(bytes),
                           barrier, &emu::current()};
  if (emu::options().seed && h.random() % 2) return emu::land(copy);
  {
    emu::check_write(offset, copy.bytes);
    memset(copy.destination, emu::kPoison, copy.bytes);
  }
  h.copies.push_back(copy);
}

inline void wgmma_fence() { emu::wgmma_thread().fenced = true; }
inline void wgmma_commit() {
  emu::WgmmaThread& state = emu::wgmma_thread();
  state.fenced = false;
  state.groups.emplace_back();
}
template <int kPending>
inline void wgmma_wait() {
  auto& groups = emu::wgmma_thread().groups;
  while (groups.size() > kPending + 1) {
    for (const emu::WgmmaInFlight& flight : groups.front()) emu::finish(flight);
    groups.erase(groups.begin());
  }
}
inline void wgmma_pin(int&) {}

inline uint64_t wgmma_descriptor(const void* rows) {
  const uint32_t offset = emu::shared_offset(rows, 16);
  return uint64_t((offset & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

template <int kColumns>
inline void wgmma_s8(int (&acc)[kColumns / 2], const uint32_t* a, uint64_t b) {
  emu::wgmma(acc, a, b, kColumns);
}

}  // namespace qr
