// The operators as C++ functions on tensors. Checks and CPU kernels in <op>.cpp, CUDA kernels in
// cuda/<op>.cu. Letters: t tokens, h hidden, n responses, m pairs, s segments, g key groups, d head
// size.
#pragma once

// Of ATen only what is used: <ATen/ATen.h> would take most of the time of a build.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <string>
#include <tuple>

#include "launchers.h"

#ifdef RMEGA_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define RMEGA_CUDA_CALL(tensor, call)                                        \
  do {                                                                       \
    const c10::cuda::CUDAGuard device_guard((tensor).device());              \
    const rmega::Stream stream = c10::cuda::getCurrentCUDAStream().stream(); \
    const int error = (call);                                                \
    TORCH_CHECK(error == 0, #call ": CUDA error ", error);                   \
  } while (false)
#else
#define RMEGA_CUDA_CALL(tensor, call) TORCH_CHECK(false, "rmega._C was built without CUDA")
#endif

namespace rmega {

at::Tensor gather_last_token(const at::Tensor& hidden, const at::Tensor& last);
at::Tensor gather_last_token_backward(const at::Tensor& grad, const at::Tensor& last, int64_t t);

std::tuple<at::Tensor, at::Tensor, at::Tensor> pairwise_loss(
    const at::Tensor& rewards, const at::Tensor& chosen, const at::Tensor& rejected,
    const at::Tensor& margin, const at::Tensor& weight, c10::string_view loss,
    c10::string_view penalty, double penalty_weight, double label_smoothing, bool barrier_clamp);

// int32 [2 total + t + 1] on the CPU: rows [total], the source row of each output row of
// gather_prefix_kv; offsets [t + 1] and sources [total], the output rows of each source row in the
// order of segments. It is made once per pack; kernels on a GPU read nothing else of the segments.
at::Tensor prefix_index(const at::Tensor& prefix_start, const at::Tensor& prefix_len,
                        const at::Tensor& own_start, const at::Tensor& own_len, int64_t t);
void check_prefix_index(const at::Tensor& index, const at::Device& device, int64_t t,
                        int64_t total);
at::Tensor gather_prefix_kv(const at::Tensor& x, const at::Tensor& prefix_start,
                            const at::Tensor& prefix_len, const at::Tensor& own_start,
                            const at::Tensor& own_len, int64_t total,
                            const std::optional<at::Tensor>& index);
at::Tensor gather_prefix_kv_backward(const at::Tensor& grad, const at::Tensor& prefix_start,
                                     const at::Tensor& prefix_len, const at::Tensor& own_start,
                                     const at::Tensor& own_len, int64_t t,
                                     const std::optional<at::Tensor>& index);

// qkv_rope.cpp
std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_rope(const at::Tensor& x, const at::Tensor& cos,
                                                        const at::Tensor& sin,
                                                        const at::Tensor& index, int64_t heads,
                                                        int64_t groups);
at::Tensor qkv_rope_backward(const at::Tensor& grad_query, const at::Tensor& grad_key,
                             const at::Tensor& grad_value, const at::Tensor& cos,
                             const at::Tensor& sin, const at::Tensor& index);
// With rms_norm of queries and keys, weights [d], before the rotation. Backward: of x and of both
// weights.
std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope(
    const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
    const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& index, int64_t heads,
    int64_t groups, double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope_backward(
    const at::Tensor& grad_query, const at::Tensor& grad_key, const at::Tensor& grad_value,
    const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
    const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& index, double eps);

// float32 and bfloat16, on a GPU also float16 (elementwise.cpp). rms_norm also returns 1 / rms of
// each row, for its backward.
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight,
                                            double eps);
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight,
                                                     const at::Tensor& inv);
// total = x + residual and its rms_norm: (total, y, inv). Backward: of x and residual alike, and of
// the weight.
std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x,
                                                            const at::Tensor& residual,
                                                            const at::Tensor& weight, double eps);
std::tuple<at::Tensor, at::Tensor> add_rms_norm_backward(const at::Tensor& grad_total,
                                                         const at::Tensor& grad,
                                                         const at::Tensor& total,
                                                         const at::Tensor& weight,
                                                         const at::Tensor& inv);
at::Tensor swiglu(const at::Tensor& x);
at::Tensor swiglu_backward(const at::Tensor& grad, const at::Tensor& x);
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool backwards);

// "avx512", "avx2" or "portable": the best that this CPU has, or a lower one that a test set ("" =
// the best again).
std::string elementwise_isa();
void set_elementwise_isa(const std::string& name);

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16, got ",
                  tensor.scalar_type());
  }
}

// The dtype that sums are kept in.
inline at::ScalarType accumulate_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace rmega
