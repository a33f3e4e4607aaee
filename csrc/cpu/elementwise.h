// Fused elementwise kernels on the CPU: the table of functions that each instruction set provides.
// Free of torch headers: elementwise_<isa>.cpp are compiled for more than the baseline, and an
// inline function of a shared header compiled there could be the copy that the linker keeps for
// everybody. Letters: h hidden, f MLP size, a heads, d head size. All arithmetic in fp32, one
// rounding at the store.
#pragma once

#include <cstdint>

#include "../launchers.h"

namespace rmega {

struct bf16 {
  uint16_t bits;
};

// T: element type of x, weight, results; C: element type of the rotation tables. Every pointer at
// its first row.
template <typename T>
struct NormKernels {
  // y = weight * round(x * inv), inv [rows] = 1 / sqrt(mean(x^2) + eps)
  void (*forward)(const T* x, const T* weight, T* y, float* inv, int64_t rows, int64_t h,
                  float eps);
  // dx, and dweight [h] += sum over rows
  void (*backward)(const T* dy, const T* x, const T* weight, const float* inv, T* dx,
                   float* dweight, int64_t rows, int64_t h);
};

template <typename T>
struct GluKernels {
  // x [rows, 2f] = [gate, up] -> y [rows, f] = silu(gate) * up
  void (*forward)(const T* x, T* y, int64_t rows, int64_t f);
  void (*backward)(const T* dy, const T* x, T* dx, int64_t rows, int64_t f);
};

template <typename T, typename C>
struct RopeKernels {
  // x [rows, a, d] with strides row_stride, head_stride, 1 -> y [rows, a, d]; sign -1 turns
  // backwards (the derivative)
  void (*rotate)(const T* x, const C* cos, const C* sin, T* y, int64_t rows, int64_t a, int64_t d,
                 int64_t row_stride, int64_t head_stride, float sign);
};

template <typename T>
struct SumKernels {
  // out [n] = round(sum over k < count, in that order, of sources[k][offset + .])
  void (*sum)(const T* const* sources, int64_t count, int64_t offset, T* out, int64_t n);
};

constexpr int64_t kPairs = 256;  // pairs at a time

// Scores, margins and weights of up to kPairs pairs, and what comes of them; the arithmetic of
// pair_math.h. Up to the next multiple of 16, the caller fills unused places of the four inputs
// with zeros.
struct PairBlock {
  float chosen[kPairs], rejected[kPairs], margin[kPairs], weight[kPairs];
  float base[kPairs], penalty[kPairs], grad_chosen[kPairs], grad_rejected[kPairs], distance[kPairs];
  double sum_base, sum_penalty, sum_chosen, sum_rejected,
      sum_distance;  // over the block; distance = |chosen - rejected|
  double wins, ties;
};

struct ElementwiseKernels {
  NormKernels<float> norm_f32;
  NormKernels<bf16> norm_bf16;
  GluKernels<float> glu_f32;
  GluKernels<bf16> glu_bf16;
  RopeKernels<float, float> rope_f32;
  RopeKernels<bf16, bf16> rope_bf16;
  RopeKernels<bf16, float> rope_bf16_f32;
  SumKernels<float> sum_f32;
  SumKernels<bf16> sum_bf16;
  void (*pairs)(PairBlock& block, int64_t m, const LossOptions& options);
};

extern const ElementwiseKernels kElementwisePortable;
#if defined(__x86_64__)
extern const ElementwiseKernels kElementwiseAvx2;    // AVX2 and FMA
extern const ElementwiseKernels kElementwiseAvx512;  // AVX-512 F, BW, DQ, VL
#endif

// The table for this CPU (elementwise.cpp).
const ElementwiseKernels& elementwise_kernels();

}  // namespace rmega
