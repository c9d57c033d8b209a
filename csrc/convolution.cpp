#include "convolution.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "linear.hpp"
#include "pool.hpp"
#include "scratch.hpp"

namespace bitbell {
namespace {

constexpr int64_t kStripBytes = 256 * 1024;  // of copied windows: they stay in the second-level cache
constexpr int64_t kMostWindows = 256, kLookupWindows = 96, kFewestWindows = 12;  // of a strip

struct PixelCodes {};
struct QuantizedRow {};
struct RotatedRow {};
struct RotatedImages {};
struct RowSizes {};
struct PixelSums {};
struct RowSteps {};
struct CopiedWindows {};
struct WindowSums {};
struct StripSums {};
struct UnpackedPanel {};

// Taps [begin, end) of a window whose first lies at `first`, counted from the image's first pixel, that are inside of it.
struct Inside {
  int64_t begin, end;
  bool operator==(const Inside& other) const { return begin == other.begin && end == other.end; }
};

Inside taps_inside(int64_t first, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t begin = first < 0 ? std::min(taps, (-first + dilation - 1) / dilation) : 0;
  const int64_t end = first < size ? std::min(taps, (size - first + dilation - 1) / dilation) : 0;
  return {begin, std::max(begin, end)};
}

// Which taps lie inside, of every row or column of windows; the same few again and again.
struct Places {
  std::vector<Inside> kinds;
  std::vector<int64_t> kind;  // of each row or column

  Places(int64_t count, int64_t stride, int64_t before, int64_t dilation, int64_t taps, int64_t size) {
    for (int64_t i = 0; i < count; i++) {
      const Inside inside = taps_inside(i * stride - before, dilation, taps, size);
      const auto found = std::find(kinds.begin(), kinds.end(), inside);
      kind.push_back(found - kinds.begin());
      if (found == kinds.end()) kinds.push_back(inside);
    }
  }
  const Inside& of(int64_t i) const { return kinds[static_cast<size_t>(kind[static_cast<size_t>(i)])]; }
};

// One call's sizes, and the weights of every kind of window.
struct Job {
  const Kernels& kernels;
  const Convolution& layer;
  const Window& window;
  int64_t images, height, width, rows, columns, windows;  // windows: of an image
  bool look_up;
  int64_t pixel, pitch, image;  // of the padded codes or table addresses: their number
  Places down, across;
  std::vector<int32_t> sums;
  std::vector<Weights> weights;  // of every group, kind of row and kind of column

  Job(const Kernels& k, const Convolution& l, int64_t n, int64_t h, int64_t w)
      : kernels(k), layer(l), window(l.window), images(n), height(h), width(w), rows(window.rows(h)), columns(window.columns(w)),
        windows(rows * columns), look_up(k.lookups && !l.lookups.empty()),
        pixel(look_up ? window.groups * triples_of(window.group_channels()) : window.channels),
        pitch(window.padded_width(w) * pixel), image(window.padded_height(h) * pitch),
        down(rows, window.stride_h, window.top, window.dilation_h, window.kernel_h, h),
        across(columns, window.stride_w, window.left, window.dilation_w, window.kernel_w, w) {
    weigh_kinds();
  }

  // Outside the image there is no code, so that what zero points add depends on the taps inside.
  void weigh_kinds() {
    const size_t outputs = static_cast<size_t>(window.group_outputs());
    sums.resize(down.kinds.size() * across.kinds.size() * static_cast<size_t>(window.outputs));
    int32_t* sum = sums.data();
    for (int64_t g = 0; g < window.groups; g++)
      for (const Inside& y : down.kinds)
        for (const Inside& x : across.kinds) {
          for (int64_t ky = y.begin; ky < y.end; ky++)
            for (int64_t kx = x.begin; kx < x.end; kx++) {
              const int32_t* tap = layer.tap_sums + (ky * window.kernel_w + kx) * window.outputs + g * window.group_outputs();
              for (size_t i = 0; i < outputs; i++) sum[i] += tap[i];
            }
          Weights w = layer.groups[static_cast<size_t>(g)];
          w.k = (y.end - y.begin) * (x.end - x.begin) * window.group_channels();
          w.sums = sum;
          weights.push_back(w);
          sum += outputs;
        }
  }
  const Weights& weights_of(int64_t group, int64_t window_number) const {
    const size_t y = static_cast<size_t>(down.kind[static_cast<size_t>(window_number / columns)]);
    const size_t x = static_cast<size_t>(across.kind[static_cast<size_t>(window_number % columns)]);
    return weights[(static_cast<size_t>(group) * down.kinds.size() + y) * across.kinds.size() + x];
  }
};

// ------------------------------------------------------------------------------------------------- quantized images

// The codes or table addresses of padded images, sums of codes (images, height, width, groups), and a step an image.
struct Image {
  int8_t* codes = nullptr;
  uint16_t* lines = nullptr;
  int32_t* sums = nullptr;
  std::vector<float> steps;
};

template <class T, class Put>
void put_row(const Job& job, T* row, bool inside, T zero, Put&& put) {
  if (!inside) {
    std::fill(row, row + job.pitch, zero);
    return;
  }
  const int64_t left = job.window.left * job.pixel, pixels = job.width * job.pixel;
  std::fill(row, row + left, zero);
  put(row + left);
  std::fill(row + left + pixels, row + job.pitch, zero);
}

// One row of a padded image, and its pixels' sums. codes: (width, channels), or null outside of the image.
void place_row(const Job& job, const Image& image, int64_t n, int64_t padded_row, const int8_t* codes) {
  const Window& window = job.window;
  const int64_t group = window.group_channels(), groups = job.width * window.groups, at = n * job.image + padded_row * job.pitch;
  if (job.look_up) {
    put_row(job, image.lines + at, codes != nullptr, kZeroTriple, [&](uint16_t* out) {
      for (int64_t i = 0; i < groups; i++) job.kernels.lookups->triples(codes + i * group, group, out + i * triples_of(group));
    });
  } else {
    put_row(job, image.codes + at, codes != nullptr, int8_t{0},
            [&](int8_t* out) { std::memcpy(out, codes, static_cast<size_t>(job.width * window.channels)); });
  }
  if (!codes) return;
  int32_t* sums = image.sums + (n * job.height + padded_row - window.top) * groups;
  for (int64_t i = 0; i < groups; i++) sums[i] = job.kernels.training->sum_of_codes(codes + i * group, group);
}

// One step for all pixels of an image, or of all: NaN in one of them is NaN in all, as one tensor's statistics have it.
std::vector<float> steps_of_images(const Job& job, const float* of_rows, bool common) {
  std::vector<float> steps;
  const auto is_nan = [](float step) { return std::isnan(step); };
  const float* end = of_rows + job.images * job.height;
  const bool any = common && std::any_of(of_rows, end, is_nan);
  for (const float* row = of_rows; row < end; row += job.height)
    steps.push_back(any || std::any_of(row, row + job.height, is_nan) ? std::numeric_limits<float>::quiet_NaN() : *row);
  return steps;
}

// The rows of images, rotated, at `rotated` (row to row `stride` floats) -> each image's size.
std::vector<float> measure_images(const Job& job, const float* x, int64_t row, float* rotated, int64_t stride, int threads) {
  const InputPlan& plan = job.layer.plan;
  float* parts = scratch_of<RowSizes, float>(job.images * job.height);
  parallel_for(threads, job.images * job.height, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      float* h = rotated + i * stride;
      job.kernels.rotate(x + i * row, h, row, plan.rotation);
      std::fill(h + row, h + stride, 0.0f);
      parts[i] = job.kernels.gather(plan.statistic, h, row);
    }
  });
  std::vector<float> sizes;
  for (int64_t n = 0; n < job.images; n++) {
    double all = 0;
    for (const float* part = parts + n * job.height; part < parts + (n + 1) * job.height; part++)
      all = plan.statistic != Statistic::absmax ? all + *part : *part > all ? *part : all;
    const float size = size_of(plan.statistic, all, job.height * row);
    sizes.push_back(size < plan.smallest ? plan.smallest : size);
  }
  return sizes;
}

Image quantize_images(const Job& job, const float* x, int threads) {
  const Window& window = job.window;
  const InputPlan& plan = job.layer.plan;
  const int64_t padded = window.padded_height(job.height), row = job.width * window.channels, stride = padded_k(row);
  constexpr int64_t kSlack = 128;  // that kernels read and write beyond the end
  Image image;
  if (job.look_up) {
    image.lines = scratch_of<PixelCodes, uint16_t>(job.images * job.image + kSlack);
    std::fill_n(image.lines + job.images * job.image, kSlack, uint16_t{0});
  } else {
    image.codes = scratch_of<PixelCodes, int8_t>(job.images * job.image + kSlack);
  }
  image.sums = scratch_of<PixelSums, int32_t>(job.images * job.height * job.width * window.groups);
  const bool measures = plan.statistic != Statistic::none;
  float* rotated = measures ? scratch_of<RotatedImages, float>(job.images * job.height * stride) : nullptr;
  const std::vector<float> sizes = measures ? measure_images(job, x, row, rotated, stride, threads) : std::vector<float>();
  float* steps = scratch_of<RowSteps, float>(job.images * job.height);
  parallel_for(threads, job.images * padded, 1, [&](int64_t begin, int64_t end, int) {
    float* h = scratch_of<RotatedRow, float>(stride);
    int8_t* codes = scratch_of<QuantizedRow, int8_t>(stride + kSlack);
    InputPlan known = plan;
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / padded, y = i % padded - window.top, at = n * job.height + y;
      const bool inside = y >= 0 && y < job.height;
      int32_t sum;
      if (inside && measures) {
        const float size = sizes[static_cast<size_t>(n)];
        known.statistic = Statistic::none, known.rotation = 1, known.smallest = 0;
        known.divisor_plus = size * plan.divisor + plan.divisor_plus;
        known.step_plus = size * plan.step_factor + plan.step_plus;
        job.kernels.quantize(known, rotated + at * stride, row, codes, steps + at, &sum, rotated + at * stride);
      } else if (inside) {
        job.kernels.quantize(plan, x + at * row, row, codes, steps + at, &sum, h);
      }
      place_row(job, image, n, i % padded, inside ? codes : nullptr);
    }
  });
  image.steps = steps_of_images(job, steps, !measures);
  return image;
}

// ----------------------------------------------------------------------------------------------------- products

// Some windows of an image, in the order of outputs.
struct Strip {
  int64_t n, first, count;
};

// Sums of input codes of a strip's windows: one row of them after the other, as far as the same taps are inside.
void sum_windows(const Job& job, const Image& image, const Strip& strip, int64_t group, int32_t* sums) {
  const Window& window = job.window;
  const int64_t step = window.stride_w * window.groups;
  std::fill_n(sums, strip.count, 0);
  for (int64_t i = 0; i < strip.count;) {
    const int64_t oy = (strip.first + i) / job.columns, ox = (strip.first + i) % job.columns;
    const int64_t kind = job.across.kind[static_cast<size_t>(ox)];
    int64_t same = 1;
    while (i + same < strip.count && ox + same < job.columns && job.across.kind[static_cast<size_t>(ox + same)] == kind) same++;
    const Inside &y = job.down.of(oy), &x = job.across.of(ox);
    const int64_t top = oy * window.stride_h - window.top, left = ox * window.stride_w - window.left;
    for (int64_t ky = y.begin; ky < y.end; ky++)
      for (int64_t kx = x.begin; kx < x.end; kx++) {
        const int64_t row = strip.n * job.height + top + ky * window.dilation_h;
        const int32_t* from = image.sums + (row * job.width + left + kx * window.dilation_w) * window.groups + group;
        if (step == 1)
          for (int64_t j = 0; j < same; j++) sums[i + j] += from[j];
        else
          for (int64_t j = 0; j < same; j++) sums[i + j] += from[j * step];
      }
    i += same;
  }
}

// Where window `number` of an image begins among its padded codes.
int64_t start_of(const Job& job, int64_t number) {
  return number / job.columns * job.window.stride_h * job.pitch + number % job.columns * job.window.stride_w * job.pixel;
}

// acc (count, of_row) -> outputs [first, first + of_row) of a group, as far as it has them.
void finish_strip(const Job& job, const Image& image, const Strip& strip, int64_t group, int64_t first, int64_t of_row, const int32_t* acc,
                  const int32_t* sums, const float* residual, bool clip, float* y) {
  const Window& window = job.window;
  const int64_t at = (strip.n * job.windows + strip.first) * window.outputs + group * window.group_outputs() + first;
  const Weights* weights[kMostWindows];
  for (int64_t i = 0; i < strip.count; i++) weights[i] = &job.weights_of(group, strip.first + i);
  OutputRows rows;
  rows.weights = weights, rows.acc = acc, rows.acc_stride = of_row, rows.row = first, rows.m = strip.count;
  rows.count = std::min(of_row, window.group_outputs() - first);
  rows.step = image.steps[static_cast<size_t>(strip.n)], rows.sums = sums, rows.clip = clip;
  rows.residual = residual ? residual + at : nullptr, rows.y = y + at, rows.y_stride = window.outputs;
  job.kernels.finish_rows(rows, job.layer.plan);
}

// The codes of a strip's windows, one after the other; stride: bytes from window to window.
void copy_windows(const Job& job, const Image& image, const Strip& strip, int64_t group, int64_t stride, int8_t* out) {
  const Window& window = job.window;
  const int64_t channels = window.group_channels();
  const bool joined = window.dilation_w == 1 && window.groups == 1;
  const int64_t pieces = joined ? 1 : window.kernel_w, piece = joined ? window.kernel_w * channels : channels;
  for (int64_t i = 0; i < strip.count; i++, out += stride) {
    const int8_t* from = image.codes + strip.n * job.image + start_of(job, strip.first + i) + group * channels;
    int8_t* to = out;
    for (int64_t ky = 0; ky < window.kernel_h; ky++)
      for (int64_t kx = 0; kx < pieces; kx++, to += piece)
        std::memcpy(to, from + ky * window.dilation_h * job.pitch + kx * window.dilation_w * job.pixel, static_cast<size_t>(piece));
    std::memset(to, 0, static_cast<size_t>(out + stride - to));
  }
}

template <class Use>
void for_each_strip(const Job& job, int64_t size, int64_t parts, int threads, Use&& use) {
  const int64_t strips = (job.windows + size - 1) / size;
  parallel_for(threads, job.images * strips * parts, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t strip = i / parts % strips, first = strip * size;
      use(Strip{i / parts / strips, first, std::min(size, job.windows - first)}, i % parts);
    }
  });
}

// As many windows as fit, or fewer where that gives every thread some.
int64_t strip_size(const Job& job, int64_t most, int64_t parts, int threads) {
  const int64_t wanted = (2 * threads + job.images * parts - 1) / (job.images * parts);  // strips an image
  const int64_t shared = round_up((job.windows + wanted - 1) / wanted, kFewestWindows);
  return std::max<int64_t>(1, threads > 1 ? std::min(most, shared) : most);
}

void multiply_copies(const Job& job, const Image& image, const float* residual, bool clip, float* y, int threads) {
  const Window& window = job.window;
  const int64_t k = padded_k(window.k()), stride = k + 64;  // not a multiple of 4 KiB
  const int64_t most = std::clamp<int64_t>(kStripBytes / stride, kFewestWindows, kMostWindows);
  for_each_strip(job, strip_size(job, most, window.groups, threads), window.groups, threads, [&](const Strip& strip, int64_t group) {
    const Weights& w = job.layer.groups[static_cast<size_t>(group)];
    int8_t* codes = scratch_of<CopiedWindows, int8_t>(strip.count * stride);
    int32_t* sums = scratch_of<WindowSums, int32_t>(strip.count);
    int32_t* acc = scratch_of<StripSums, int32_t>(strip.count * kPanelRows);
    uint8_t* unpacked = scratch_of<UnpackedPanel, uint8_t>(kMatrixScratch);
    copy_windows(job, image, strip, group, stride, codes);
    sum_windows(job, image, strip, group, sums);
    for (int64_t p = 0; p < panels_of(w.rows); p++) {
      job.kernels.matrix(w.data + p * panel_bytes(w.k, w.bits), kernel_bits(w.bits), k, codes, stride, strip.count, acc, unpacked);
      finish_strip(job, image, strip, group, p * kPanelRows, kPanelRows, acc, sums, residual, clip, y);
    }
  });
}

// --------------------------------------------------------------------------------------------------------- look-ups

bool is_joined(const Window& window) { return window.dilation_w == 1 && window.groups == 1; }
int64_t runs_of(const Window& window) { return is_joined(window) ? window.kernel_h : window.taps(); }
int64_t run_triples(const Window& window) {
  const int64_t triples = triples_of(window.group_channels());
  return is_joined(window) ? window.kernel_w * triples : triples;
}

// The runs of a window, cut into calls of at most kTripleBlock triples: [first, last) of `runs`.
struct Calls {
  std::vector<Run> runs;
  std::vector<size_t> ends;

  explicit Calls(const Job& job) {
    const Window& window = job.window;
    int64_t together = 0;
    for (int64_t i = 0; i < runs_of(window); i++) {
      const int64_t ky = is_joined(window) ? i : i / window.kernel_w, kx = is_joined(window) ? 0 : i % window.kernel_w;
      int64_t x = ky * window.dilation_h * job.pitch + kx * window.dilation_w * job.pixel;
      for (int64_t left = round_up(run_triples(window), kTripleStep); left > 0;) {
        const int64_t triples = std::min(left, kTripleBlock);
        if (together + triples > kTripleBlock) ends.push_back(runs.size()), together = 0;
        runs.push_back({x, triples});
        together += triples, x += triples, left -= triples;
      }
    }
    ends.push_back(runs.size());
  }
};

void look_products_up(const Job& job, const Image& image, const float* residual, bool clip, float* y, int threads) {
  const Window& window = job.window;
  const int64_t panels = panels_of(window.group_outputs()), pairs = (panels + 1) / 2;
  const int64_t triples = runs_of(window) * round_up(run_triples(window), kTripleStep), of_group = triples_of(window.group_channels());
  const Calls calls(job);
  const int32_t bias = static_cast<int32_t>(-kTripleBias * triples);
  const int64_t parts = window.groups * pairs;
  for_each_strip(job, strip_size(job, kLookupWindows, parts, threads), parts, threads, [&](const Strip& strip, int64_t part) {
    const int64_t group = part / pairs, pair = part % pairs;
    const int two = pair * 2 + 2 <= panels ? 2 : 1;
    const int64_t of_row = two * kPanelRows;
    int32_t* sums = scratch_of<WindowSums, int32_t>(strip.count);
    int32_t* acc = scratch_of<StripSums, int32_t>(strip.count * of_row);
    const uint16_t* x[kLookupWindows];
    for (int64_t i = 0; i < strip.count; i++)
      x[i] = image.lines + strip.n * job.image + start_of(job, strip.first + i) + group * of_group;
    sum_windows(job, image, strip, group, sums);
    const uint8_t* w = job.layer.lookups[static_cast<size_t>(group)] + pair * 2 * kPanelRows * triples;
    size_t first = 0;
    for (const size_t end : calls.ends) {
      const int64_t runs = static_cast<int64_t>(end - first);
      job.kernels.lookups->product(w, two, calls.runs.data() + first, runs, x, strip.count, bias, first > 0, acc);
      for (; first < end; first++) w += calls.runs[first].triples * of_row;
    }
    finish_strip(job, image, strip, group, pair * 2 * kPanelRows, of_row, acc, sums, residual, clip, y);
  });
}

}  // namespace

int64_t triples_bytes(const Window& window) {
  return panels_of(window.group_outputs()) * kPanelRows * runs_of(window) * round_up(run_triples(window), kTripleStep);
}

void arrange_triples(const Window& window, const uint32_t* words, int bits, uint8_t* out) {
  const int64_t channels = window.group_channels(), of_pixel = triples_of(channels), run = run_triples(window);
  const int64_t padded = round_up(run, kTripleStep), triples = runs_of(window) * padded, panels = panels_of(window.group_outputs());
  const int64_t words_of_row = packed_words(window.k(), bits), taps_of_run = run / of_pixel;
  std::memset(out, 0, static_cast<size_t>(triples_bytes(window)));
  for (int64_t row = 0; row < window.group_outputs(); row++) {
    const int64_t panel = row / kPanelRows, place = row % 16 * 4 + row % kPanelRows / 16;
    const int64_t two = panel / 2 * 2 + 2 <= panels ? 2 : 1;
    uint8_t* to = out + panel / 2 * 2 * kPanelRows * triples + panel % 2 * kPanelRows + place;
    for (int64_t i = 0; i < window.k(); i++) {
      const int64_t tap = i / channels, channel = i % channels;
      const int64_t triple = tap / taps_of_run * padded + tap % taps_of_run * of_pixel + channel / 3;
      to[triple * two * kPanelRows] |= static_cast<uint8_t>(packed_code(words + row * words_of_row, i, bits) << (channel % 3 * 2));
    }
  }
}

void sum_taps(const Window& window, const uint32_t* words, int64_t rows, int bits, int32_t* out, int64_t stride) {
  const int64_t words_of_row = packed_words(window.k(), bits), channels = window.group_channels();
  for (int64_t row = 0; row < rows; row++)
    for (int64_t tap = 0; tap < window.taps(); tap++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < channels; i++) sum += static_cast<int32_t>(packed_code(words + row * words_of_row, tap * channels + i, bits));
      out[tap * stride + row] = sum;
    }
}

void convolution(const Kernels& kernels, const Convolution& layer, const float* x, int64_t images, int64_t height, int64_t width,
                 const float* residual, bool clip, float* y, int threads) {
  const Job job(kernels, layer, images, height, width);
  const Image image = quantize_images(job, x, threads);
  if (job.look_up) look_products_up(job, image, residual, clip, y, threads);
  else multiply_copies(job, image, residual, clip, y, threads);
}

}  // namespace bitbell
