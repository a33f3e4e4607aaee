// Enough of CUDA to run this project's kernels on a CPU, thread by thread, so that their logic is
// tested where no GPU is: each CUDA thread is a coroutine; a block's threads run in turn, up to
// their next barrier or warp exchange. Says nothing of speed, of memory ordering inside a warp, or
// of what a real compiler does.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
using cudaStream_t = void*;
static dim3 threadIdx(0), blockIdx(0), blockDim(1), gridDim(1);

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &u, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return {uint16_t(x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : 0x7fc0u)};
}

namespace {  // each kernel file has its own threads
namespace on_host {

enum class State { ready, at_block, at_warp, done };
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::ready;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static int current;
static std::function<void()> body;
static std::vector<int> votes;         // __syncthreads_or
static std::vector<double> exchanged;  // warp exchanges

inline void wait(State state) {
  threads[current].state = state;
  swapcontext(&threads[current].context, &scheduler);
}

inline void start() {
  body();
  threads[current].state = State::done;
}

// All of threads [first, last) that are not done are in `state`, and there is one.
inline bool all_in(State state, int first, int last) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    any |= threads[i].state == state;
    if (threads[i].state != state && threads[i].state != State::done) return false;
  }
  return any;
}

inline void release(int first, int last) {
  for (int i = first; i < last; ++i) {
    if (threads[i].state != State::done) threads[i].state = State::ready;
  }
}

inline void run_block(int count) {
  if (int(threads.size()) != count) threads = std::vector<Thread>(count);
  votes.assign(count, 0);
  exchanged.assign(count, 0);
  for (Thread& thread : threads) {
    constexpr size_t size = 1 << 16;
    if (!thread.stack) thread.stack.reset(new char[size]);
    thread.state = State::ready;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = size;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (current = 0; current < count; ++current) {
      if (threads[current].state == State::ready) {
        threadIdx = dim3(current, 0, 0);
        swapcontext(&scheduler, &threads[current].context);
        progress = true;
      }
    }
    for (int warp = 0; warp < count; warp += 32) {
      const int last = warp + 32 < count ? warp + 32 : count;
      if (all_in(State::at_warp, warp, last)) release(warp, last);
    }
    if (all_in(State::at_block, 0, count)) release(0, count);
    for (const Thread& thread : threads) progress |= thread.state == State::ready;
  }
  for (const Thread& thread : threads) {
    if (thread.state != State::done) {
      std::fprintf(stderr, "threads wait for each other for ever\n");
      std::abort();
    }
  }
}

template <typename F>
void launch(dim3 grid, dim3 block, F f) {
  body = f;
  gridDim = grid;
  blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(int(block.x));
    }
  }
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::State::at_block); }
inline int __syncthreads_or(int vote) {
  using namespace on_host;
  votes[current] = vote;
  wait(State::at_block);
  int any = 0;
  for (const int one : votes) any |= one;
  wait(State::at_block);  // nobody votes again before everybody has read
  votes[current] = 0;
  return any;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace on_host;
  exchanged[current] = double(value);
  wait(State::at_warp);
  const T other = T(exchanged[current ^ mask]);
  wait(State::at_warp);
  return other;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  using namespace on_host;
  exchanged[current] = vote;
  wait(State::at_warp);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane)
    bits |= unsigned(exchanged[current / 32 * 32 + lane] != 0) << lane;
  wait(State::at_warp);
  return bits;
}
#define __expf(x) std::exp(float(x))         // glibc has a function of this name
inline float __fdividef(float x, float y) {  // 0 for a divisor beyond 2^126
  return std::fabs(y) > 8.507059173023462e37f && !std::isinf(x) ? 0.0f : x / y;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
[[noreturn]] inline void __trap() { std::abort(); }
inline int cudaGetLastError() { return 0; }
inline int cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  return std::memset(p, value, size), 0;
}
}  // namespace
