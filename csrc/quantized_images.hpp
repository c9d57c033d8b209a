// Images as a convolution multiplies them: every pixel's codes, or table addresses, with zeros around each image.
#pragma once
#include <vector>

#include "convolution.hpp"

namespace bitbell {

// Codes lie in the memory of the thread that called for them, until it calls again.
struct QuantizedImages {
  const float* x = nullptr;  // what they are codes of
  int64_t images = 0, height = 0, width = 0, channels = 0, groups = 1;
  bool look_up = false;
  int64_t left = 0, right = 0, top = 0, bottom = 0;  // zeros
  int64_t pixel = 0, pitch = 0, size = 0;            // codes or addresses of a pixel, a padded row and a padded image
  int8_t* codes = nullptr;
  uint16_t* lines = nullptr;                         // addresses, instead of codes where products are looked up
  int32_t* sums = nullptr;                           // of codes: (images, height, width, groups)
  std::vector<float> steps;                          // of each image
};

const QuantizedImages& quantize_images(const Kernels& kernels, const InputPlan& plan, const Window& window, const ConvolutionCall& call,
                                       bool look_up);

}  // namespace bitbell
