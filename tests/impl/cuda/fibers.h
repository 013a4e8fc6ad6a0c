// Threads of a CUDA grid on one thread of the CPU: each is a fiber with a stack of its own, and runs until it has to
// wait for others. Blocks, or clusters of blocks, run one after another.
//
// DPO_EMULATION_SEED, read at each launch, decides what hardware leaves open. 0 or unset: threads run in order, and
// what is asynchronous happens as late as it may. Any other: threads run in another order in each round, some warps
// slower than others, may be interrupted where they tell others of something, and each asynchronous operation has a
// time of its own.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Of the fiber that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

constexpr size_t kStack = size_t{128} << 10;
constexpr size_t kSharedLimit = size_t{227} << 10;  // of a block
constexpr uint32_t kSharedBase = 1024;              // where shared memory begins in its own address space
constexpr size_t kCanary = 1024;                    // bytes after it that nothing may write

// Where threads wait until all have come.
struct Meeting {
  uint32_t arrived = 0, generation = 0;
};
// Lanes of a warp that exchange values. Those of one generation are read before the one after the next is written.
struct LaneMeeting {
  uint32_t mask;
  const char* what = "";
  Meeting meeting;
  uint64_t values[2][warpSize];
};

struct Block {
  uint3 index;
  uint32_t rank, threads, running;  // rank in the cluster; threads that have not ended
  unsigned char* shared;
  Meeting all;
  std::vector<Meeting> groups;  // of 128 threads
  std::vector<std::deque<LaneMeeting>> warps;
};

// wgmma that this thread has issued and not waited for: see hopper.h.
struct Product {
  void (*compute)(float* sums, uint64_t a, const float (&rows)[2][16], uint64_t b, bool accumulate);
  float* acc;
  uint64_t a, b;
  bool accumulate, computed;
  int group;
  // Of one whose left operand came in registers: this thread's, what they held, and the two rows that it computes.
  const uint32_t* registers = nullptr;
  uint32_t issued[4] = {};
  float rows[2][16] = {};
};
struct Accumulator {
  float* acc;
  std::vector<float> sums;
};

// A copy out of shared memory that this thread has issued: it has read when it is waited for at the latest.
struct Store {
  std::function<void()> read;
  int group;
};

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  void* stack = nullptr;
  bool started = false, done = true;
  Block* block = nullptr;
  uint3 thread = {};
  uint32_t index = 0;  // of the thread in its block
  // It waits while (*word & mask) == value; null: it can run.
  const void* word = nullptr;
  uint32_t mask = 0, value = 0;
  const char* what = "";
  std::vector<Product> products;
  std::vector<Accumulator> accumulators;
  int groups = 0;
  bool fenced = false;
  std::vector<Store> stores;
  int store_groups = 0;
  bool wrote_unfenced = false;  // to shared memory, for copies out of it

  bool ready() const {
    if (word == nullptr) return true;
    uint32_t now;
    memcpy(&now, word, sizeof now);
    return (now & mask) != value;
  }
};

// A copy under way. Late: it arrives when nothing else can happen.
struct Copy {
  std::function<void()> arrive;
  bool late;
};

struct State {
  std::deque<Fiber> fibers;
  std::deque<Block> blocks;
  std::vector<unsigned char*> shared;
  std::vector<Copy> copies;
  std::function<void()> body;
  std::exception_ptr error;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  size_t shared_bytes = 0;
  uint32_t running = 0;
  Meeting cluster;
  uint64_t seed = 0, random_state = 0;
  std::mutex mutex;
};
inline State state;

inline uint64_t random() {  // SplitMix64, Steele et al. 2014
  uint64_t z = state.random_state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

inline std::string name_of(const Block& block) {
  return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
         std::to_string(block.index.z) + ")";
}
[[noreturn]] inline void fail(const std::string& message) {
  const Fiber* f = state.current;
  const std::string where = f ? name_of(*f->block) + ", thread " + std::to_string(f->index) + ": " : "";
  throw std::runtime_error("emulation: " + where + message);
}
inline void expect(bool condition, const char* message) {
  if (!condition) fail(message);
}

inline void switch_to_scheduler() {
  if (_setjmp(state.current->jump) == 0) _longjmp(state.scheduler, 1);
}
inline void wait_while(const void* word, uint32_t mask, uint32_t value, const char* what) {
  Fiber& f = *state.current;
  f.word = word, f.mask = mask, f.value = value, f.what = what;
  if (!f.ready()) switch_to_scheduler();
  f.word = nullptr;
}
// Called where others learn of something, so that they may come first.
inline void maybe_interrupt() {
  if (state.seed != 0 && random() % 4 == 0) switch_to_scheduler();
}
inline void meet(Meeting& meeting, uint32_t expected, const char* what) {
  const uint32_t generation = meeting.generation;
  if (++meeting.arrived >= expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait_while(&meeting.generation, ~0u, generation, what);
  }
}
// Waits for the lanes of the mask; what each of them brought, by lane.
inline const uint64_t* exchange(uint32_t mask, uint64_t value, const char* what) {
  Fiber& f = *state.current;
  const uint32_t lane = f.index % warpSize;
  expect(mask >> lane & 1, "a lane that calls is not in the mask");
  auto& meetings = f.block->warps[f.index / warpSize];
  LaneMeeting* at = nullptr;
  for (LaneMeeting& m : meetings) {
    if (m.mask == mask) at = &m;
  }
  if (at == nullptr) {
    at = &meetings.emplace_back();
    at->mask = mask;
    memset(at->values, 0xff, sizeof at->values);
  }
  if (at->meeting.arrived == 0) at->what = what;
  if (strcmp(at->what, what) != 0) fail(std::string("lanes of a warp meet in ") + at->what + " and in " + what);
  uint64_t* values = at->values[at->meeting.generation % 2];
  values[lane] = value;
  meet(at->meeting, static_cast<uint32_t>(__builtin_popcount(mask)), what);
  return values;
}

inline void run_fiber() {
  for (;;) {
    Fiber& f = *state.current;
    try {
      state.body();
      expect(f.products.empty(), "the thread ended with a wgmma under way");
      expect(f.stores.empty(), "the thread ended with a copy out of its shared memory under way");
    } catch (...) {
      state.error = std::current_exception();
    }
    f.done = true;
    --f.block->running;
    --state.running;
    if (state.cluster.arrived != 0 && state.cluster.arrived == state.running) {  // waits for threads that are left only
      state.cluster.arrived = 0;
      ++state.cluster.generation;
    }
    switch_to_scheduler();
  }
}

inline void resume(Fiber& f) {
  state.current = &f;
  threadIdx = f.thread;
  blockIdx = f.block->index;
  if (_setjmp(state.scheduler) == 0) {
    if (f.started) _longjmp(f.jump, 1);
    f.started = true;
    setcontext(&f.context);
  }
  state.current = nullptr;
}

// A fiber whose kernel has ended is taken again, one that was given up begins anew.
inline void prepare(Fiber& f, Block& block, uint32_t index) {
  if (f.stack == nullptr) {
    f.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f.stack == MAP_FAILED || mprotect(f.stack, 4096, PROT_NONE) != 0) throw std::bad_alloc();
  }
  if (!f.done) f.started = false;
  if (!f.started) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, run_fiber, 0);
  }
  f.done = false;
  f.block = &block;
  f.index = index;
  f.thread = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  f.word = nullptr;
  f.products.clear();
  f.accumulators.clear();
  f.groups = 0;
  f.fenced = false;
  f.stores.clear();
  f.store_groups = 0;
  f.wrote_unfenced = false;
}

[[noreturn]] inline void fail_deadlock(size_t count) {
  std::string message = "deadlock", last;
  for (size_t i = 0; i < count; ++i) {
    const Fiber& f = state.fibers[i];
    std::string doing = f.what;
    if (f.done) {
      doing = "ended";
    } else if (f.mask == 1) {
      const auto offset = static_cast<const unsigned char*>(f.word) - f.block->shared;
      doing += " at offset " + std::to_string(offset) + " for parity " + std::to_string(f.value);
    }
    const std::string group = name_of(*f.block) + ": " + doing;
    if (group != last) message += (i ? "; " : ": ") + group + ", threads from " + std::to_string(f.index);
    last = group;
  }
  fail(message);
}

inline void arrive(size_t index) {
  const Copy copy = std::move(state.copies[index]);
  state.copies.erase(state.copies.begin() + static_cast<std::ptrdiff_t>(index));
  copy.arrive();
}

inline void schedule(size_t count) {
  std::vector<uint32_t> delay(count / warpSize + 1, 0);  // a warp runs in a round whose random bits have none of these
  constexpr uint32_t delays[] = {0, 0, 1, 15};
  if (state.seed != 0) {
    for (uint32_t& d : delay) d = delays[random() % 4];
  }
  while (state.running > 0) {
    size_t first = 0, stride = 1;
    if (state.seed != 0) {
      first = random() % count, stride = random() % count;
      while (std::gcd(stride, count) != 1) ++stride;
    }
    const uint64_t round = state.seed != 0 ? random() : 0;
    bool went_on = false;
    for (size_t i = 0; i < count; ++i) {
      const size_t k = (first + i * stride) % count;
      Fiber& f = state.fibers[k];
      if (f.done || !f.ready()) continue;
      went_on = true;
      if ((round >> (k / warpSize * 4 % 60) & delay[k / warpSize]) != 0) continue;
      resume(f);
      if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
    }
    for (size_t i = state.copies.size(); i-- > 0;) {
      if (state.copies[i].late || random() % 8 != 0) continue;
      arrive(i);
      went_on = true;
    }
    if (went_on || state.running == 0) continue;
    if (state.copies.empty()) fail_deadlock(count);
    arrive(state.seed != 0 ? random() % state.copies.size() : 0);
  }
  expect(state.copies.empty(), "a block ended with a copy under way");
}

inline void run_cluster(uint3 first, dim3 cluster) {
  const uint32_t threads = blockDim.x * blockDim.y * blockDim.z, blocks = cluster.x * cluster.y * cluster.z;
  state.blocks.clear();
  state.copies.clear();
  state.cluster = {};
  state.error = nullptr;
  state.current = nullptr;
  state.running = threads * blocks;
  while (state.shared.size() < blocks) {
    state.shared.push_back(static_cast<unsigned char*>(std::aligned_alloc(1024, kSharedLimit + kCanary)));
  }
  while (state.fibers.size() < state.running) state.fibers.emplace_back();
  for (uint32_t rank = 0; rank < blocks; ++rank) {
    Block& block = state.blocks.emplace_back();
    block.index = {first.x + rank % cluster.x, first.y + rank / cluster.x % cluster.y,
                   first.z + rank / cluster.x / cluster.y};
    block.rank = rank;
    block.threads = block.running = threads;
    block.shared = state.shared[rank];
    block.groups.resize(threads / 128 + 1);
    block.warps.resize(threads / warpSize + 1);
    memset(block.shared, 0xff, state.shared_bytes + kCanary);
    for (uint32_t i = 0; i < threads; ++i) prepare(state.fibers[rank * threads + i], block, i);
  }
  schedule(threads * blocks);
  for (const Block& block : state.blocks) {
    for (size_t i = 0; i < kCanary; ++i) {
      if (block.shared[state.shared_bytes + i] != 0xff) fail(name_of(block) + " wrote past its shared memory");
    }
  }
}

inline void launch(dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes, std::function<void()> body) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  const char* seed = std::getenv("DPO_EMULATION_SEED");
  state.seed = state.random_state = seed ? std::strtoull(seed, nullptr, 10) : 0;
  state.shared_bytes = shared_bytes;
  state.body = std::move(body);
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; z += cluster.z) {
    for (unsigned y = 0; y < grid.y; y += cluster.y) {
      for (unsigned x = 0; x < grid.x; x += cluster.x) run_cluster({x, y, z}, cluster);
    }
  }
}

}  // namespace emulation
