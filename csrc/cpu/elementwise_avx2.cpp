// The fused elementwise kernels for x86 with AVX2; elementwise.cpp asks the CPU before it calls
// them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "elementwise.h"

#define RMEGA_LANES 8

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace rmega {
namespace {
#include "elementwise_kernels.h"
}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const ElementwiseKernels kElementwiseAvx2 = RMEGA_ELEMENTWISE_TABLE;

}  // namespace rmega
#endif
