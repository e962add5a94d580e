// SPDX-License-Identifier: Apache-2.0
// The emulator's core: CUDA threads as fibers, blocks, barriers, and what it refuses.
//
// A block runs on one operating-system thread. Each of its CUDA threads is a fiber with its own
// stack; a fiber runs until it has to wait for others (a barrier, a warp collective) and then hands
// control back to the scheduler, which resumes the fibers in index order (seed 0) or in a new
// random order each round. A kernel whose result depends on an order that no barrier fixes gives
// different results for different seeds. Blocks are handed to `workers` operating-system threads.
//
// What ends the process with a message, because on a GPU it is undefined, hangs, or is a race:
//   * threads waiting at different __syncthreads, or one of them gone;
//   * lanes of one warp in different warp operations, or one of them gone;
//   * no thread able to continue (deadlock);
//   * two threads touching one byte of shared memory, one of them writing, with no barrier between;
//   * an access outside the block's shared memory, or a misaligned one.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <typeindex>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = EMU_ASAN ? 512 << 10 : 128 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;  // what a block of sm_90 can have
constexpr size_t kGuardBytes = 4096;           // after shared memory: must stay poisoned
constexpr unsigned char kPoison = 0xA5;        // as half, float or index: an absurd value

struct Options {
  uint32_t seed = 0;            // 0: threads run in index order
  int workers = 1;              // operating-system threads
  int compute_capability = 90;  // what host dispatch believes it runs on
  bool check_races = true;      // shadow every byte of shared memory
  bool count_banks = false;     // match the lanes' vector accesses and count bank conflicts
};
inline Options& options() {
  static Options instance;
  return instance;
}

struct Counters {
  std::atomic<int64_t> blocks{0}, matrix_loads{0}, matrix_load_conflicts{0}, vector_accesses{0},
      vector_conflicts{0}, mma_instructions{0}, async_copies{0};
};
inline Counters& counters() {
  static Counters instance;
  return instance;
}

// State that other headers attach to a thread or a block, created on first use, gone with the
// block.
class Attachments {
 public:
  template <class T>
  T& get() {
    std::shared_ptr<void>& slot = slots_[std::type_index(typeid(T))];
    if (!slot) slot = std::make_shared<T>();
    return *static_cast<T*>(slot.get());
  }
  void clear() { slots_.clear(); }

 private:
  std::map<std::type_index, std::shared_ptr<void>> slots_;
};

struct Thread {
  jmp_buf context;
  ucontext_t start_context;
  char* stack = nullptr;
  void* asan_fake_stack = nullptr;
  bool started = false, finished = false;
  dim3 index;                                     // threadIdx
  unsigned linear = 0;                            // position in the block
  uint64_t block_epoch = 0;                       // shared-memory ordering, see shared_memory.hpp
  uint64_t warp_epoch = 0;                        //
  std::unordered_map<int, uint32_t> site_visits;  // shared accesses per source line
  Attachments attachments;
};

// A set of threads that execute one instruction together: a warp, or a warpgroup. Members deposit
// the addresses of their operands and wait; the last to arrive carries out the instruction for all.
// The addresses are on the members' own stacks, which cannot go away while they wait.
struct Group {
  unsigned size = 0, arrived = 0, finished = 0;
  uint64_t generation = 0;
  int operation = 0;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
};

// One access of a warp to shared memory, being assembled from its lanes (bank counting).
struct WarpAccess {
  unsigned lanes = 0, bytes = 0;
  uint32_t present = 0;  // bit l: lane l takes part
  uint32_t address[kWarpSize];
};

// Who touched a byte of shared memory last, and when (race detection).
struct ByteHistory {
  uint64_t write_block_epoch = 0, write_warp_epoch = 0, read_block_epoch = 0, read_warp_epoch = 0;
  int32_t writer = -1,
          reader = -1;  // -1: nobody; -2: several threads of `reader_warp`; -3: of several warps
  int32_t reader_warp = -1;
};

struct Block {
  dim3 grid, size, index;
  std::vector<Thread> threads;
  std::vector<Group> warps, warpgroups;
  std::vector<std::unordered_map<uint64_t, WarpAccess>> accesses;  // per warp
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;  // 1024-byte aligned, as the 128-byte swizzle wants
  size_t shared_bytes = 0;
  std::vector<ByteHistory> history;
  uint64_t epoch = 0;
  unsigned arrived = 0, live = 0;
  uint64_t barrier_generation = 0;
  int barrier_site = 0;
  uint64_t progress = 0;  // changes whenever any thread gets somewhere
  Thread* current = nullptr;
  jmp_buf scheduler;
  void* asan_fake_stack = nullptr;
  const void* asan_stack_bottom = nullptr;
  size_t asan_stack_size = 0;
  std::function<void()> kernel;
  Attachments attachments;
};

inline thread_local Block* block = nullptr;

inline Thread& current() { return *block->current; }
inline unsigned lane() { return current().linear % kWarpSize; }
inline unsigned warp() { return current().linear / kWarpSize; }

[[noreturn]] inline void fail(const char* what) {
  const Thread* t = block ? block->current : nullptr;
  if (t)
    fprintf(stderr, "emulation: %s (block %u,%u,%u thread %u,%u,%u)\n", what, block->index.x,
            block->index.y, block->index.z, t->index.x, t->index.y, t->index.z);
  else
    fprintf(stderr, "emulation: %s\n", what);
  abort();
}

// Hands control to the scheduler; returns when this thread's turn comes again.
inline void yield() {
  Thread* me = block->current;
#if EMU_ASAN
  __sanitizer_start_switch_fiber(&me->asan_fake_stack, block->asan_stack_bottom,
                                 block->asan_stack_size);
#endif
  if (!_setjmp(me->context)) _longjmp(block->scheduler, 1);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(me->asan_fake_stack, nullptr, nullptr);
#endif
}

// Waits until done() holds. done() must be changed by other threads, whose work counts as progress.
template <class Done>
inline void wait_until(Done done) {
  while (!done()) yield();
  block->progress++;
}

// All that other threads did to shared memory so far is visible to this thread from here on.
inline void order_shared_memory() { current().block_epoch = ++block->epoch; }

inline void block_barrier(int site) {
  Block& b = *block;
  if (b.live != b.threads.size()) fail("__syncthreads after some threads have returned");
  if (b.arrived == 0) b.barrier_site = site;
  if (b.barrier_site != site) fail("threads wait at different __syncthreads");
  const uint64_t generation = b.barrier_generation;
  b.progress++;
  if (++b.arrived == b.live) {
    b.arrived = 0;
    b.barrier_generation++;
    const uint64_t epoch = ++b.epoch;
    for (Thread& t : b.threads) t.block_epoch = epoch;
  } else {
    wait_until([&] { return b.barrier_generation != generation; });
  }
}

// One instruction executed by all members of a group. `operation` tells instructions apart.
// all(inputs, outputs) runs once, when every member has arrived, with arrays of `size` pointers.
template <class In, class Out, class All>
inline void collective(Group& group, unsigned member, int operation, const In* in, Out* out,
                       All all) {
  if (group.finished) fail("a warp-level operation after a lane of the warp has returned");
  if (group.arrived == 0) group.operation = operation;
  if (group.operation != operation)
    fail("lanes of one warp are in different warp-level operations");
  group.inputs[member] = in;
  group.outputs[member] = out;
  const uint64_t generation = group.generation;
  block->progress++;
  if (++group.arrived == group.size) {
    all(reinterpret_cast<const In* const*>(group.inputs.data()),
        reinterpret_cast<Out* const*>(group.outputs.data()));
    group.arrived = 0;
    group.generation++;
  } else {
    wait_until([&] { return group.generation != generation; });
  }
}

template <class In, class Out, class All>
inline void warp_collective(int operation, const In* in, Out* out, All all) {
  collective(block->warps[warp()], lane(), operation, in, out, all);
}

// For a warpgroup: 128 threads, the first of which is a multiple of 128.
template <class In, class Out, class All>
inline void warpgroup_collective(int operation, const In* in, Out* out, All all) {
  const unsigned group = current().linear / 128;
  if (group >= block->warpgroups.size()) fail("a warpgroup instruction outside a full warpgroup");
  collective(block->warpgroups[group], current().linear % 128, operation, in, out, all);
}

inline void fiber_main() {
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block->asan_stack_bottom, &block->asan_stack_size);
#endif
  block->kernel();
  Thread* me = block->current;
  if (block->arrived) fail("a thread returned while others wait at __syncthreads");
  Group& w = block->warps[me->linear / kWarpSize];
  if (w.arrived) fail("a lane returned while others wait in a warp-level operation");
  w.finished++;
  if (me->linear / 128 < block->warpgroups.size()) block->warpgroups[me->linear / 128].finished++;
  me->finished = true;
  block->live--;
  block->progress++;
#if EMU_ASAN
  __sanitizer_start_switch_fiber(nullptr, block->asan_stack_bottom, block->asan_stack_size);
#endif
  _longjmp(block->scheduler, 1);
}

inline void count_access(const WarpAccess& access);  // shared_memory.hpp

inline void prepare_block(Block& b) {
  b.live = static_cast<unsigned>(b.threads.size());
  b.arrived = 0;
  b.epoch = 0;
  b.attachments.clear();
  memset(b.shared, kPoison, b.shared_bytes + kGuardBytes);
  if (options().check_races) b.history.assign(b.shared_bytes, ByteHistory());
  const auto reset = [](std::vector<Group>& groups, unsigned size) {
    for (Group& g : groups) {
      g.size = size;
      g.arrived = g.finished = 0;
      g.inputs.assign(size, nullptr);
      g.outputs.assign(size, nullptr);
    }
  };
  reset(b.warps, kWarpSize);
  reset(b.warpgroups, 128);
  for (size_t i = 0; i < b.threads.size(); i++) {
    Thread& t = b.threads[i];
    t.finished = t.started = false;
    t.linear = static_cast<unsigned>(i);
    t.block_epoch = t.warp_epoch = 0;
    t.site_visits.clear();
    t.attachments.clear();
    t.index =
        dim3(t.linear % b.size.x, t.linear / b.size.x % b.size.y, t.linear / (b.size.x * b.size.y));
  }
}

inline void resume(Block& b, Thread& t) {
  b.current = &t;
#if EMU_ASAN
  __sanitizer_start_switch_fiber(&b.asan_fake_stack, t.stack, kStackBytes);
#endif
  if (!_setjmp(b.scheduler)) {
    if (t.started) _longjmp(t.context, 1);
    t.started = true;
    getcontext(&t.start_context);
    t.start_context.uc_stack.ss_sp = t.stack;
    t.start_context.uc_stack.ss_size = kStackBytes;
    t.start_context.uc_link = nullptr;
    makecontext(&t.start_context, fiber_main, 0);
    setcontext(&t.start_context);
  }
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(b.asan_fake_stack, nullptr, nullptr);
#endif
}

inline void run_block(Block& b, std::mt19937& random) {
  block = &b;
  prepare_block(b);
  std::vector<unsigned> order(b.threads.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<unsigned>(i);
  int idle_rounds = 0;
  while (b.live) {
    const uint64_t before = b.progress;
    if (options().seed) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order)
      if (!b.threads[i].finished) resume(b, b.threads[i]);
    idle_rounds = b.progress == before ? idle_rounds + 1 : 0;
    if (idle_rounds > 3) fail("deadlock: no thread of the block can continue");
  }
  for (auto& warp_accesses : b.accesses) {
    for (auto& entry : warp_accesses) count_access(entry.second);
    warp_accesses.clear();
  }
  b.current = nullptr;
  for (size_t i = 0; i < kGuardBytes; i++)
    if (b.shared[b.shared_bytes + i] != kPoison) fail("a write past the end of shared memory");
  counters().blocks++;
}

// Runs kernel() once per CUDA thread. Returns false where a GPU would refuse the launch.
inline bool launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned count = size.x * size.y * size.z;
  const unsigned blocks = grid.x * grid.y * grid.z;
  if (count == 0 || count > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535) return false;
  if (shared_bytes > kMaxSharedBytes) return false;
  if (count % kWarpSize) fail("a block size that is not a multiple of 32");
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    Block b;
    b.grid = grid;
    b.size = size;
    b.kernel = kernel;
    b.threads = std::vector<Thread>(count);
    b.warps = std::vector<Group>(count / kWarpSize);
    b.warpgroups = std::vector<Group>(count / 128);
    b.accesses.resize(count / kWarpSize);
    b.shared_bytes = shared_bytes;
    b.storage.resize(shared_bytes + kGuardBytes + 1024);
    b.shared = reinterpret_cast<unsigned char*>(
        (reinterpret_cast<uintptr_t>(b.storage.data()) + 1023) & ~uintptr_t{1023});
    char* stacks = static_cast<char*>(mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) fail("no memory for the threads' stacks");
    for (unsigned i = 0; i < count; i++) b.threads[i].stack = stacks + i * kStackBytes;
    for (unsigned i; (i = next++) < blocks;) {
      b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
      std::mt19937 random(options().seed * 7919u + i);
      run_block(b, random);
    }
    block = nullptr;
    munmap(stacks, count * kStackBytes);
  };
  const int workers = std::max(1, std::min<int>(options().workers, static_cast<int>(blocks)));
  std::vector<std::thread> others;
  for (int i = 1; i < workers; i++) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return true;
}

}  // namespace emu

#define threadIdx (emu::current().index)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->size)
#define gridDim (emu::block->grid)
#define __syncthreads() emu::block_barrier(__LINE__)
