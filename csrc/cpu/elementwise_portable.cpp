// The fused elementwise kernels for any CPU that the compiler's baseline covers (SSE2, NEON).
#include "elementwise.h"

#define RMEGA_LANES 4

namespace rmega {
namespace {
#include "elementwise_kernels.h"
}  // namespace

const ElementwiseKernels kElementwisePortable = RMEGA_ELEMENTWISE_TABLE;

}  // namespace rmega
