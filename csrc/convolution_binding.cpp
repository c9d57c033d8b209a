// Convolutions of packed codes. Arguments are checked by bitbell.kernels.native, which is the only caller.
#include "convolution_binding.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "convolution.hpp"
#include "levels.hpp"

namespace nb = nanobind;
using namespace bitbell;

Window window_from(nb::dict from) {
  Window w;
  w.channels = entry<int64_t>(from, "channels");
  w.outputs = entry<int64_t>(from, "outputs");
  w.groups = entry<int64_t>(from, "groups");
  const auto pair = [&](const char* key, int64_t& first, int64_t& second) {
    const auto both = entry<std::vector<int64_t>>(from, key);
    if (both.size() != 2) throw std::invalid_argument(std::string(key) + " must have two numbers");
    first = both[0], second = both[1];
  };
  pair("kernel", w.kernel_h, w.kernel_w);
  pair("stride", w.stride_h, w.stride_w);
  pair("dilation", w.dilation_h, w.dilation_w);
  const auto padding = entry<std::vector<int64_t>>(from, "padding");
  if (padding.size() != 4) throw std::invalid_argument("padding must have four numbers");
  w.left = padding[0], w.right = padding[1], w.top = padding[2], w.bottom = padding[3];
  for (const int64_t number : padding) require_entry(number >= 0, "padding", number, "0 or more");
  for (const int64_t number : {w.kernel_h, w.kernel_w, w.stride_h, w.stride_w, w.dilation_h, w.dilation_w})
    require_entry(number >= 1, "kernel, stride or dilation", number, "1 or more");
  require_entry(w.groups >= 1 && w.channels % w.groups == 0 && w.outputs % w.groups == 0, "groups", w.groups, "a divisor of both channels");
  return w;
}

namespace {

// A layer that keeps its descriptions. words: (outputs, packed words) uint32, read on construction only.
class NativeConvolution {
 public:
  NativeConvolution(nb::dict window, nb::dict plan, nb::list groups, nb::list lookups, Address tap_sums) {
    layer_.window = window_from(window);
    layer_.plan = plan_from(plan);
    for (nb::handle group : groups) layer_.groups.push_back(weights_from(nb::cast<nb::dict>(group)));
    for (nb::handle address : lookups) layer_.lookups.push_back(at<uint8_t>(nb::cast<Address>(address)));
    layer_.tap_sums = at<int32_t>(tap_sums);
    const size_t count = static_cast<size_t>(layer_.window.groups);
    if (layer_.groups.size() != count || (!layer_.lookups.empty() && layer_.lookups.size() != count))
      throw std::invalid_argument("there must be weights, or weights and look-ups, of each group");
  }

  // x (images, height, width, channels) float32 -> y; residual: of the shape of y, or 0. again: see ConvolutionCall.
  void forward(const std::string& level, Address x, int64_t images, int64_t height, int64_t width, bool again, Address residual, bool clip,
               Address y, int threads) const {
    const Kernels& kernels = kernels_of(level);
    nb::gil_scoped_release release;
    convolution(kernels, layer_, {at<float>(x), images, height, width, again, at<float>(residual), clip, at<float>(y), threads});
  }

  const Convolution& layer() const { return layer_; }

 private:
  Convolution layer_;
};

// Convolutions after each other, which it keeps alive. steps: of each, (layer, source, residual, clip, again, slot).
class NativeChain {
 public:
  explicit NativeChain(nb::list steps) : kept_(steps) {
    for (nb::handle handle : steps) {
      const auto step = nb::cast<nb::tuple>(handle);
      require_entry(nb::len(step) == 6, "numbers of a step", static_cast<int64_t>(nb::len(step)), "6");
      const auto number = [&](size_t i) { return nb::cast<int64_t>(step[i]); };
      const int64_t made = static_cast<int64_t>(steps_.size());
      require_entry(number(1) >= 0 && number(1) <= made, "source", number(1), "images that are there");
      require_entry(number(2) >= -1 && number(2) <= made, "residual", number(2), "images that are there, or -1");
      require_entry(number(5) >= 0 && number(5) <= made, "slot", number(5), "0 or more, and no more than steps");
      steps_.push_back({&nb::cast<const NativeConvolution&>(step[0]).layer(), number(1), number(2), nb::cast<bool>(step[3]),
                        nb::cast<bool>(step[4]), number(5)});
    }
  }

  void forward(const std::string& level, Address x, int64_t images, int64_t height, int64_t width, Address y, int threads) const {
    const Kernels& kernels = kernels_of(level);
    nb::gil_scoped_release release;
    convolutions(kernels, steps_, at<float>(x), images, height, width, at<float>(y), threads);
  }

 private:
  nb::list kept_;
  std::vector<ChainStep> steps_;
};

}  // namespace

void bind_convolution(nb::module_& m) {
  m.def("has_lookups", [](const std::string& level) { return kernels_of(level).lookups != nullptr; });
  m.def("triples_bytes", [](nb::dict window) { return triples_bytes(window_from(window)); });
  m.def("arrange_triples", [](nb::dict window, Address words, int bits, Address out) {
    const Window w = window_from(window);
    nb::gil_scoped_release release;
    arrange_triples(w, at<uint32_t>(words), bits, at<uint8_t>(out));
  });
  m.def("sum_taps", [](nb::dict window, Address words, int bits, Address out) {
    const Window w = window_from(window);
    nb::gil_scoped_release release;
    sum_taps(w, at<uint32_t>(words), w.outputs, bits, at<int32_t>(out), w.outputs);
  });
  nb::class_<NativeConvolution>(m, "Convolution")
      .def(nb::init<nb::dict, nb::dict, nb::list, nb::list, Address>())
      .def("forward", &NativeConvolution::forward);
  nb::class_<NativeChain>(m, "ConvolutionChain").def(nb::init<nb::list>()).def("forward", &NativeChain::forward);
}
