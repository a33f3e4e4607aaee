// CUDA launchers: raw pointers, sizes, a stream. No torch header here, so that nvcc alone compiles
// every .cu. Each returns the CUDA error code of its launch (0 = success). Out-of-range rows trap
// in the kernel.
#pragma once

#include <cstdint>

namespace rmega {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// Loss and penalty names in the order of LOSSES and PENALTIES in rmega/ops/loss.py.
enum class Loss : int { ranking = 0, focal = 1, plackett_luce = 2 };
enum class Penalty : int { none = 0, log_barrier = 1, l2 = 2, center = 3 };

struct LossOptions {
  Loss loss;
  Penalty penalty;
  double penalty_weight;
  double label_smoothing;
  bool barrier_clamp;
};

constexpr int kNumStats = 8;

using Stream = void*;  // cudaStream_t

// out[i, :] = hidden[last[i], :]; row_bytes = h * size of an element.
int launch_gather_rows(const void* hidden, const int64_t* last, void* out, int64_t t, int64_t n,
                       int64_t row_bytes, Stream stream);
// grad_hidden [t, h] = 0, then grad_hidden[last[i]] += grad[i], repeated rows summed in fp32 in the
// order of i.
int launch_gather_rows_backward(const void* grad, const int64_t* last, void* grad_hidden, int64_t t,
                                int64_t n, int64_t h, DType dtype, Stream stream);

// rewards [n] of dtype; margin, weight [m], loss [1], stats [8], grad [n] in fp32 (fp64 where dtype
// is f64).
int launch_pairwise_loss(const void* rewards, const int64_t* chosen, const int64_t* rejected,
                         const void* margin, const void* weight, void* loss, void* stats,
                         void* grad, int64_t n, int64_t m, DType dtype, LossOptions options,
                         Stream stream);

// rows [total]: the source row of each output row. offsets [t + 1], sources [total]: the output
// rows of source row i are sources[offsets[i]], .. sources[offsets[i + 1] - 1], in the order of
// segments (prefix_index in gather_prefix_kv.cpp).
// x has row stride x_stride0 and group stride x_stride1 (elements); out [total, g, d] is
// contiguous.
int launch_gather_prefix(const void* x, const int32_t* rows, void* out, int64_t t, int64_t total,
                         int64_t g, int64_t d, int64_t x_stride0, int64_t x_stride1,
                         int element_size, Stream stream);
// grad [total, width] -> grad_x [t, width], summed in fp32 in the order of segments.
int launch_gather_prefix_backward(const void* grad, const int32_t* offsets, const int32_t* sources,
                                  void* grad_x, int64_t t, int64_t total, int64_t width,
                                  DType dtype, Stream stream);

// The fused projection x [t, (a + 2 g) d] (rows row_stride apart) -> query [t, a, d], key and value
// [total, g, d]; columns [g, r + 2, d] with a = r g, or [2, g, d] where a is 0. Tables [t, d/2].
struct QkvShape {
  int64_t t, total, a, g, d;
};
int launch_qkv_rope(const void* x, const void* cos, const void* sin, const int32_t* rows,
                    void* query, void* key, void* value, const QkvShape& shape, int64_t row_stride,
                    DType dtype, bool float_tables, Stream stream);
int launch_qkv_rope_backward(const void* dquery, const void* dkey, const void* dvalue,
                             const void* cos, const void* sin, const int32_t* offsets,
                             const int32_t* sources, void* dx, const QkvShape& shape, DType dtype,
                             bool float_tables, Stream stream);
// With RMS norms over the channels of each query and key before the rotation; the lanes of a head,
// d/2 over 16 bytes of elements, are a power of two up to 32. Backward: partial [parts, 2, d] in
// fp32 (fp64 where dtype is f64), whose sums are the gradients of both weights [d].
struct HeadNorms {
  const void *q_weight, *k_weight;
  double eps;
};
int launch_qkv_norm_rope(const void* x, const HeadNorms& norms, const void* cos, const void* sin,
                         const int32_t* rows, void* query, void* key, void* value,
                         const QkvShape& shape, int64_t row_stride, DType dtype, bool float_tables,
                         Stream stream);
int launch_qkv_norm_rope_backward(const void* dquery, const void* dkey, const void* dvalue,
                                  const void* x, const HeadNorms& norms, const void* cos,
                                  const void* sin, const int32_t* offsets, const int32_t* sources,
                                  void* dx, void* partial, const QkvShape& shape,
                                  int64_t row_stride, int64_t parts, DType dtype,
                                  bool float_tables, Stream stream);

// As NormKernels, GluKernels and RopeKernels of elementwise.h. x, weight, y, dy, dx of dtype; inv
// [rows] and partial [parts, h] in fp32 (fp64 where dtype is f64), h at most kMostNormWidth. rope:
// strides of x in elements; the tables are fp32 or of dtype; y is contiguous. None may be called
// without elements.
constexpr int kMostNormWidth = 16384;
// Of x, or where there is a residual of total = round(x + residual), which is written too.
int launch_rms_norm(const void* x, const void* residual, const void* weight, void* total, void* y,
                    void* inv, int64_t rows, int64_t h, double eps, DType dtype, Stream stream);
// Of dx = its gradient by x, plus dtotal [rows, h] where that is given.
int launch_rms_norm_backward(const void* dy, const void* dtotal, const void* x, const void* weight,
                             const void* inv, void* dx, void* partial, int64_t rows, int64_t h,
                             int64_t parts, DType dtype, Stream stream);
int launch_swiglu(const void* x, void* y, int64_t rows, int64_t f, DType dtype, Stream stream);
int launch_swiglu_backward(const void* dy, const void* x, void* dx, int64_t rows, int64_t f,
                           DType dtype, Stream stream);
int launch_rope(const void* x, const void* cos, const void* sin, void* y, int64_t t, int64_t a,
                int64_t d, int64_t row_stride, int64_t head_stride, bool backwards, DType dtype,
                bool float_tables, Stream stream);

}  // namespace rmega
