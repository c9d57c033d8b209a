// Convolutions of floats and pooling. Arguments are checked by bitbell.kernels.native_images, which is the only caller.
#include "images_binding.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include "bindings.hpp"
#include "convolution_binding.hpp"
#include "images.hpp"
#include "levels.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace bitbell;

namespace {

using PoolingNumbers = std::array<int64_t, 6>;  // kernel, stride and padding, each of height and width

Pooling pooling_from(const PoolingNumbers& n) {
  for (int i = 0; i < 4; i++) require_entry(n[i] >= 1, "kernel or stride", n[i], "1 or more");
  for (int i = 0; i < 2; i++) require_entry(n[i] <= kMostRows, "kernel", n[i], "64 or less");
  for (int i = 0; i < 2; i++) require_entry(n[4 + i] >= 0 && 2 * n[4 + i] <= n[i], "padding", n[4 + i], "0 to half of the kernel");
  return {n[0], n[1], n[2], n[3], n[4], n[5]};
}

const Window& checked(const Window& window) {
  require_entry(window.kernel_h <= kMostRows, "kernel", window.kernel_h, "64 or less");
  return window;
}

// Filters are read on construction only.
class NativeFloatConvolution {
 public:
  NativeFloatConvolution(nb::dict window, Address weight, Address bias) : layer_(checked(window_from(window)), at<float>(weight), at<float>(bias)) {}

  void forward(const std::string& level, Address x, bool channels_last, int64_t images, int64_t height, int64_t width,
               const PoolingNumbers& pooling, bool clip, Address y, int threads) const {
    const Kernels& kernels = kernels_of(level);
    const Pooling pool = pooling_from(pooling);
    nb::gil_scoped_release release;
    layer_.run(kernels, {at<float>(x), images, height, width, channels_last}, pool, clip, at<float>(y), threads);
  }

 private:
  FloatConvolution layer_;
};

}  // namespace

void bind_images(nb::module_& m) {
  m.def("max_pool", [](const std::string& level, Address x, int64_t images, int64_t height, int64_t width, int64_t channels,
                       const PoolingNumbers& pooling, Address y, int threads) {
    const Kernels& kernels = kernels_of(level);
    const Pooling pool = pooling_from(pooling);
    nb::gil_scoped_release release;
    max_pool(kernels, at<float>(x), images, height, width, channels, pool, at<float>(y), threads);
  });
  m.def("pixel_means", [](const std::string& level, Address x, int64_t images, int64_t pixels, int64_t channels, Address y) {
    const ImageKernels& kernels = *kernels_of(level).images;
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < images; i++) kernels.means(at<float>(x) + i * pixels * channels, pixels, channels, at<float>(y) + i * channels);
  });
  // x (m, k) -> y (m, rows); matrix (rows, k).
  m.def("float_linear", [](const std::string& level, Address matrix, Address bias, int64_t rows, int64_t k, Address x, int64_t m, Address y,
                           int threads) {
    const ImageKernels& kernels = *kernels_of(level).images;
    nb::gil_scoped_release release;
    parallel_for(threads, rows, 64, [&](int64_t begin, int64_t end, int) {
      kernels.matrix_rows(at<float>(matrix), at<float>(bias), rows, k, begin, end - begin, at<float>(x), m, at<float>(y));
    });
  });
  nb::class_<NativeFloatConvolution>(m, "FloatConvolution")
      .def(nb::init<nb::dict, Address, Address>())
      .def("forward", &NativeFloatConvolution::forward);
}
