// The module that Python imports. Loading it registers the operators (autograd.cpp,
// packed_attention.cpp, linear.cpp); what it holds itself is only what is no operator.
#include <pybind11/pybind11.h>

#include <string>

namespace rmega {
std::string elementwise_isa();
void set_elementwise_isa(const std::string& name);
bool linear_has_tiles();
}  // namespace rmega

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("interface") =
      5;  // counted up with every change of an operator; rmega/ops/implementation.py knows it
#ifdef RMEGA_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("elementwise_isa", &rmega::elementwise_isa);
  m.def("set_elementwise_isa", &rmega::set_elementwise_isa);
  m.def("linear_has_tiles", &rmega::linear_has_tiles);  // linear.cpp
}
