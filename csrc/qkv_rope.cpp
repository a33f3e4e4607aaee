// qkv_rope: the fused projection of a pack -> rotated queries, and keys (rotated) and values
// gathered for each segment: what split, rope and gather_prefix_kv do one after the other;
// qkv_norm_rope: with rms_norm of queries and keys in between. On a GPU
// one kernel each way (cuda/qkv_rope.cu); on a CPU, whose attention reads keys in place, those
// operators.
#include <algorithm>

#include "rmega_ops.h"

namespace rmega {
namespace {

struct Sizes {
  int64_t t, total, d;
};

// x [t, (heads + 2 groups) d], of which d and the rows of the output follow from tables and index.
Sizes check(const char* op, int64_t width, const at::Tensor& x, const at::Tensor& cos,
            const at::Tensor& sin, const at::Tensor& index, int64_t heads, int64_t groups) {
  TORCH_CHECK(heads >= 0 && groups > 0 && heads % groups == 0, op, ": ", heads, " heads, ", groups,
              " groups");
  TORCH_CHECK(cos.dim() == 2 && sin.sizes() == cos.sizes() &&
                  sin.scalar_type() == cos.scalar_type() && cos.device() == x.device() &&
                  sin.device() == x.device() &&
                  (cos.scalar_type() == at::kFloat || cos.scalar_type() == x.scalar_type()),
              op, ": cos and sin must be [t, d/2] in float32 or x's dtype, got ", cos.scalar_type(),
              " ", cos.sizes(), " and ", sin.scalar_type(), " ", sin.sizes());
  const int64_t t = cos.size(0), d = 2 * cos.size(1);
  const int64_t total = (index.numel() - t - 1) / 2;
  check_prefix_index(index, x.device(), t, total);
  TORCH_CHECK(width == (heads + 2 * groups) * d, op, ": rows of ", width, " for ", heads, " + 2 * ",
              groups, " heads of ", d);
  return {t, total, d};
}

// The heads of one part in the fused projection, a view: [t, heads or groups, d].
at::Tensor part_of(const at::Tensor& x, int part, int64_t heads, int64_t groups, int64_t d) {
  const int64_t t = x.size(0), r = heads / groups;
  if (heads == 0) {
    return x.view({t, 2, groups, d}).select(1, part - 1);
  }
  const at::Tensor grouped = x.view({t, groups, r + 2, d});
  return part == 0 ? grouped.narrow(2, 0, r) : grouped.select(2, r + part - 1);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_rope(const at::Tensor& x, const at::Tensor& cos,
                                                        const at::Tensor& sin,
                                                        const at::Tensor& index, int64_t heads,
                                                        int64_t groups) {
  TORCH_CHECK(x.dim() == 2, "qkv_rope: x must be [t, (heads + 2 groups) d], got ", x.sizes());
  const Sizes sizes = check("qkv_rope", x.size(1), x, cos, sin, index, heads, groups);
  const int64_t t = sizes.t, total = sizes.total, d = sizes.d;
  TORCH_CHECK(x.size(0) == t, "qkv_rope: ", x.size(0), " rows, tables for ", t);
  const at::Tensor source = x.stride(1) == 1 ? x : x.contiguous();
  if (!x.is_cuda()) {
    const at::Tensor rows = index.narrow(0, 0, total), whole = source.contiguous();
    at::Tensor query = part_of(whole, 0, heads, groups, d);
    query = heads == 0 ? at::empty({t, 0, d}, x.options()) : query.reshape({t, heads, d});
    return {heads == 0 ? query : rope(query, cos, sin, false),
            rope(part_of(whole, 1, heads, groups, d), cos, sin, false).index_select(0, rows),
            part_of(whole, 2, heads, groups, d).index_select(0, rows)};
  }
  const at::Tensor c = cos.contiguous(), s = sin.contiguous();
  at::Tensor query = at::empty({t, heads, d}, x.options());
  at::Tensor key = at::empty({total, groups, d}, x.options());
  at::Tensor value = at::empty({total, groups, d}, x.options());
  if (query.numel() + key.numel() > 0) {
    RMEGA_CUDA_CALL(x,
                    launch_qkv_rope(source.const_data_ptr(), c.const_data_ptr(), s.const_data_ptr(),
                                    index.const_data_ptr<int32_t>(), query.mutable_data_ptr(),
                                    key.mutable_data_ptr(), value.mutable_data_ptr(),
                                    {t, total, heads, groups, d}, source.stride(0), dtype_of(x),
                                    cos.scalar_type() == at::kFloat, stream));
  }
  return {query, key, value};
}

at::Tensor qkv_rope_backward(const at::Tensor& grad_query, const at::Tensor& grad_key,
                             const at::Tensor& grad_value, const at::Tensor& cos,
                             const at::Tensor& sin, const at::Tensor& index) {
  TORCH_CHECK(
      grad_query.dim() == 3 && grad_key.dim() == 3 && grad_value.sizes() == grad_key.sizes() &&
          grad_key.scalar_type() == grad_query.scalar_type() &&
          grad_value.scalar_type() == grad_query.scalar_type(),
      "qkv_rope: gradients ", grad_query.sizes(), ", ", grad_key.sizes(), ", ", grad_value.sizes());
  const int64_t heads = grad_query.size(1), groups = grad_key.size(1);
  const int64_t width = (heads + 2 * groups) * grad_key.size(2);
  const Sizes sizes = check("qkv_rope backward", width, grad_query, cos, sin, index, heads, groups);
  const int64_t t = sizes.t, total = sizes.total, d = sizes.d;
  TORCH_CHECK(grad_query.size(0) == t && grad_key.size(0) == total, "qkv_rope: gradients of ",
              grad_query.size(0), " and ", grad_key.size(0), " rows for ", t, " and ", total);
  at::Tensor out = at::empty({t, width}, grad_query.options());
  if (!out.is_cuda()) {
    const at::Tensor rows = index.narrow(0, 0, total);
    const auto sum = [&](const at::Tensor& grad) {
      const at::Tensor zero = at::zeros({t, groups, d}, grad.options().dtype(at::kFloat));
      return zero.index_add(0, rows, grad.to(at::kFloat));
    };
    if (heads > 0) {
      part_of(out, 0, heads, groups, d)
          .copy_(rope(grad_query, cos, sin, true).view({t, groups, heads / groups, d}));
    }
    part_of(out, 1, heads, groups, d)
        .copy_(rope(sum(grad_key), cos.to(at::kFloat), sin.to(at::kFloat), true));
    part_of(out, 2, heads, groups, d).copy_(sum(grad_value));
    return out;
  }
  const at::Tensor dq = grad_query.contiguous(), dk = grad_key.contiguous();
  const at::Tensor dv = grad_value.contiguous(), c = cos.contiguous(), s = sin.contiguous();
  if (out.numel() > 0) {
    const int32_t* offsets = index.const_data_ptr<int32_t>() + total;
    RMEGA_CUDA_CALL(out, launch_qkv_rope_backward(
                             dq.const_data_ptr(), dk.const_data_ptr(), dv.const_data_ptr(),
                             c.const_data_ptr(), s.const_data_ptr(), offsets, offsets + t + 1,
                             out.mutable_data_ptr(), {t, total, heads, groups, d}, dtype_of(out),
                             cos.scalar_type() == at::kFloat, stream));
  }
  return out;
}

namespace {

void check_head_norms(const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
                      int64_t d) {
  for (const at::Tensor& weight : {q_weight, k_weight}) {
    TORCH_CHECK(weight.dim() == 1 && weight.size(0) == d &&
                    weight.scalar_type() == x.scalar_type() && weight.device() == x.device(),
                "qkv_norm_rope: weight ", weight.scalar_type(), " ", weight.sizes(), " on ",
                weight.device(), " for heads of ", d, " in ", x.scalar_type(), " on ", x.device());
  }
}

// f(part, its heads in x, their weight) of queries and keys.
template <typename F>
void for_normed(const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
                int64_t heads, int64_t groups, int64_t d, F f) {
  for (int part = heads > 0 ? 0 : 1; part < 2; ++part) {
    f(part, part_of(x, part, heads, groups, d), part == 0 ? q_weight : k_weight);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope(
    const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
    const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& index, int64_t heads,
    int64_t groups, double eps) {
  TORCH_CHECK(x.dim() == 2, "qkv_norm_rope: x must be [t, (heads + 2 groups) d], got ", x.sizes());
  const Sizes sizes = check("qkv_norm_rope", x.size(1), x, cos, sin, index, heads, groups);
  const int64_t t = sizes.t, total = sizes.total, d = sizes.d;
  TORCH_CHECK(x.size(0) == t, "qkv_norm_rope: ", x.size(0), " rows, tables for ", t);
  check_head_norms(x, q_weight, k_weight, d);
  if (!x.is_cuda()) {
    if (x.scalar_type() != at::kFloat) {  // rounded once, as on a GPU
      const auto [query, key, value] =
          qkv_norm_rope(x.to(at::kFloat), q_weight.to(at::kFloat), k_weight.to(at::kFloat),
                        cos.to(at::kFloat), sin.to(at::kFloat), index, heads, groups, eps);
      const auto dtype = x.scalar_type();
      return {query.to(dtype), key.to(dtype), value.to(dtype)};
    }
    const at::Tensor normed = x.clone(at::MemoryFormat::Contiguous);
    for_normed(normed, q_weight, k_weight, heads, groups, d,
               [&](int, at::Tensor part, const at::Tensor& weight) {
                 part.copy_(std::get<0>(rms_norm(part.contiguous(), weight, eps)));
               });
    return qkv_rope(normed, cos, sin, index, heads, groups);
  }
  const at::Tensor source = x.stride(1) == 1 ? x : x.contiguous();
  const at::Tensor c = cos.contiguous(), s = sin.contiguous();
  const at::Tensor qw = q_weight.contiguous(), kw = k_weight.contiguous();
  at::Tensor query = at::empty({t, heads, d}, x.options());
  at::Tensor key = at::empty({total, groups, d}, x.options());
  at::Tensor value = at::empty({total, groups, d}, x.options());
  if (query.numel() + key.numel() > 0) {
    const HeadNorms norms{qw.const_data_ptr(), kw.const_data_ptr(), eps};
    RMEGA_CUDA_CALL(x, launch_qkv_norm_rope(
                           source.const_data_ptr(), norms, c.const_data_ptr(), s.const_data_ptr(),
                           index.const_data_ptr<int32_t>(), query.mutable_data_ptr(),
                           key.mutable_data_ptr(), value.mutable_data_ptr(),
                           {t, total, heads, groups, d}, source.stride(0), dtype_of(x),
                           cos.scalar_type() == at::kFloat, stream));
  }
  return {query, key, value};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope_backward(
    const at::Tensor& grad_query, const at::Tensor& grad_key, const at::Tensor& grad_value,
    const at::Tensor& x, const at::Tensor& q_weight, const at::Tensor& k_weight,
    const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& index, double eps) {
  const int64_t heads = grad_query.size(1), groups = grad_key.size(1);
  if (!x.is_cuda()) {
    if (x.scalar_type() != at::kFloat) {
      const auto [dx, dq_weight, dk_weight] = qkv_norm_rope_backward(
          grad_query.to(at::kFloat), grad_key.to(at::kFloat), grad_value.to(at::kFloat),
          x.to(at::kFloat), q_weight.to(at::kFloat), k_weight.to(at::kFloat), cos.to(at::kFloat),
          sin.to(at::kFloat), index, eps);
      const auto dtype = x.scalar_type();
      return {dx.to(dtype), dq_weight.to(dtype), dk_weight.to(dtype)};
    }
    at::Tensor out = qkv_rope_backward(grad_query, grad_key, grad_value, cos, sin, index);
    const int64_t d = grad_key.size(2);
    const at::Tensor whole = x.contiguous();
    at::Tensor grads[2] = {q_weight.new_zeros({d}), k_weight.new_zeros({d})};
    for_normed(whole, q_weight, k_weight, heads, groups, d,
               [&](int number, const at::Tensor& part, const at::Tensor& weight) {
                 const at::Tensor own = part.contiguous();
                 const at::Tensor inv = std::get<1>(rms_norm(own, weight, eps));
                 at::Tensor into = part_of(out, number, heads, groups, d);
                 const at::Tensor grad = into.contiguous();
                 into.copy_(std::get<0>(rms_norm_backward(grad, own, weight, inv)));
                 // In double: there may be many more rows than channels.
                 const at::Tensor normed = own.view({-1, d}).to(at::kDouble).mul(inv.unsqueeze(1));
                 grads[number] = normed.mul(grad.view({-1, d})).sum(0).to(weight.scalar_type());
               });
    return {out, grads[0], grads[1]};
  }
  TORCH_CHECK(grad_query.dim() == 3 && grad_key.dim() == 3 && x.dim() == 2 &&
                  grad_value.sizes() == grad_key.sizes() &&
                  grad_query.scalar_type() == x.scalar_type() &&
                  grad_key.scalar_type() == x.scalar_type() &&
                  grad_value.scalar_type() == x.scalar_type(),
              "qkv_norm_rope: gradients ", grad_query.sizes(), ", ", grad_key.sizes(), ", ",
              grad_value.sizes(), " for x ", x.sizes());
  const Sizes sizes = check("qkv_norm_rope backward", x.size(1), x, cos, sin, index, heads, groups);
  const int64_t t = sizes.t, total = sizes.total, d = sizes.d;
  TORCH_CHECK(grad_query.size(0) == t && x.size(0) == t && grad_key.size(0) == total,
              "qkv_norm_rope: gradients of ", grad_query.size(0), " and ", grad_key.size(0),
              " rows for ", t, " and ", total);
  check_head_norms(x, q_weight, k_weight, d);
  const at::Tensor source = x.stride(1) == 1 ? x : x.contiguous();
  const at::Tensor dq = grad_query.contiguous(), dk = grad_key.contiguous();
  const at::Tensor dv = grad_value.contiguous(), c = cos.contiguous(), s = sin.contiguous();
  const at::Tensor qw = q_weight.contiguous(), kw = k_weight.contiguous();
  at::Tensor out = at::empty({t, x.size(1)}, x.options());
  // As many blocks on every GPU, so that every GPU sums in one order.
  const int64_t parts = std::min<int64_t>(t, 1024);
  at::Tensor partial = at::empty({parts, 2, d}, x.options().dtype(at::kFloat));
  if (out.numel() > 0) {
    const int32_t* offsets = index.const_data_ptr<int32_t>() + total;
    const HeadNorms norms{qw.const_data_ptr(), kw.const_data_ptr(), eps};
    RMEGA_CUDA_CALL(
        out, launch_qkv_norm_rope_backward(
                 dq.const_data_ptr(), dk.const_data_ptr(), dv.const_data_ptr(),
                 source.const_data_ptr(), norms, c.const_data_ptr(), s.const_data_ptr(), offsets,
                 offsets + t + 1, out.mutable_data_ptr(), partial.mutable_data_ptr(),
                 {t, total, heads, groups, d}, source.stride(0), parts, dtype_of(out),
                 cos.scalar_type() == at::kFloat, stream));
  }
  const at::Tensor sums = partial.sum(0).to(x.scalar_type());
  return {out, sums[0], sums[1]};
}

}  // namespace rmega
