// Convolutions on packed weights, over all threads. Every pixel is quantized once; windows of codes are then copied a strip at a
// time and multiplied as rows of a linear layer are, or, where the kernels have look-ups, summed where they lie.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.hpp"

namespace bitbell {

struct Window {
  int64_t channels = 0, outputs = 0, groups = 1;  // of all groups
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
  int64_t left = 0, right = 0, top = 0, bottom = 0;  // zeros around the image

  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t k() const { return taps() * group_channels(); }
  int64_t padded_height(int64_t height) const { return height + top + bottom; }
  int64_t padded_width(int64_t width) const { return width + left + right; }
  int64_t rows(int64_t height) const { return (padded_height(height) - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int64_t columns(int64_t width) const { return (padded_width(width) - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
};

struct WindowKinds;

// A convolution's weights and what turns sums into outputs. Pointers are borrowed.
struct Convolution {
  Window window;
  InputPlan plan;
  std::vector<Weights> groups;      // data: null where there are only look-ups; sums: not read
  std::vector<const uint8_t*> lookups;  // of each group, as arrange_triples makes them; empty: none
  const int32_t* tap_sums = nullptr;  // (taps, outputs): sums of unsigned codes

  mutable std::mutex guard;  // of what follows
  mutable std::shared_ptr<const WindowKinds> kinds;
};

// x (images, height, width, channels) -> y (images, rows, columns, outputs). residual: of y's shape, added to it, or null;
// clip: negative outputs become 0.
struct ConvolutionCall {
  const float* x = nullptr;
  int64_t images = 0, height = 0, width = 0;
  bool again = false;  // x is unchanged since this thread's last call, whose plan was equal: it need not be quantized again
  const float* residual = nullptr;
  bool clip = false;
  float* y = nullptr;
  int threads = 1;
};

// Whether products of these codes may be looked up.
constexpr bool can_look_up(int bits, int x_bits) { return bits <= 2 && x_bits <= 2; }
int64_t triples_bytes(const Window& window);  // of a group

// Packed codes (group_outputs, words of k codes) -> what look-ups read.
void arrange_triples(const Window& window, const uint32_t* words, int bits, uint8_t* out);
// (taps, rows) sums of unsigned codes of packed codes (rows, words of k codes); from row to row of the result: `stride`.
void sum_taps(const Window& window, const uint32_t* words, int64_t rows, int bits, int32_t* out, int64_t stride);

// Not by look-up unless the kernels and the layer have them.
void convolution(const Kernels& kernels, const Convolution& layer, const ConvolutionCall& call);

// One of several convolutions after each other. Images are numbered: 0 is what the first is given, i + 1 what step i makes.
struct ChainStep {
  const Convolution* layer = nullptr;
  int64_t source = 0, residual = -1;  // images; no residual: -1
  bool clip = false, again = false;
  int64_t slot = 0;                   // where its images are kept; those of several steps where no two are needed at once
};

// x -> y, the images of the last step. Residuals must have the shape of what they are added to.
void convolutions(const Kernels& kernels, const std::vector<ChainStep>& steps, const float* x, int64_t images, int64_t height, int64_t width,
                  float* y, int threads);

}  // namespace bitbell
