// Packed attention on the CPU: queries of a segment see a shared prefix in full and their own keys
// causally.
//
// Letters: t tokens, tq query rows, s segments, a query heads, g key/value groups, r = a / g, d
// head size. Work is cut into (comparison, group) pairs. Each packs its keys and values once, for
// the prefix and all responses, and owns the gradients of its rows, so sums have a fixed order and
// threads share nothing. The r query heads of a group are rows of one matrix (row i = token i / r,
// head i % r). GEMMs are ATen's brgemm (AMX, AVX-512 or AVX2 through oneDNN;
// packed_attention_tasks.h), softmax and its derivative are packed_attention_lanes.h. Memory beside
// the results is linear in the tokens of one comparison.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "packed_attention_plan.h"
#include "../rmega_ops.h"

// Vectors wider than the base instruction set stay inside inlined code.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rmega {
namespace attention {
namespace {
#if defined(__x86_64__)
#define LANES Avx512
#define LANES_WIDTH 16
#define LANES_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "packed_attention_lanes.h"
#undef LANES
#undef LANES_WIDTH
#undef LANES_TARGET
#define LANES Avx2
#define LANES_WIDTH 8
#define LANES_TARGET __attribute__((target("avx2,fma")))
#include "packed_attention_lanes.h"
#undef LANES
#undef LANES_WIDTH
#undef LANES_TARGET
#endif
#define LANES Portable
#define LANES_WIDTH 4
#define LANES_TARGET
#include "packed_attention_lanes.h"
#undef LANES
#undef LANES_WIDTH
#undef LANES_TARGET
}  // namespace
}  // namespace attention
}  // namespace rmega

#include "packed_attention_tasks.h"

namespace rmega {
namespace attention {
namespace {

// run(unit, group) for all pairs, the longest first, on all threads.
template <typename Make>
void for_each_task(const std::vector<Unit>& units, int64_t groups, const Make& make_worker) {
  const int64_t tasks = static_cast<int64_t>(units.size()) * groups;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(tasks, at::get_num_threads()));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto worker = make_worker();
      for (int64_t task = next++; task < tasks; task = next++)
        worker.run(units[task / groups], task % groups);
    }
    at::native::cpublas::brgemm_release();
  });
}

// Whether this CPU multiplies bfloat16 (AMX or AVX512-BF16): asked of brgemm itself.
bool bfloat16_products() {
  static const bool supported = [] {
    const std::vector<at::BFloat16> a(32 * 32), b(32 * 32);
    std::vector<float> c(32 * 32);
    try {
      at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, a.data(), b.data(), c.data(),
                                  true);
    } catch (const std::exception&) {
      return false;
    }
    at::native::cpublas::brgemm_release();
    return true;
  }();
  return supported;
}

// with(IO, Math, Lanes) for a dtype and the instruction set in use. bfloat16 tensors are multiplied
// in fp32 where the CPU has no bfloat16 GEMM.
template <typename Lanes, typename With>
void with_math(at::ScalarType dtype, bool wide, const With& with) {
  if (dtype == at::kFloat) {
    with(float{}, Single{}, Lanes{});
  } else if (wide && bfloat16_products()) {
    with(at::BFloat16{}, Bfloat16{}, Lanes{});
  } else {
    with(at::BFloat16{}, Single{}, Lanes{});
  }
}

template <typename With>
void with_kernels(at::ScalarType dtype, const With& with) {
#if defined(__x86_64__)
  const std::string isa = elementwise_isa();
  if (isa == "avx512") return with_math<Avx512>(dtype, true, with);
  if (isa == "avx2") return with_math<Avx2>(dtype, false, with);
#endif
  with_math<Portable>(dtype, false, with);
}

Shape check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.sizes() == k.sizes() && q.size(2) == k.size(2) &&
                  k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "packed_attention: q must be [tq, r * g, d], k and v [t, g, d], got ", q.sizes(),
              ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK((q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16) &&
                  k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              "packed_attention: q, k and v must be float32 or bfloat16, got ", q.scalar_type(),
              ", ", k.scalar_type(), ", ", v.scalar_type());
  TORCH_CHECK(scale > 0, "packed_attention: scale must be positive, got ", scale);
  const int64_t a = q.size(1), g = k.size(1), d = q.size(2);
  return {a,
          g,
          a / g,
          d,
          round_up(d, 32),
          static_cast<float>(scale),
          static_cast<float>(scale * 1.4426950408889634)};
}

at::Tensor dense_rows(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

std::tuple<at::Tensor, at::Tensor> packed_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                                    const at::Tensor& v_in,
                                                    const at::Tensor& segments, double scale) {
  const Shape shape = check(q_in, k_in, v_in, scale);
  const at::Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const Plan plan = make_plan(segments, q.size(0), k.size(0));
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(0), shape.a}, q.options().dtype(at::kFloat));
  clear_rest(out, plan.queries);
  clear_rest(lse, plan.queries);
  with_kernels(q.scalar_type(), [&](auto io, auto math, auto lanes) {
    using Task = Forward<decltype(io), decltype(math), decltype(lanes)>;
    for_each_task(plan.units, shape.g, [&] { return Task(shape, q, k, v, out, lse); });
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const at::Tensor& grad_in, const at::Tensor& q_in, const at::Tensor& k_in,
    const at::Tensor& v_in, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& segments, double scale) {
  const Shape shape = check(q_in, k_in, v_in, scale);
  TORCH_CHECK(grad_in.sizes() == q_in.sizes() && out.sizes() == q_in.sizes() && lse.is_contiguous(),
              "packed_attention_backward: grad and out must be like q ", q_in.sizes(), ", got ",
              grad_in.sizes(), " and ", out.sizes());
  const at::Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const at::Tensor grad = dense_rows(grad_in.to(q.scalar_type()));
  const Plan plan = make_plan(segments, q.size(0), k.size(0));
  at::Tensor grad_q = at::empty(q.sizes(), q.options());
  at::Tensor grad_k = at::empty(k.sizes(), k.options()), grad_v = at::empty_like(grad_k);
  clear_rest(grad_q, plan.queries);
  clear_rest(grad_k, plan.keys);
  clear_rest(grad_v, plan.keys);
  with_kernels(q.scalar_type(), [&](auto io, auto math, auto lanes) {
    using Task = Backward<decltype(io), decltype(math), decltype(lanes)>;
    for_each_task(plan.units, shape.g,
                  [&] { return Task(shape, grad, q, k, v, out, lse, grad_q, grad_k, grad_v); });
  });
  return {grad_q, grad_k, grad_v};
}

TORCH_LIBRARY_FRAGMENT(rmega, m) {
  m.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor segments, float scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor segments, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rmega, CPU, m) {
  m.impl("packed_attention", packed_attention);
  m.impl("packed_attention_backward", packed_attention_backward);
}

}  // namespace
}  // namespace attention
}  // namespace rmega
