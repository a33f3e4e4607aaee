// pairwise_loss on a GPU: values, reported sums and gradients in one launch, every sum in a fixed
// order. Block 0 adds up the pairs; in the other blocks each warp owns one reward and adds the
// gradients of the pairs that hold it, so that nothing needs zeroing, an atomic or a second launch.
#include <type_traits>

#include "device.cuh"
#include "../pair_math.h"

namespace rmega {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// Sum over the block, valid in thread 0; `shared` holds kWarps values and may be used again at
// once.
__device__ __forceinline__ double block_sum(double x, double* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) {
    shared[threadIdx.x / 32] = x;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWarps; ++i) {
      sum += shared[i];
    }
  }
  __syncthreads();
  return sum;
}

// The term of pair i, whose rows c and r are in range.
template <typename R, typename T>
__device__ __forceinline__ PairTerm<T> term_of(int64_t i, T c, T r, const R* rewards,
                                               const int64_t* chosen, const int64_t* rejected,
                                               const T* margin, const T* weight, int64_t n,
                                               int64_t m, const LossOptions& options) {
  if (options.loss != Loss::plackett_luce) {
    return pair_term<T>(c, r, margin[i], weight[i], options);
  }
  // The other pairs of the choice may be out of range, which is reported where they are pair i.
  const auto reward = [=](int64_t row) {
    return row >= 0 && row < n ? T(load(rewards[row])) : T(0);
  };
  const Choice<T> choice = choice_of<T>(i, chosen, rejected, margin, weight, m, reward);
  return choice_term<T>(choice, i, c, r, margin[i], weight[i], options);
}

template <typename R, typename T>
__global__ void pairwise(const R* __restrict__ rewards, const int64_t* __restrict__ chosen,
                         const int64_t* __restrict__ rejected, const T* __restrict__ margin,
                         const T* __restrict__ weight, T* __restrict__ loss, T* __restrict__ stats,
                         T* __restrict__ grad, int64_t n, int64_t m, LossOptions options) {
  if (blockIdx.x == 0) {
    __shared__ double shared[kWarps];
    PairSums sums;
    for (int64_t i = threadIdx.x; i < m; i += kThreads) {
      require_row(chosen[i], n, "pairwise_loss chosen");
      require_row(rejected[i], n, "pairwise_loss rejected");
      const T c = load(rewards[chosen[i]]), r = load(rewards[rejected[i]]);
      sums.add(term_of<R, T>(i, c, r, rewards, chosen, rejected, margin, weight, n, m, options), c,
               r);
    }
    PairSums total;
    total.base = block_sum(sums.base, shared);
    total.penalty = block_sum(sums.penalty, shared);
    total.wins = block_sum(sums.wins, shared);
    total.ties = block_sum(sums.ties, shared);
    total.chosen = block_sum(sums.chosen, shared);
    total.rejected = block_sum(sums.rejected, shared);
    total.abs_diff = block_sum(sums.abs_diff, shared);
    if (threadIdx.x == 0) {
      total.write(loss, stats, m);
    }
    return;
  }
  const int64_t row = int64_t(blockIdx.x - 1) * kWarps + threadIdx.x / 32;
  if (row >= n) {
    return;
  }
  double sum = 0;  // double: the order of lanes then hardly matters to the rounded value either
  for (int64_t i = threadIdx.x % 32; i < m; i += 32) {
    const int64_t c = chosen[i], r = rejected[i];
    // Out-of-range partners are block 0's to report; here they are only not read.
    if ((c == row || r == row) && c >= 0 && c < n && r >= 0 && r < n) {
      const PairTerm<T> term = term_of<R, T>(i, load(rewards[c]), load(rewards[r]), rewards, chosen,
                                             rejected, margin, weight, n, m, options);
      sum += (c == row ? double(term.grad_chosen) : 0.0) +
             (r == row ? double(term.grad_rejected) : 0.0);
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    grad[row] = T(sum);
  }
}

}  // namespace

int launch_pairwise_loss(const void* rewards, const int64_t* chosen, const int64_t* rejected,
                         const void* margin, const void* weight, void* loss, void* stats,
                         void* grad, int64_t n, int64_t m, DType dtype, LossOptions options,
                         Stream stream) {
  for_dtype(dtype, [&](auto* element) {
    using R = std::remove_pointer_t<decltype(element)>;
    using T = typename Accumulate<R>::type;
    const unsigned blocks = static_cast<unsigned>(1 + (n + kWarps - 1) / kWarps);
    pairwise<R, T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const R*>(rewards), chosen, rejected, static_cast<const T*>(margin),
        static_cast<const T*>(weight), static_cast<T*>(loss), static_cast<T*>(stats),
        static_cast<T*>(grad), n, m, options);
  });
  return cudaGetLastError();
}

}  // namespace rmega
