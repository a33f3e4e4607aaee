// rms_norm, swiglu and rope: checks; on the CPU threads and the choice of the instruction set.
// Kernels: cpu/elementwise_kernels.h, cuda/elementwise.cu.
#include <algorithm>
#include <type_traits>

#include "cpu/elementwise.h"
#include "rmega_ops.h"

namespace rmega {
namespace {

std::string& forced() {
  static std::string name;
  return name;
}

void check_input(const at::Tensor& x, const char* op) {
  const bool narrow = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(narrow || (x.is_cuda() && x.scalar_type() == at::kHalf), op,
              ": the native kernel takes float32, bfloat16 and (on a GPU) float16, got ",
              x.scalar_type(), " on ", x.device());
}

// Rows for one thread at least, so that starting it pays.
int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(row_elements, 1));
}

template <typename T>
const T* in(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* out(at::Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// f(norm kernels, glu kernels of the dtype of x, T*(nullptr))
template <typename F>
void with_dtype(const at::Tensor& x, F f) {
  const ElementwiseKernels& table = elementwise_kernels();
  if (x.scalar_type() == at::kFloat) {
    f(table.norm_f32, table.glu_f32, static_cast<float*>(nullptr));
  } else {
    f(table.norm_bf16, table.glu_bf16, static_cast<bf16*>(nullptr));
  }
}

void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  check_input(x, "rms_norm");
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1) &&
                  weight.scalar_type() == x.scalar_type(),
              "rms_norm: weight ", weight.scalar_type(), " ", weight.sizes(), " for x ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(weight.device() == x.device(), "rms_norm: x is on ", x.device(), ", weight on ",
              weight.device());
  TORCH_CHECK(x.is_cpu() || x.size(-1) <= kMostNormWidth, "rms_norm: rows of ", x.size(-1),
              " elements, at most ", kMostNormWidth, " on a GPU");
}

void check_same(const at::Tensor& given, const at::Tensor& x, const char* what) {
  TORCH_CHECK(given.sizes() == x.sizes() && given.scalar_type() == x.scalar_type() &&
                  given.device() == x.device(),
              what, " ", given.scalar_type(), " ", given.sizes(), " on ", given.device(), " for x ",
              x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

// All contiguous. With dtotal, dx is the sum of both gradients.
std::tuple<at::Tensor, at::Tensor> norm_backward_on_gpu(const at::Tensor& dy,
                                                        const std::optional<at::Tensor>& dtotal,
                                                        const at::Tensor& x,
                                                        const at::Tensor& weight,
                                                        const at::Tensor& inv) {
  const int64_t h = x.size(-1), rows = inv.size(0);
  // Of blocks as many as fill a large GPU; not as many as this one holds, so that every GPU sums in
  // one order.
  const int64_t parts = std::min<int64_t>(rows, 1024);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor partial = at::empty({parts, h}, x.options().dtype(at::kFloat));
  if (x.numel() > 0) {
    RMEGA_CUDA_CALL(
        x, launch_rms_norm_backward(
               dy.const_data_ptr(), dtotal ? dtotal->const_data_ptr() : nullptr, x.const_data_ptr(),
               weight.const_data_ptr(), inv.const_data_ptr(), dx.mutable_data_ptr(),
               partial.mutable_data_ptr(), rows, h, parts, dtype_of(x), stream));
  }
  return {dx, partial.sum(0).to(weight.scalar_type())};
}

}  // namespace

const ElementwiseKernels& elementwise_kernels() {
  const std::string isa = elementwise_isa();
#if defined(__x86_64__)
  if (isa == "avx512") {
    return kElementwiseAvx512;
  }
  if (isa == "avx2") {
    return kElementwiseAvx2;
  }
#endif
  return kElementwisePortable;
}

std::string elementwise_isa() {
  static const std::string best = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return "avx512";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return "avx2";
    }
#endif
    return "portable";
  }();
  return forced().empty() ? best : forced();
}

void set_elementwise_isa(const std::string& name) {
  forced().clear();
  const std::string best = elementwise_isa();
  TORCH_CHECK(
      name.empty() || name == "portable" || name == best || (name == "avx2" && best == "avx512"),
      "this CPU has ", best, ", not '", name, "'");
  forced() = name;
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight,
                                            double eps) {
  check_norm(x, weight);
  const at::Tensor source = x.contiguous(), scale = weight.contiguous();
  const int64_t h = x.size(-1), rows = h == 0 ? 0 : x.numel() / h;
  at::Tensor y = at::empty(x.sizes(), x.options()),
             inv = at::empty({rows}, x.options().dtype(at::kFloat));
  if (x.is_cuda()) {
    if (x.numel() > 0) {
      RMEGA_CUDA_CALL(x, launch_rms_norm(source.const_data_ptr(), nullptr, scale.const_data_ptr(),
                                         nullptr, y.mutable_data_ptr(), inv.mutable_data_ptr(),
                                         rows, h, eps, dtype_of(x), stream));
    }
    return {y, inv};
  }
  with_dtype(x, [&](const auto& norm, const auto&, auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T *px = in<T>(source), *pw = in<T>(scale);
    T* py = out<T>(y);
    float* pi = out<float>(inv);
    at::parallel_for(0, rows, grain(h), [&](int64_t begin, int64_t end) {
      norm.forward(px + begin * h, pw, py + begin * h, pi + begin, end - begin, h,
                   static_cast<float>(eps));
    });
  });
  return {y, inv};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight,
                                                     const at::Tensor& inv) {
  check_norm(x, weight);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "rms_norm: grad ",
              grad.scalar_type(), " ", grad.sizes(), " for x ", x.scalar_type(), " ", x.sizes());
  const at::Tensor dy = grad.contiguous(), source = x.contiguous(), scale = weight.contiguous();
  const int64_t h = x.size(-1), rows = inv.size(0);
  if (x.is_cuda()) {
    return norm_backward_on_gpu(dy, std::nullopt, source, scale, inv);
  }
  at::Tensor dx = at::empty(x.sizes(), x.options());
  // The rows of one partial sum depend on the shape alone, never on the number of threads.
  const int64_t part = std::max<int64_t>(64, (rows + 31) / 32), parts = (rows + part - 1) / part;
  at::Tensor partial = at::zeros({parts, h}, x.options().dtype(at::kFloat));
  with_dtype(x, [&](const auto& norm, const auto&, auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T *pdy = in<T>(dy), *px = in<T>(source), *pw = in<T>(scale);
    const float* pi = in<float>(inv);
    T* pdx = out<T>(dx);
    float* pdw = out<float>(partial);
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i * part, end = std::min(begin + part, rows);
        norm.backward(pdy + begin * h, px + begin * h, pw, pi + begin, pdx + begin * h, pdw + i * h,
                      end - begin, h);
      }
    });
  });
  return {dx, partial.sum(0).to(weight.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x,
                                                            const at::Tensor& residual,
                                                            const at::Tensor& weight, double eps) {
  check_norm(x, weight);
  check_same(residual, x, "add_rms_norm: residual");
  if (!x.is_cuda()) {
    at::Tensor total = residual.add(x);
    auto [y, inv] = rms_norm(total, weight, eps);
    return {total, y, inv};
  }
  const at::Tensor source = x.contiguous(), other = residual.contiguous(),
                   scale = weight.contiguous();
  const int64_t h = x.size(-1), rows = h == 0 ? 0 : x.numel() / h;
  at::Tensor total = at::empty(x.sizes(), x.options()), y = at::empty(x.sizes(), x.options());
  at::Tensor inv = at::empty({rows}, x.options().dtype(at::kFloat));
  if (x.numel() > 0) {
    RMEGA_CUDA_CALL(
        x, launch_rms_norm(source.const_data_ptr(), other.const_data_ptr(), scale.const_data_ptr(),
                           total.mutable_data_ptr(), y.mutable_data_ptr(), inv.mutable_data_ptr(),
                           rows, h, eps, dtype_of(x), stream));
  }
  return {total, y, inv};
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm_backward(const at::Tensor& grad_total,
                                                         const at::Tensor& grad,
                                                         const at::Tensor& total,
                                                         const at::Tensor& weight,
                                                         const at::Tensor& inv) {
  check_norm(total, weight);
  check_same(grad_total, total, "add_rms_norm: gradient of the sum");
  check_same(grad, total, "add_rms_norm: gradient");
  if (!total.is_cuda()) {
    auto [dx, dweight] = rms_norm_backward(grad, total, weight, inv);
    return {dx.add_(grad_total), dweight};
  }
  return norm_backward_on_gpu(grad.contiguous(), grad_total.contiguous(), total.contiguous(),
                              weight.contiguous(), inv);
}

at::Tensor swiglu(const at::Tensor& x) {
  check_input(x, "swiglu");
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, "swiglu: x must be [..., 2f], got ", x.sizes());
  const at::Tensor source = x.contiguous();
  const int64_t f = x.size(-1) / 2, rows = f == 0 ? 0 : x.numel() / (2 * f);
  auto sizes = x.sizes().vec();
  sizes.back() = f;
  at::Tensor y = at::empty(sizes, x.options());
  if (x.is_cuda()) {
    if (x.numel() > 0) {
      RMEGA_CUDA_CALL(x, launch_swiglu(source.const_data_ptr(), y.mutable_data_ptr(), rows, f,
                                       dtype_of(x), stream));
    }
    return y;
  }
  with_dtype(x, [&](const auto&, const auto& glu, auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* px = in<T>(source);
    T* py = out<T>(y);
    at::parallel_for(0, rows, grain(2 * f), [&](int64_t begin, int64_t end) {
      glu.forward(px + begin * 2 * f, py + begin * f, end - begin, f);
    });
  });
  return y;
}

at::Tensor swiglu_backward(const at::Tensor& grad, const at::Tensor& x) {
  check_input(x, "swiglu");
  TORCH_CHECK(grad.dim() == x.dim() && grad.numel() * 2 == x.numel() &&
                  grad.scalar_type() == x.scalar_type(),
              "swiglu: grad ", grad.scalar_type(), " ", grad.sizes(), " for x ", x.scalar_type(),
              " ", x.sizes());
  const at::Tensor dy = grad.contiguous(), source = x.contiguous();
  const int64_t f = x.size(-1) / 2, rows = f == 0 ? 0 : x.numel() / (2 * f);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  if (x.is_cuda()) {
    if (x.numel() > 0) {
      RMEGA_CUDA_CALL(x,
                      launch_swiglu_backward(dy.const_data_ptr(), source.const_data_ptr(),
                                             dx.mutable_data_ptr(), rows, f, dtype_of(x), stream));
    }
    return dx;
  }
  with_dtype(x, [&](const auto&, const auto& glu, auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T *pdy = in<T>(dy), *px = in<T>(source);
    T* pdx = out<T>(dx);
    at::parallel_for(0, rows, grain(4 * f), [&](int64_t begin, int64_t end) {
      glu.backward(pdy + begin * f, px + begin * 2 * f, pdx + begin * 2 * f, end - begin, f);
    });
  });
  return dx;
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool backwards) {
  check_input(x, "rope");
  TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "rope: x must be [t, a, d] with d even, got ",
              x.sizes());
  const int64_t t = x.size(0), a = x.size(1), d = x.size(2);
  for (const at::Tensor* table : {&cos, &sin}) {
    TORCH_CHECK(table->dim() == 2 && table->size(0) == t && table->size(1) == d / 2 &&
                    table->scalar_type() == cos.scalar_type() &&
                    (cos.scalar_type() == at::kFloat || cos.scalar_type() == x.scalar_type()),
                "rope: cos and sin must be [t, d/2] in float32 or x's dtype, got ",
                table->scalar_type(), " ", table->sizes(), " for x ", x.scalar_type(), " ",
                x.sizes());
    TORCH_CHECK(table->device() == x.device(), "rope: x is on ", x.device(), ", a table on ",
                table->device());
  }
  const at::Tensor source =
      x.stride(2) == 1 ? x : x.contiguous();  // queries and keys are views of one projection
  const at::Tensor c = cos.contiguous(), s = sin.contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options());
  const int64_t row = source.stride(0), head = source.stride(1);
  if (x.is_cuda()) {
    if (x.numel() > 0) {
      RMEGA_CUDA_CALL(x,
                      launch_rope(source.const_data_ptr(), c.const_data_ptr(), s.const_data_ptr(),
                                  y.mutable_data_ptr(), t, a, d, row, head, backwards, dtype_of(x),
                                  cos.scalar_type() == at::kFloat, stream));
    }
    return y;
  }
  const float sign = backwards ? -1.0f : 1.0f;
  const auto run = [&](const auto& table, auto* element, auto* angle) {
    using T = std::remove_pointer_t<decltype(element)>;
    using C = std::remove_pointer_t<decltype(angle)>;
    const T* px = in<T>(source);
    const C *pc = in<C>(c), *ps = in<C>(s);
    T* py = out<T>(y);
    at::parallel_for(0, t, grain(a * d), [&](int64_t begin, int64_t end) {
      table.rotate(px + begin * row, pc + begin * (d / 2), ps + begin * (d / 2), py + begin * a * d,
                   end - begin, a, d, row, head, sign);
    });
  };
  if (x.scalar_type() == at::kFloat) {
    run(elementwise_kernels().rope_f32, static_cast<float*>(nullptr), static_cast<float*>(nullptr));
  } else if (cos.scalar_type() == at::kFloat) {
    run(elementwise_kernels().rope_bf16_f32, static_cast<bf16*>(nullptr),
        static_cast<float*>(nullptr));
  } else {
    run(elementwise_kernels().rope_bf16, static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr));
  }
  return y;
}

}  // namespace rmega
