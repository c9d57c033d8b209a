#include "quantized_images.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "pool.hpp"
#include "scratch.hpp"

namespace bitbell {
namespace {

constexpr int64_t kSlack = 128;  // that kernels read and write beyond the end

struct PixelCodes {};
struct PixelSums {};
struct QuantizedRow {};
struct RotatedRow {};
struct RotatedImages {};
struct RowSizes {};
struct RowSteps {};

// What a call asks for, without its codes.
QuantizedImages outline(const Window& window, const ConvolutionCall& call, bool look_up) {
  QuantizedImages images;
  images.x = call.x, images.images = call.images, images.height = call.height, images.width = call.width;
  images.channels = window.channels, images.groups = window.groups, images.look_up = look_up;
  images.left = window.left, images.right = window.right, images.top = window.top, images.bottom = window.bottom;
  images.pixel = look_up ? window.groups * triples_of(window.group_channels()) : window.channels;
  images.pitch = window.padded_width(call.width) * images.pixel;
  images.size = window.padded_height(call.height) * images.pitch;
  return images;
}

// Whether what is there serves for what is asked: the same pixels, and no fewer zeros around them.
bool serves(const QuantizedImages& there, const QuantizedImages& asked) {
  const auto all = [](const QuantizedImages& q) { return std::array<int64_t, 6>{q.images, q.height, q.width, q.channels, q.groups, q.look_up}; };
  return there.x == asked.x && all(there) == all(asked) && there.left >= asked.left && there.right >= asked.right && there.top >= asked.top &&
         there.bottom >= asked.bottom;
}

template <class T, class Put>
void put_row(const QuantizedImages& images, T* row, bool inside, T zero, Put&& put) {
  if (!inside) {
    std::fill(row, row + images.pitch, zero);
    return;
  }
  const int64_t left = images.left * images.pixel, pixels = images.width * images.pixel;
  std::fill(row, row + left, zero);
  put(row + left);
  std::fill(row + left + pixels, row + images.pitch, zero);
}

// Where a row of a padded image is, of codes or addresses; and the sums of its pixels.
int64_t place_of(const QuantizedImages& images, int64_t n, int64_t padded_row) { return n * images.size + padded_row * images.pitch; }
int32_t* sums_of(const QuantizedImages& images, int64_t n, int64_t padded_row) {
  return images.sums + (n * images.height + padded_row - images.top) * images.width * images.groups;
}

// One row of a padded image, and its pixels' sums. codes: (width, channels), or null outside of the image.
void place_row(const Kernels& kernels, const QuantizedImages& images, int64_t n, int64_t padded_row, const int8_t* codes) {
  const int64_t group = images.channels / images.groups, groups = images.width * images.groups, at = place_of(images, n, padded_row);
  if (images.look_up) {
    put_row(images, images.lines + at, codes != nullptr, kZeroTriple, [&](uint16_t* out) {
      for (int64_t i = 0; i < groups; i++) kernels.lookups->triples(codes + i * group, group, out + i * triples_of(group));
    });
  } else {
    put_row(images, images.codes + at, codes != nullptr, int8_t{0},
            [&](int8_t* out) { std::memcpy(out, codes, static_cast<size_t>(images.width * images.channels)); });
  }
  if (!codes) return;
  int32_t* sums = sums_of(images, n, padded_row);
  for (int64_t i = 0; i < groups; i++) sums[i] = kernels.training->sum_of_codes(codes + i * group, group);
}

// The same of a row of rotated, finite numbers (width, channels), without codes on the way.
void place_lines(const Kernels& kernels, const QuantizedImages& images, int64_t n, int64_t padded_row, const InputPlan& known, const float* h) {
  put_row(images, images.lines + place_of(images, n, padded_row), true, kZeroTriple, [&](uint16_t* out) {
    const int64_t groups = images.width * images.groups;
    kernels.lookups->lines(known, h, groups, images.channels / images.groups, out, sums_of(images, n, padded_row));
  });
}

// One step for all pixels of an image, or of all: NaN in one of them is NaN in all, as one tensor's statistics have it.
std::vector<float> steps_of_images(const QuantizedImages& images, const float* of_rows, bool common) {
  std::vector<float> steps;
  const auto is_nan = [](float step) { return std::isnan(step); };
  const float* end = of_rows + images.images * images.height;
  const bool any = common && std::any_of(of_rows, end, is_nan);
  for (const float* row = of_rows; row < end; row += images.height)
    steps.push_back(any || std::any_of(row, row + images.height, is_nan) ? std::numeric_limits<float>::quiet_NaN() : *row);
  return steps;
}

// The rows of images, rotated, at `rotated` (row to row `stride` floats) -> each image's size.
std::vector<float> measure_images(const Kernels& kernels, const InputPlan& plan, const ConvolutionCall& call, int64_t row, float* rotated,
                                  int64_t stride) {
  float* parts = scratch_of<RowSizes, float>(call.images * call.height);
  parallel_for(call.threads, call.images * call.height, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      float* h = rotated + i * stride;
      kernels.rotate(call.x + i * row, h, row, plan.rotation);
      std::fill(h + row, h + stride, 0.0f);
      parts[i] = kernels.gather(plan.statistic, h, row);
    }
  });
  std::vector<float> sizes;
  for (int64_t n = 0; n < call.images; n++) {
    double all = 0;
    for (const float* part = parts + n * call.height; part < parts + (n + 1) * call.height; part++)
      all = plan.statistic != Statistic::absmax ? all + *part : *part > all ? *part : all;
    const float size = size_of(plan.statistic, all, call.height * row);
    sizes.push_back(size < plan.smallest ? plan.smallest : size);
  }
  return sizes;
}

// The plan of an image whose numbers are rotated and measured.
InputPlan measured_plan(const InputPlan& plan, float size) {
  InputPlan known = plan;
  known.statistic = Statistic::none, known.rotation = 1, known.smallest = 0;
  known.divisor_plus = size * plan.divisor + plan.divisor_plus;
  known.step_plus = size * plan.step_factor + plan.step_plus;
  known.finite = plan.statistic != Statistic::absmax && std::isfinite(size);  // a maximum does not show NaN
  return known;
}

void fill(const Kernels& kernels, const InputPlan& plan, const ConvolutionCall& call, QuantizedImages& images) {
  const int64_t padded = images.top + call.height + images.bottom, row = call.width * images.channels, stride = padded_k(row);
  if (images.look_up) {
    images.lines = scratch_of<PixelCodes, uint16_t>(call.images * images.size + kSlack);
    std::fill_n(images.lines + call.images * images.size, kSlack, uint16_t{0});
  } else {
    images.codes = scratch_of<PixelCodes, int8_t>(call.images * images.size + kSlack);
  }
  images.sums = scratch_of<PixelSums, int32_t>(call.images * call.height * call.width * images.groups);
  const bool measures = plan.statistic != Statistic::none;
  float* rotated = measures ? scratch_of<RotatedImages, float>(call.images * call.height * stride + kSlack) : nullptr;
  const std::vector<float> sizes = measures ? measure_images(kernels, plan, call, row, rotated, stride) : std::vector<float>();
  float* steps = scratch_of<RowSteps, float>(call.images * call.height);
  parallel_for(call.threads, call.images * padded, 1, [&](int64_t begin, int64_t end, int) {
    float* h = scratch_of<RotatedRow, float>(stride);
    int8_t* codes = scratch_of<QuantizedRow, int8_t>(stride + kSlack);
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / padded, y = i % padded - images.top, at = n * call.height + y;
      const bool inside = y >= 0 && y < call.height;
      int32_t sum;
      if (inside && measures) {
        const InputPlan known = measured_plan(plan, sizes[static_cast<size_t>(n)]);
        if (images.look_up && known.finite && known.thresholds) {
          place_lines(kernels, images, n, i % padded, known, rotated + at * stride);
          steps[at] = known.step_plus;
          continue;
        }
        kernels.quantize(known, rotated + at * stride, row, codes, steps + at, &sum, rotated + at * stride);
      } else if (inside) {
        kernels.quantize(plan, call.x + at * row, row, codes, steps + at, &sum, h);
      }
      place_row(kernels, images, n, i % padded, inside ? codes : nullptr);
    }
  });
  images.steps = steps_of_images(images, steps, !measures);
}

}  // namespace

const QuantizedImages& quantize_images(const Kernels& kernels, const InputPlan& plan, const Window& window, const ConvolutionCall& call,
                                       bool look_up) {
  thread_local QuantizedImages kept;
  QuantizedImages asked = outline(window, call, look_up);
  if (call.again && serves(kept, asked)) return kept;
  kept.x = nullptr;  // until all is there
  fill(kernels, plan, call, asked);
  kept = std::move(asked);
  return kept;
}

}  // namespace bitbell
