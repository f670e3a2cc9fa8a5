// Executes CUDA C++ on the CPU, so that machines without a GPU run the kernels' own source.
//
// Every thread of a block is a fiber; blocks come one after another. __syncthreads and warp operations hand over to the
// next fiber and fail when threads diverge there. Fibers run in order or in reverse, and shared memory begins as NaN:
// results that depend on either are wrong. What this cannot find: races within a statement, memory ordering. A fiber
// starts once and takes one block after another, and jumps hand over: swapcontext asks the system for signals each time.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define TOKOPT_HOST
#define __global__
#define __device__
#define __shared__ static __attribute__((section("shared_memory")))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Place {
  unsigned x, y, z;
};

static Place threadIdx, blockIdx;

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

inline float half_to_float(unsigned short bits) {
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned short float_to_half(float x) {
  _Float16 half = x;
  unsigned short bits;
  memcpy(&bits, &half, sizeof half);
  return bits;
}

inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }

// The linker's names for both ends of the section of shared memory.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_shared_memory[], __stop_shared_memory[];

namespace host {

constexpr int STACK = 1 << 16;
enum State { READY, AT_BLOCK, AT_WARP, DONE };

struct Fiber {
  ucontext_t start;
  jmp_buf place;     // where it goes on
  std::vector<char> stack;
  State state;
  int turn;          // warp operations so far; their values alternate between two places
  unsigned value[2];
};

static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int running;
static void (*body)(void *);
static void *body_data;

inline void fail(const char *reason) {
  fprintf(stderr, "host shim: %s in block (%u, %u)\n", reason, blockIdx.x, blockIdx.y);
  abort();
}

inline void wait_at(State state) {
  fibers[running].state = state;
  if (!_setjmp(fibers[running].place)) _longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {
    body(body_data);
    wait_at(DONE);
  }
}

// Let a fiber go on until it waits.
__attribute__((noinline)) inline void go_on(Fiber &fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.stack.size()) _longjmp(fiber.place, 1);
  fiber.stack.resize(STACK);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = STACK;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Let those of [from, to) go on that wait at `state`, when all that are not done wait there.
inline bool release(int from, int to, State state) {
  int waiting = 0, done = 0;
  for (int i = from; i < to; i++) waiting += fibers[i].state == state, done += fibers[i].state == DONE;
  if (!waiting || waiting + done < to - from) return false;
  if (done) fail(state == AT_BLOCK ? "threads had returned at __syncthreads" : "lanes had returned at a warp operation");
  for (int i = from; i < to; i++) fibers[i].state = READY;
  return true;
}

inline void run_block(int threads, bool reversed) {
  if (__start_shared_memory) memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  fibers.resize(threads);
  for (auto &fiber : fibers) fiber.state = READY, fiber.turn = 0;
  for (int done = 0; done < threads;) {
    bool moved = false;
    for (int i = 0; i < threads; i++) {
      running = reversed ? threads - 1 - i : i;
      if (fibers[running].state != READY) continue;
      threadIdx = {unsigned(running), 0, 0};
      go_on(fibers[running]);
      moved = true;
    }
    for (int warp = 0; warp < threads; warp += 32) moved |= release(warp, min(warp + 32, threads), AT_WARP);
    moved |= release(0, threads, AT_BLOCK);
    if (!moved) fail("threads wait at different places");
    done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber &f) { return f.state == DONE; });
  }
}

// The values that all lanes of this warp bring to one operation.
template <class T>
T exchange(T value, int lane) {
  Fiber &mine = fibers[running];
  int slot = mine.turn++ % 2;
  memcpy(&mine.value[slot], &value, sizeof value);
  wait_at(AT_WARP);
  T other;
  memcpy(&other, &fibers[running / 32 * 32 + lane].value[slot], sizeof other);
  return other;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  kernel(*(A *)arguments[I]...);
}

template <class... A>
void run(void (*kernel)(A...), void **arguments, int columns, int rows, int threads, bool reversed) {
  auto once = [=] { call(kernel, arguments, std::index_sequence_for<A...>()); };
  body = [](void *data) { (*(decltype(once) *)data)(); };
  body_data = (void *)&once;
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < columns; x++) {
      blockIdx = {unsigned(x), unsigned(y), 0};
      run_block(threads, reversed);
    }
}

}  // namespace host

inline void __syncthreads() { host::wait_at(host::AT_BLOCK); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return host::exchange(value, threadIdx.x % 32 ^ lanes);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  host::Fiber &mine = host::fibers[host::running];
  int slot = mine.turn % 2, first = host::running / 32 * 32;
  host::exchange(unsigned(vote), 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++) votes |= host::fibers[first + lane].value[slot] << lane;
  return votes;
}
