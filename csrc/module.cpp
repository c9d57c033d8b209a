// The Python module bitbell.kernels._native: addresses in, nothing allocated, no Python held while computing. Arguments
// are checked by bitbell.kernels.native, which is the only caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <stdexcept>
#include <tuple>

#include "bindings.hpp"
#include "convolution_binding.hpp"
#include "images_binding.hpp"
#include "levels.hpp"
#include "linear.hpp"
#include "llama_binding.hpp"
#include "pool.hpp"
#include "training_binding.hpp"

namespace nb = nanobind;
using namespace bitbell;

namespace {

Codes codes_at(Address codes, int64_t stride, Address step, Address sum, int64_t rows) {
  return {at<int8_t>(codes), stride, at<float>(step), at<int32_t>(sum), rows};
}

// A layer that keeps its descriptions, so that a call passes a handful of numbers.
class Layer {
 public:
  Layer(nb::dict weights, nb::object plan) : w_(weights_from(weights)), has_plan_(!plan.is_none()) {
    if (has_plan_) plan_ = plan_from(nb::cast<nb::dict>(plan));
  }

  // x (rows, k) float32, contiguous -> y (rows, outputs) float32.
  void forward(const std::string& level, Address x, int64_t rows, Address y, int threads) const {
    const Kernels& kernels = kernels_of(level);
    nb::gil_scoped_release release;
    if (has_plan_) quantized_linear(kernels, w_, plan_, at<float>(x), rows, at<float>(y), threads);
    else linear_floats(kernels, w_, at<float>(x), w_.k, rows, at<float>(y), w_.rows, threads);
  }

 private:
  Weights w_;
  InputPlan plan_;
  bool has_plan_;
};

// Bytes a second that `threads` threads read from a buffer of `bytes`, the best of `passes`.
double stream_rate(int64_t bytes, int passes, int threads) {
  nb::gil_scoped_release release;
  const Kernels& kernels = *kernels_named("auto");
  const int64_t blocks = bytes / 4096;
  std::vector<float> buffer(static_cast<size_t>(blocks * 1024), 1.0f);
  std::vector<float> sums(static_cast<size_t>(kMaxThreads) * 16);
  double best = 0;
  for (int pass = 0; pass < passes; pass++) {
    const auto begun = std::chrono::steady_clock::now();
    parallel_for(threads, blocks, 1, [&](int64_t begin, int64_t end, int thread) {
      sums[static_cast<size_t>(thread * 16)] = kernels.sum(buffer.data() + begin * 1024, (end - begin) * 1024);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
    best = std::max(best, static_cast<double>(blocks * 4096) / took.count());
  }
  volatile float keep = sums[0];
  (void)keep;
  return best;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("levels", [] {
    std::vector<std::tuple<std::string, bool, std::string>> found;
    for (const Level& level : levels()) found.emplace_back(level.name, level.usable, level.why);
    return found;
  });
  m.def("best_level", [] { return std::string(kernels_named("auto")->name); });
  m.def("arranged_bytes", &arranged_bytes);
  m.def("padded_k", &padded_k);
  m.def("arrange", [](Address words, int64_t rows, int64_t k, int bits, Address out, Address sums, int threads) {
    nb::gil_scoped_release release;
    arrange(at<uint32_t>(words), rows, k, bits, at<uint8_t>(out), at<int32_t>(sums), threads);
  });
  m.def("quantize", [](const std::string& level, nb::dict plan, Address x, int64_t rows, int64_t k, Address codes, int64_t stride, Address step,
                       Address sum, int threads) {
    const Kernels& kernels = kernels_of(level);
    const InputPlan p = plan_from(plan);
    nb::gil_scoped_release release;
    quantize_rows(kernels, p, at<float>(x), k, rows, k, codes_at(codes, stride, step, sum, rows), threads);
  });
  m.def("product", [](const std::string& level, Address arranged, int bits, int64_t outputs, int64_t k, Address codes, int64_t stride, int x_bits,
                      int64_t rows, Address acc, int threads) {
    const Kernels& kernels = kernels_of(level);
    Weights w;
    w.data = at<uint8_t>(arranged), w.bits = bits, w.rows = outputs, w.k = k;
    nb::gil_scoped_release release;
    integer_product(kernels, w, codes_at(codes, stride, 0, 0, rows), x_bits, at<int32_t>(acc), threads);
  });
  m.def("rotate", [](const std::string& level, Address x, Address y, int64_t n, int64_t block) {
    const Kernels& kernels = kernels_of(level);
    nb::gil_scoped_release release;
    kernels.rotate(at<float>(x), at<float>(y), n, block);
  });
  m.def("stream_rate", &stream_rate);
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<nb::dict, nb::object>(), nb::arg("weights"), nb::arg("plan").none())
      .def("forward", &Layer::forward);
  bind_convolution(m);
  bind_images(m);
  bind_llama(m);
  bind_training(m);
}
