// gather_last_token: out [n, h] = hidden [t, h] at rows last [n]. Backward adds repeated rows in
// the order of n.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "rmega_ops.h"

namespace rmega {
namespace {

void check_rows(const at::Tensor& matrix, const char* name, const at::Tensor& last) {
  TORCH_CHECK(matrix.dim() == 2, "gather_last_token: ", name, " must be [rows, h], got ",
              matrix.sizes());
  TORCH_CHECK(last.dim() == 1 && last.scalar_type() == at::kLong,
              "gather_last_token: last must be int64 [n], got ", last.scalar_type(), " ",
              last.sizes());
  TORCH_CHECK(matrix.device() == last.device(), "gather_last_token: ", name, " is on ",
              matrix.device(), ", last on ", last.device());
}

void check_range(const int64_t* last, int64_t n, int64_t t) {
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(last[i] >= 0 && last[i] < t, "gather_last_token: last[", i, "] = ", last[i],
                      " with t = ", t);
  }
}

template <typename T, typename Acc>
void add_rows(const T* grad, const int64_t* last, T* out, int64_t n, int64_t h) {
  // Groups of equal rows, each in the order of n: groups run in parallel, a group's sum has one
  // order.
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [last](int64_t a, int64_t b) { return last[a] < last[b]; });
  std::vector<int64_t> first;
  for (int64_t i = 0; i < n; ++i) {
    if (i == 0 || last[order[i]] != last[order[i - 1]]) {
      first.push_back(i);
    }
  }
  const int64_t groups = static_cast<int64_t>(first.size());
  first.push_back(n);
  at::parallel_for(0, groups, std::max<int64_t>(1, 32768 / std::max<int64_t>(h, 1)),
                   [&](int64_t begin, int64_t end) {
                     std::vector<Acc> sum;
                     for (int64_t group = begin; group < end; ++group) {
                       T* row = out + last[order[first[group]]] * h;
                       if (first[group + 1] - first[group] == 1) {
                         std::memcpy(row, grad + order[first[group]] * h, h * sizeof(T));
                         continue;
                       }
                       sum.assign(h, Acc(0));
                       for (int64_t i = first[group]; i < first[group + 1]; ++i) {
                         const T* source = grad + order[i] * h;
                         for (int64_t j = 0; j < h; ++j) {
                           sum[j] += static_cast<Acc>(source[j]);
                         }
                       }
                       for (int64_t j = 0; j < h; ++j) {
                         row[j] = static_cast<T>(sum[j]);
                       }
                     }
                   });
}

}  // namespace

at::Tensor gather_last_token(const at::Tensor& hidden, const at::Tensor& last) {
  check_rows(hidden, "hidden", last);
  const at::Tensor source = hidden.contiguous(), rows = last.contiguous();
  const int64_t t = hidden.size(0), h = hidden.size(1), n = last.size(0);
  const int64_t row_bytes = h * static_cast<int64_t>(hidden.element_size());
  at::Tensor out = at::empty({n, h}, hidden.options());
  if (hidden.is_cuda()) {
    if (out.numel() > 0) {
      RMEGA_CUDA_CALL(hidden,
                      launch_gather_rows(source.const_data_ptr(), rows.const_data_ptr<int64_t>(),
                                         out.mutable_data_ptr(), t, n, row_bytes, stream));
    }
    return out;
  }
  const int64_t* index = rows.const_data_ptr<int64_t>();
  check_range(index, n, t);
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, n, std::max<int64_t>(1, 131072 / std::max<int64_t>(row_bytes, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       std::memcpy(to + i * row_bytes, from + index[i] * row_bytes, row_bytes);
                     }
                   });
  return out;
}

at::Tensor gather_last_token_backward(const at::Tensor& grad, const at::Tensor& last, int64_t t) {
  check_rows(grad, "grad", last);
  TORCH_CHECK(grad.size(0) == last.size(0), "gather_last_token: grad ", grad.sizes(), " for last ",
              last.sizes());
  const at::Tensor source = grad.contiguous(), rows = last.contiguous();
  const int64_t h = grad.size(1), n = last.size(0);
  if (grad.is_cuda()) {
    at::Tensor out = at::empty({t, h}, grad.options());
    if (out.numel() > 0) {
      RMEGA_CUDA_CALL(grad, launch_gather_rows_backward(
                                source.const_data_ptr(), rows.const_data_ptr<int64_t>(),
                                out.mutable_data_ptr(), t, n, h, dtype_of(grad), stream));
    }
    return out;
  }
  const int64_t* index = rows.const_data_ptr<int64_t>();
  check_range(index, n, t);
  at::Tensor out = at::empty({t, h}, grad.options());
  // Not at::zeros: memset writes whole lines without reading them first.
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, t * h * static_cast<int64_t>(out.element_size()), 262144,
                   [to](int64_t begin, int64_t end) { std::memset(to + begin, 0, end - begin); });
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "gather_last_token_backward", [&] {
        add_rows<scalar_t, at::opmath_type<scalar_t>>(source.const_data_ptr<scalar_t>(), index,
                                                      out.mutable_data_ptr<scalar_t>(), n, h);
      });
  return out;
}

}  // namespace rmega
