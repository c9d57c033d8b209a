// Convolutions of floats, their ReLU and pooling in one pass over the image, for images of few channels; and pooling by itself.
#pragma once
#include <memory>
#include <new>

#include "convolution.hpp"

namespace bitbell {

constexpr int64_t kMostRows = 64;  // of a kernel

// Where the windows of a pooling lie. Half a window at most may lie outside of the image.
struct Pooling {
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;

  int64_t rows(int64_t height) const { return (height + 2 * padding_h - kernel_h) / stride_h + 1; }
  int64_t columns(int64_t width) const { return (width + 2 * padding_w - kernel_w) / stride_w + 1; }
};

// A batch of images: (images, height, width, channels), or (images, channels, height, width).
struct Batch {
  const float* x = nullptr;
  int64_t images = 0, height = 0, width = 0;
  bool channels_last = true;
};

// A convolution of one group, without dilation; its filters arranged for the kernels. Where along a row 3 or 4 taps fall on every
// phase of the stride, rows are convolved by Winograd's algorithm. Images with numbers so large that their rounding would show in
// other outputs of a tile, or with no numbers, take the direct way.
class FloatConvolution {
 public:
  // weight: (outputs, channels, kernel height, kernel width); bias: (outputs), or null.
  FloatConvolution(const Window& window, const float* weight, const float* bias);

  // y: (images, pooled rows, pooled columns, outputs): pooling of the sums, then bias, then with `clip` ReLU - as in any other
  // order, since all of them are monotone.
  void run(const Kernels& kernels, const Batch& batch, const Pooling& pooling, bool clip, float* y, int threads) const;

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  using Floats = std::unique_ptr<float[], Free>;
  // How a row is convolved: directly, tiles are outputs, points 1.
  struct Way {
    bool points = false;
    int64_t run = 0, stride = 0, tiles = 0, row_floats = 0;
  };

  Way way(bool points, int64_t width) const;
  int64_t run_of(int64_t point) const;
  int64_t panel_width(int64_t panel) const;
  Floats arrange(const float* weight, bool points) const;
  bool band(const Kernels& kernels, const Batch& batch, int64_t image, const Way& way, const Pooling& pooling, bool clip, int64_t begin,
            int64_t end, float* y) const;
  bool load_row(const Kernels& kernels, const Batch& batch, int64_t image, int64_t row, const Way& way, float* padded, float* out) const;
  void convolve_row(const Kernels& kernels, const Way& way, const float* const* rows, int64_t first, int64_t count, float* sums, float* y) const;

  Window window_;
  int64_t width_;       // outputs, rounded up to a multiple of 16
  Floats direct_, points_, bias_;
};

// x (images, height, width, channels) -> y (images, pooled rows, pooled columns, channels).
void max_pool(const Kernels& kernels, const float* x, int64_t images, int64_t height, int64_t width, int64_t channels, const Pooling& pooling,
              float* y, int threads);

}  // namespace bitbell
