// gather_prefix_kv: for each of s segments the rows of its prefix, then its own, of x [t, g, d] ->
// [total, g, d]. Backward: a source row's gradient is the sum over the segments that hold it, in
// the order of segments.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/elementwise.h"
#include "rmega_ops.h"

namespace rmega {
namespace {

// int64 [5, s] on the CPU: prefix_start, prefix_len, own_start, own_len, first output row.
at::Tensor read_index(const at::Tensor& prefix_start, const at::Tensor& prefix_len,
                      const at::Tensor& own_start, const at::Tensor& own_len) {
  std::vector<at::Tensor> columns;
  for (const at::Tensor* tensor : {&prefix_start, &prefix_len, &own_start, &own_len}) {
    TORCH_CHECK(tensor->dim() == 1 && tensor->sizes() == prefix_start.sizes() &&
                    (tensor->scalar_type() == at::kInt || tensor->scalar_type() == at::kLong),
                "gather_prefix_kv: starts and lengths must be int32 or int64 [s], got ",
                tensor->scalar_type(), " ", tensor->sizes(), " beside ", prefix_start.sizes());
    columns.push_back(tensor->to(at::kCPU, at::kLong));
  }
  const at::Tensor len = columns[1].add(columns[3]);
  columns.push_back(len.cumsum(0).sub(len));
  return at::stack(columns);
}

struct Index {
  const int64_t *prefix_start, *prefix_len, *own_start, *own_len, *out_start;
  Index(const at::Tensor& index) {
    const int64_t s = index.size(1);
    prefix_start = index.const_data_ptr<int64_t>();
    prefix_len = prefix_start + s;
    own_start = prefix_start + 2 * s;
    own_len = prefix_start + 3 * s;
    out_start = prefix_start + 4 * s;
  }
};

void check_range(const Index& index, int64_t s, int64_t t, int64_t total) {
  for (int64_t i = 0; i < s; ++i) {
    TORCH_CHECK_INDEX(
        index.prefix_start[i] >= 0 && index.prefix_len[i] >= 0 && index.own_start[i] >= 0 &&
            index.own_len[i] >= 0 && index.prefix_start[i] + index.prefix_len[i] <= t &&
            index.own_start[i] + index.own_len[i] <= t,
        "gather_prefix_kv: segment ", i, " has prefix ", index.prefix_start[i], "+",
        index.prefix_len[i], ", own ", index.own_start[i], "+", index.own_len[i], " with t = ", t);
  }
  const int64_t last = s - 1;
  const int64_t sum =
      s == 0 ? 0 : index.out_start[last] + index.prefix_len[last] + index.own_len[last];
  TORCH_CHECK(sum == total, "gather_prefix_kv: total is ", total, ", the lengths sum to ", sum);
}

// The index on x's device, [rows (total) | offsets (t + 1) | sources (total)]. Where the caller has
// none it is made of the columns, which waits for those that are on a GPU.
at::Tensor index_on(const at::Device& device, const std::optional<at::Tensor>& index,
                    const at::Tensor& prefix_start, const at::Tensor& prefix_len,
                    const at::Tensor& own_start, const at::Tensor& own_len, int64_t t,
                    int64_t total) {
  const at::Tensor found =
      index ? *index : prefix_index(prefix_start, prefix_len, own_start, own_len, t).to(device);
  check_prefix_index(found, device, t, total);
  return found;
}

// out [n] = round(sum of sources[.][offset + .]) in the dtypes that have no vector kernel.
template <typename T>
void sum_plain(const T* const* sources, int64_t count, int64_t offset, T* out, int64_t n) {
  using Acc = at::opmath_type<T>;
  for (int64_t j = 0; j < n; ++j) {
    Acc sum(0);
    for (int64_t k = 0; k < count; ++k) {
      sum += static_cast<Acc>(sources[k][offset + j]);
    }
    out[j] = static_cast<T>(sum);
  }
}

// Source rows between two neighboring starts or ends of runs are held by the same segments: there
// the sum of rows is one sum over contiguous memory. sum(sources, count, offset, out, n) adds in
// the order of sources, that of segments.
template <typename T, typename F>
void scatter(const T* grad, const Index& index, T* out, int64_t t, int64_t s, int64_t width,
             F sum) {
  std::vector<int64_t> cuts{0, t};
  for (int64_t i = 0; i < s; ++i) {
    for (const int64_t cut : {index.prefix_start[i], index.prefix_start[i] + index.prefix_len[i],
                              index.own_start[i], index.own_start[i] + index.own_len[i]}) {
      cuts.push_back(cut);
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<std::vector<const T*>> sources(cuts.size() -
                                             1);  // gradient of the first row between two cuts
  const auto add_run = [&](int64_t start, int64_t len, int64_t first_out) {
    size_t i = std::lower_bound(cuts.begin(), cuts.end(), start) - cuts.begin();
    for (; len > 0 && cuts[i] < start + len; ++i) {
      sources[i].push_back(grad + (first_out + cuts[i] - start) * width);
    }
  };
  for (int64_t i = 0; i < s; ++i) {
    add_run(index.prefix_start[i], index.prefix_len[i], index.out_start[i]);
    add_run(index.own_start[i], index.own_len[i], index.out_start[i] + index.prefix_len[i]);
  }
  at::parallel_for(0, t, std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)),
                   [&](int64_t begin, int64_t end) {
                     size_t i =
                         std::upper_bound(cuts.begin(), cuts.end(), begin) - cuts.begin() - 1;
                     for (int64_t row = begin; row < end; ++i) {
                       const int64_t stop = std::min(end, cuts[i + 1]);
                       sum(sources[i].data(), static_cast<int64_t>(sources[i].size()),
                           (row - cuts[i]) * width, out + row * width, (stop - row) * width);
                       row = stop;
                     }
                   });
}

}  // namespace

at::Tensor prefix_index(const at::Tensor& prefix_start, const at::Tensor& prefix_len,
                        const at::Tensor& own_start, const at::Tensor& own_len, int64_t t) {
  const at::Tensor columns = read_index(prefix_start, prefix_len, own_start, own_len);
  const Index index(columns);
  const int64_t s = columns.size(1);
  const int64_t total =
      s == 0 ? 0 : index.out_start[s - 1] + index.prefix_len[s - 1] + index.own_len[s - 1];
  check_range(index, s, t, total);
  TORCH_CHECK(total < INT32_MAX && t < INT32_MAX, "prefix_index: ", total, " rows of ", t);
  at::Tensor out = at::empty({2 * total + t + 1}, at::TensorOptions().dtype(at::kInt));
  int32_t* rows = out.mutable_data_ptr<int32_t>();
  int32_t *offsets = rows + total, *sources = offsets + t + 1;
  int32_t* next = rows;
  for (int64_t i = 0; i < s; ++i) {
    next = std::generate_n(next, index.prefix_len[i],
                           [row = index.prefix_start[i]]() mutable { return int32_t(row++); });
    next = std::generate_n(next, index.own_len[i],
                           [row = index.own_start[i]]() mutable { return int32_t(row++); });
  }
  // Counting sort by source row, which keeps the order of segments.
  std::fill_n(offsets, t + 1, 0);
  for (int64_t i = 0; i < total; ++i) {
    ++offsets[rows[i] + 1];
  }
  for (int64_t i = 0; i < t; ++i) {
    offsets[i + 1] += offsets[i];
  }
  std::vector<int32_t> place(offsets, offsets + t);
  for (int64_t i = 0; i < total; ++i) {
    sources[place[rows[i]]++] = static_cast<int32_t>(i);
  }
  return out;
}

void check_prefix_index(const at::Tensor& index, const at::Device& device, int64_t t,
                        int64_t total) {
  TORCH_CHECK(index.dim() == 1 && index.scalar_type() == at::kInt && index.is_contiguous() &&
                  index.device() == device && index.size(0) == 2 * total + t + 1,
              "the index of a pack must be int32 [2 total + t + 1] on ", device, ", got ",
              index.scalar_type(), " ", index.sizes(), " on ", index.device(), " for t = ", t,
              ", total = ", total);
}

at::Tensor gather_prefix_kv(const at::Tensor& x, const at::Tensor& prefix_start,
                            const at::Tensor& prefix_len, const at::Tensor& own_start,
                            const at::Tensor& own_len, int64_t total,
                            const std::optional<at::Tensor>& index_given) {
  TORCH_CHECK(x.dim() == 3, "gather_prefix_kv: x must be [t, g, d], got ", x.sizes());
  const int64_t t = x.size(0), g = x.size(1), d = x.size(2), s = prefix_start.size(0);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const at::Tensor source =
      x.stride(2) == 1 ? x : x.contiguous();  // values are views into the fused qkv projection
  at::Tensor out = at::empty({total, g, d}, x.options());
  if (x.is_cuda()) {
    const at::Tensor rows =
        index_on(x.device(), index_given, prefix_start, prefix_len, own_start, own_len, t, total);
    if (out.numel() > 0) {
      RMEGA_CUDA_CALL(x,
                      launch_gather_prefix(source.const_data_ptr(), rows.const_data_ptr<int32_t>(),
                                           out.mutable_data_ptr(), t, total, g, d, source.stride(0),
                                           source.stride(1), static_cast<int>(size), stream));
    }
    return out;
  }
  const at::Tensor index_tensor = read_index(prefix_start, prefix_len, own_start, own_len);
  const Index index(index_tensor);
  check_range(index, s, t, total);
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const bool dense_row = g <= 1 || source.stride(1) == d;
  const int64_t row = source.stride(0) * size, group = source.stride(1) * size,
                run = dense_row ? g * d : d;
  const auto copy = [&](int64_t source_row, int64_t out_row, int64_t rows) {
    char* target = to + out_row * g * d * size;
    if (dense_row && row == g * d * size) {
      std::memcpy(target, from + source_row * row, rows * row);
      return;
    }
    for (int64_t i = source_row; i < source_row + rows; ++i) {
      for (int64_t j = 0; j < (dense_row ? 1 : g); ++j, target += run * size) {
        std::memcpy(target, from + i * row + j * group, run * size);
      }
    }
  };
  at::parallel_for(0, total, std::max<int64_t>(1, 131072 / std::max<int64_t>(g * d * size, 1)),
                   [&](int64_t begin, int64_t end) {
                     int64_t i = std::upper_bound(index.out_start, index.out_start + s, begin) -
                                 index.out_start - 1;
                     for (int64_t at = begin; at < end; ++i) {
                       const int64_t own_begin = index.out_start[i] + index.prefix_len[i];
                       const int64_t own_end = own_begin + index.own_len[i];
                       if (const int64_t stop = std::min(own_begin, end); at < stop) {
                         copy(index.prefix_start[i] + at - index.out_start[i], at, stop - at);
                         at = stop;
                       }
                       if (const int64_t stop = std::min(own_end, end); at < stop) {
                         copy(index.own_start[i] + at - own_begin, at, stop - at);
                         at = stop;
                       }
                     }
                   });
  return out;
}

at::Tensor gather_prefix_kv_backward(const at::Tensor& grad, const at::Tensor& prefix_start,
                                     const at::Tensor& prefix_len, const at::Tensor& own_start,
                                     const at::Tensor& own_len, int64_t t,
                                     const std::optional<at::Tensor>& index_given) {
  TORCH_CHECK(grad.dim() == 3, "gather_prefix_kv: grad must be [total, g, d], got ", grad.sizes());
  const at::Tensor source = grad.contiguous();
  const int64_t g = grad.size(1), d = grad.size(2), s = prefix_start.size(0);
  at::Tensor out = at::empty({t, g, d}, grad.options());
  if (grad.is_cuda()) {
    const int64_t total = grad.size(0);
    const at::Tensor made = index_on(grad.device(), index_given, prefix_start, prefix_len,
                                     own_start, own_len, t, total);
    if (out.numel() > 0) {
      const int32_t* offsets = made.const_data_ptr<int32_t>() + total;
      RMEGA_CUDA_CALL(grad, launch_gather_prefix_backward(source.const_data_ptr(), offsets,
                                                          offsets + t + 1, out.mutable_data_ptr(),
                                                          t, total, g * d, dtype_of(grad), stream));
    }
    return out;
  }
  const at::Tensor index_tensor = read_index(prefix_start, prefix_len, own_start, own_len);
  const Index index(index_tensor);
  check_range(index, s, t, grad.size(0));
  if (grad.scalar_type() == at::kFloat) {
    scatter(source.const_data_ptr<float>(), index, out.mutable_data_ptr<float>(), t, s, g * d,
            elementwise_kernels().sum_f32.sum);
  } else if (grad.scalar_type() == at::kBFloat16) {
    scatter(static_cast<const bf16*>(source.const_data_ptr()), index,
            static_cast<bf16*>(out.mutable_data_ptr()), t, s, g * d,
            elementwise_kernels().sum_bf16.sum);
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND(at::kHalf, grad.scalar_type(), "gather_prefix_kv_backward", [&] {
      scatter(source.const_data_ptr<scalar_t>(), index, out.mutable_data_ptr<scalar_t>(), t, s,
              g * d, sum_plain<scalar_t>);
    });
  }
  return out;
}

}  // namespace rmega
