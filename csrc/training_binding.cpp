// What bitbell.kernels.training calls. Arguments are checked there.
#include "training_binding.hpp"

#include <nanobind/stl/string.h>

#include <stdexcept>

#include "bindings.hpp"
#include "levels.hpp"
#include "training.hpp"

namespace nb = nanobind;
using namespace bitbell;

namespace {

void quantize(const std::string& level, nb::dict plan, Address x, int type, int64_t rows, int64_t k, bool by_row, bool given, Address size,
              Address codes, int bits, Address kept, int kept_type, int threads) {
  const Kernels& kernels = kernels_of(level);
  const InputPlan p = plan_from(plan);
  nb::gil_scoped_release release;
  quantize_tensor(kernels, p, {at<void>(x), type, rows, k}, by_row, given, at<float>(size), at<int8_t>(codes), bits, at<void>(kept), kept_type,
                  threads);
}

void gradient(const std::string& level, nb::dict from, int64_t rows, int64_t k, int threads) {
  const Kernels& kernels = kernels_of(level);
  BellTensor t;
  t.g = {address<void>(from, "g"), entry<int>(from, "g_type"), rows, k};
  t.h = {address<void>(from, "h"), entry<int>(from, "h_type"), rows, k};
  t.h_rotation = entry<int64_t>(from, "h_rotation");
  t.rotation = entry<int64_t>(from, "rotation");
  t.codes = address<int8_t>(from, "codes");
  t.inverse_size = address<float>(from, "inverse_size");
  t.factor = address<float>(from, "factor");
  t.size_by_row = entry<bool>(from, "size_by_row");
  t.factor_by_row = entry<bool>(from, "factor_by_row");
  t.radial = entry<bool>(from, "radial");
  t.by_row = entry<bool>(from, "by_row");
  t.zero_point = entry<float>(from, "zero_point");
  t.bins = address<float>(from, "bins");
  t.out = at<void>(entry<Address>(from, "out"));
  t.out_type = entry<int>(from, "out_type");
  t.levels = at<float>(entry<Address>(from, "levels"));
  nb::gil_scoped_release release;
  bell_gradient(kernels, t, threads);
}

void finish(const std::string& level, nb::dict from, Address acc, Address x, int64_t rows, Address x_step, bool step_by_row, Address y,
            int threads) {
  const Kernels& kernels = kernels_of(level);
  ProductRow row;
  row.outputs = entry<int64_t>(from, "outputs");
  row.k = entry<int64_t>(from, "k");
  row.x_zero = entry<double>(from, "x_zero");
  row.w_zero = entry<double>(from, "w_zero");
  row.fits_quarters = entry<bool>(from, "fits_quarters");
  row.w_sums = address<int32_t>(from, "w_sums");
  row.w_step = address<float>(from, "w_step");
  row.type = entry<int>(from, "type");
  nb::gil_scoped_release release;
  outputs(kernels, row, at<int32_t>(acc), at<int8_t>(x), rows, at<float>(x_step), step_by_row, at<void>(y), threads);
}

void sums(const std::string& level, Address codes, int64_t rows, int64_t k, Address to, int threads) {
  const Kernels& kernels = kernels_of(level);
  nb::gil_scoped_release release;
  sums_of_codes(kernels, at<int8_t>(codes), rows, k, at<int32_t>(to), threads);
}

}  // namespace

void bind_training(nb::module_& m) {
  m.def("training_quantize", &quantize);
  m.def("training_gradient", &gradient);
  m.def("training_sums", &sums);
  m.def("training_outputs", &finish);
}
