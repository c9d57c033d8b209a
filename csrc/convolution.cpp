#include "convolution.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "linear.hpp"
#include "pool.hpp"
#include "quantized_images.hpp"
#include "scratch.hpp"

namespace bitbell {
namespace {

constexpr int64_t kStripBytes = 256 * 1024;  // of copied windows: they stay in the second-level cache
constexpr int64_t kMostWindows = 256, kLookupWindows = 112, kFewestWindows = 12, kTileWindows = 4;  // of a strip

struct CopiedWindows {};
struct WindowSums {};
struct Between {};
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

}  // namespace

// The weights of every kind of window in images of one size. Outside the image there is no code, so that what zero points add
// depends on the taps inside.
struct WindowKinds {
  int64_t height, width;
  Places down, across;
  std::vector<int32_t> sums;
  std::vector<Weights> weights;  // of every group, kind of row and kind of column

  WindowKinds(const Convolution& layer, int64_t h, int64_t w)
      : height(h), width(w), down(layer.window.rows(h), layer.window.stride_h, layer.window.top, layer.window.dilation_h, layer.window.kernel_h, h),
        across(layer.window.columns(w), layer.window.stride_w, layer.window.left, layer.window.dilation_w, layer.window.kernel_w, w) {
    const Window& window = layer.window;
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
          Weights of_kind = layer.groups[static_cast<size_t>(g)];
          of_kind.k = (y.end - y.begin) * (x.end - x.begin) * window.group_channels();
          of_kind.sums = sum;
          weights.push_back(of_kind);
          sum += outputs;
        }
  }
};

namespace {

// Those of the last size asked for are kept: they are asked for again and again.
std::shared_ptr<const WindowKinds> kinds_of(const Convolution& layer, int64_t height, int64_t width) {
  const std::lock_guard<std::mutex> lock(layer.guard);
  if (!layer.kinds || layer.kinds->height != height || layer.kinds->width != width)
    layer.kinds = std::make_shared<const WindowKinds>(layer, height, width);
  return layer.kinds;
}

// One call's sizes.
struct Job {
  const Kernels& kernels;
  const Convolution& layer;
  const Window& window;
  const ConvolutionCall& call;
  int64_t images, height, width, rows, columns, windows;  // windows: of an image
  bool look_up;
  std::shared_ptr<const WindowKinds> kinds;

  Job(const Kernels& k, const Convolution& l, const ConvolutionCall& c)
      : kernels(k), layer(l), window(l.window), call(c), images(c.images), height(c.height), width(c.width), rows(window.rows(c.height)),
        columns(window.columns(c.width)), windows(rows * columns), look_up(k.lookups && !l.lookups.empty()),
        kinds(kinds_of(l, c.height, c.width)) {}

  // Weights of windows [first, first + count) of an image.
  void weights_of(int64_t group, int64_t first, int64_t count, const Weights** out) const {
    const int64_t across = static_cast<int64_t>(kinds->across.kinds.size()), down = static_cast<int64_t>(kinds->down.kinds.size());
    for (int64_t i = 0; i < count;) {
      const int64_t row = (first + i) / columns, column = (first + i) % columns, end = std::min(count, i + columns - column);
      const Weights* of_row = kinds->weights.data() + (group * down + kinds->down.kind[static_cast<size_t>(row)]) * across;
      const int64_t* kind = kinds->across.kind.data() + column - i;
      for (; i < end; i++) out[i] = of_row + kind[i];
    }
  }
};

// ----------------------------------------------------------------------------------------------------- products

// Whether a row of a window lies together.
bool is_joined(const Window& window) { return window.dilation_w == 1 && window.groups == 1; }

// Some windows of an image, in the order of outputs.
struct Strip {
  int64_t n, first, count;
};

// Sums of input codes of a row of windows: of those of which the same taps are inside, together.
void sum_row(const Job& job, const QuantizedImages& image, int64_t n, int64_t oy, int64_t group, int32_t* sums) {
  const Window& window = job.window;
  const Places& across = job.kinds->across;
  const int64_t step = window.stride_w * window.groups;
  const Inside& y = job.kinds->down.of(oy);
  std::fill_n(sums, job.columns, 0);
  for (int64_t ox = 0, end; ox < job.columns; ox = end) {
    for (end = ox + 1; end < job.columns && across.kind[static_cast<size_t>(end)] == across.kind[static_cast<size_t>(ox)];) end++;
    const Inside& x = across.of(ox);
    for (int64_t ky = y.begin; ky < y.end; ky++)
      for (int64_t kx = x.begin; kx < x.end; kx++) {
        const int64_t row = n * job.height + oy * window.stride_h - window.top + ky * window.dilation_h;
        const int64_t column = ox * window.stride_w - window.left + kx * window.dilation_w;
        const int32_t* from = image.sums + (row * job.width + column) * window.groups + group;
        if (step == 1)
          for (int64_t j = ox; j < end; j++) sums[j] += from[j - ox];
        else
          for (int64_t j = ox; j < end; j++) sums[j] += from[(j - ox) * step];
      }
  }
}

// Sums of input codes of all windows: (groups, images, windows).
const int32_t* sum_windows(const Job& job, const QuantizedImages& image) {
  int32_t* sums = scratch_of<WindowSums, int32_t>(job.window.groups * job.images * job.windows);
  const int64_t rows = job.images * job.rows;
  parallel_for(job.call.threads, job.window.groups * rows, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) sum_row(job, image, i % rows / job.rows, i % job.rows, i / rows, sums + i * job.columns);
  });
  return sums;
}

// use(window of the strip, where it begins among padded codes).
template <class Use>
void for_windows(const Job& job, const QuantizedImages& image, const Strip& strip, Use&& use) {
  const Window& window = job.window;
  const int64_t corner = strip.n * image.size + (image.top - window.top) * image.pitch + (image.left - window.left) * image.pixel;
  int64_t oy = strip.first / job.columns, ox = strip.first % job.columns;
  for (int64_t i = 0; i < strip.count; oy++, ox = 0)
    for (; ox < job.columns && i < strip.count; ox++, i++)
      use(i, corner + oy * window.stride_h * image.pitch + ox * window.stride_w * image.pixel);
}

// How sums of a strip become outputs [first, first + of_row) of a group, as far as it has them. weights: room for each window's; sums: of all
// windows, as sum_windows has them.
OutputRows outputs_of(const Job& job, const QuantizedImages& image, const Strip& strip, int64_t group, int64_t first, int64_t of_row, const int32_t* acc,
                      const int32_t* sums, const Weights** weights) {
  const Window& window = job.window;
  const ConvolutionCall& call = job.call;
  const int64_t at = (strip.n * job.windows + strip.first) * window.outputs + group * window.group_outputs() + first;
  job.weights_of(group, strip.first, strip.count, weights);
  OutputRows rows;
  rows.weights = weights, rows.acc = acc, rows.acc_stride = of_row, rows.row = first, rows.m = strip.count;
  rows.count = std::min(of_row, window.group_outputs() - first);
  rows.step = image.steps[static_cast<size_t>(strip.n)], rows.sums = sums + (group * job.images + strip.n) * job.windows + strip.first, rows.clip = call.clip;
  rows.residual = call.residual ? call.residual + at : nullptr, rows.y = call.y + at, rows.y_stride = window.outputs;
  return rows;
}

// The codes of a strip's windows, one after the other; stride: bytes from window to window.
void copy_windows(const Job& job, const QuantizedImages& image, const Strip& strip, int64_t group, int64_t stride, int8_t* out) {
  const Window& window = job.window;
  const int64_t channels = window.group_channels();
  const bool joined = is_joined(window);
  const int64_t pieces = joined ? 1 : window.kernel_w, piece = joined ? window.kernel_w * channels : channels;
  for_windows(job, image, strip, [&](int64_t i, int64_t start) {
    const int8_t* from = image.codes + start + group * channels;
    int8_t* to = out + i * stride;
    for (int64_t ky = 0; ky < window.kernel_h; ky++)
      for (int64_t kx = 0; kx < pieces; kx++, to += piece)
        std::memcpy(to, from + ky * window.dilation_h * image.pitch + kx * window.dilation_w * image.pixel, static_cast<size_t>(piece));
    std::memset(to, 0, static_cast<size_t>(out + (i + 1) * stride - to));
  });
}

template <class Use>
void for_each_strip(const Job& job, int64_t size, int64_t parts, Use&& use) {
  const int64_t strips = (job.windows + size - 1) / size;
  parallel_for(job.call.threads, job.images * strips * parts, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t strip = i / parts % strips, first = strip * size;
      use(Strip{i / parts / strips, first, std::min(size, job.windows - first)}, i % parts);
    }
  });
}

// Windows of a strip, at most `most`: strips of about one size, and some for every thread.
int64_t strip_size(const Job& job, int64_t most, int64_t parts) {
  const int64_t threads = job.call.threads, wanted = threads > 1 ? (2 * threads + job.images * parts - 1) / (job.images * parts) : 1;
  const int64_t strips = std::max((job.windows + most - 1) / most, std::min(wanted, (job.windows + kFewestWindows - 1) / kFewestWindows));
  return std::min(most, round_up((job.windows + strips - 1) / strips, kTileWindows));
}

void multiply_copies(const Job& job, const QuantizedImages& image) {
  const Window& window = job.window;
  const int32_t* sums = sum_windows(job, image);
  const int64_t k = padded_k(window.k()), stride = k + 64;  // not a multiple of 4 KiB
  const int64_t most = std::clamp<int64_t>(kStripBytes / stride, kFewestWindows, kMostWindows);
  for_each_strip(job, strip_size(job, most, window.groups), window.groups, [&](const Strip& strip, int64_t group) {
    const Weights& w = job.layer.groups[static_cast<size_t>(group)];
    int8_t* codes = scratch_of<CopiedWindows, int8_t>(strip.count * stride);
    int32_t* acc = scratch_of<StripSums, int32_t>(strip.count * kPanelRows);
    uint8_t* unpacked = scratch_of<UnpackedPanel, uint8_t>(kMatrixScratch);
    const Weights* weights[kMostWindows];
    copy_windows(job, image, strip, group, stride, codes);
    for (int64_t p = 0; p < panels_of(w.rows); p++) {
      job.kernels.matrix(w.data + p * panel_bytes(w.k, w.bits), kernel_bits(w.bits), k, codes, stride, strip.count, acc, unpacked);
      const OutputRows rows = outputs_of(job, image, strip, group, p * kPanelRows, kPanelRows, acc, sums, weights);
      job.kernels.finish_rows(rows, job.layer.plan);
    }
  });
}

// --------------------------------------------------------------------------------------------------------- look-ups

// Whether windows beside each other share the look-ups of their pixels: where there is one panel, the addresses of pixels, not
// the look-ups, would take the time.
bool is_shared(const Window& window) {
  return is_joined(window) && window.stride_w == 1 && window.kernel_w == kSharedTaps && window.outputs <= kPanelRows;
}
int64_t runs_of(const Window& window) { return is_joined(window) ? window.kernel_h : window.taps(); }
// Weight codes of a run, in triples.
int64_t run_triples(const Window& window) {
  const int64_t triples = triples_of(window.group_channels());
  if (is_shared(window)) return kSharedTaps * triples;
  return round_up(is_joined(window) ? window.kernel_w * triples : triples, kTripleStep);
}
// Where the codes of a tap's channel are.
int64_t triple_at(const Window& window, int64_t tap, int64_t channel) {
  const int64_t of_pixel = triples_of(window.group_channels()), triple = channel / 3;
  const int64_t run = is_joined(window) ? tap / window.kernel_w : tap, of_run = is_joined(window) ? tap % window.kernel_w : 0;
  return run * run_triples(window) + (is_shared(window) ? triple * kSharedTaps + of_run : of_run * of_pixel + triple);
}

// The runs of a window, cut into calls of at most kTripleBlock triples: [first, last) of `runs`.
struct Calls {
  std::vector<Run> runs;
  std::vector<size_t> ends;

  Calls(const Window& window, const QuantizedImages& image) {
    const int64_t taps = is_shared(window) ? kSharedTaps : 1;  // of which a triple of inputs has weights
    int64_t together = 0;
    for (int64_t i = 0; i < runs_of(window); i++) {
      const int64_t ky = is_joined(window) ? i : i / window.kernel_w, kx = is_joined(window) ? 0 : i % window.kernel_w;
      int64_t x = ky * window.dilation_h * image.pitch + kx * window.dilation_w * image.pixel;
      for (int64_t left = run_triples(window) / taps; left > 0;) {
        const int64_t triples = std::min(left, kTripleBlock / taps);
        if (together + triples > kTripleBlock / taps) ends.push_back(runs.size()), together = 0;
        runs.push_back({x, triples});
        together += triples, x += triples, left -= triples;
      }
    }
    ends.push_back(runs.size());
  }
};

void look_products_up(const Job& job, const QuantizedImages& image) {
  const Window& window = job.window;
  const int32_t* sums = sum_windows(job, image);
  const int64_t panels = panels_of(window.group_outputs()), pairs = (panels + 1) / 2;
  const int64_t triples = runs_of(window) * run_triples(window), of_group = triples_of(window.group_channels());
  const Calls calls(window, image);
  const int32_t bias = static_cast<int32_t>(-kTripleBias * triples);
  const int64_t parts = window.groups * pairs;
  for_each_strip(job, strip_size(job, kLookupWindows, parts), parts, [&](const Strip& strip, int64_t part) {
    const int64_t group = part / pairs, pair = part % pairs;
    const int two = pair * 2 + 2 <= panels ? 2 : 1;
    const int64_t of_row = two * kPanelRows;
    int32_t* acc = scratch_of<StripSums, int32_t>(strip.count * of_row);
    const uint16_t* x[kLookupWindows];
    for_windows(job, image, strip, [&](int64_t i, int64_t start) { x[i] = image.lines + start + group * of_group; });
    const Weights* weights[kLookupWindows];
    const OutputRows rows = outputs_of(job, image, strip, group, pair * 2 * kPanelRows, of_row, acc, sums, weights);
    LookupProduct product;
    product.w = job.layer.lookups[static_cast<size_t>(group)] + pair * 2 * kPanelRows * triples, product.panels = two;
    product.x = x, product.m = strip.count, product.first = bias, product.acc = acc, product.plan = &job.layer.plan;
    product.pixel = is_shared(window) ? image.pixel : 0;
    size_t first = 0;
    for (const size_t end : calls.ends) {
      product.runs = calls.runs.data() + first, product.count = static_cast<int64_t>(end - first);
      product.finish = end == calls.runs.size() ? &rows : nullptr;
      product.bytes = 0;
      for (; first < end; first++) product.bytes += calls.runs[first].triples * (is_shared(window) ? kSharedTaps : 1) * of_row;
      job.kernels.lookups->product(product);
      product.w += product.bytes;
      product.add = true;
    }
  });
}

}  // namespace

int64_t triples_bytes(const Window& window) {
  return panels_of(window.group_outputs()) * kPanelRows * runs_of(window) * run_triples(window);
}

void arrange_triples(const Window& window, const uint32_t* words, int bits, uint8_t* out) {
  const int64_t channels = window.group_channels(), words_of_row = packed_words(window.k(), bits);
  const int64_t triples = runs_of(window) * run_triples(window), panels = panels_of(window.group_outputs());
  std::memset(out, 0, static_cast<size_t>(triples_bytes(window)));
  for (int64_t row = 0; row < window.group_outputs(); row++) {
    const int64_t panel = row / kPanelRows, place = row % 16 * 4 + row % kPanelRows / 16;
    const int64_t two = panel / 2 * 2 + 2 <= panels ? 2 : 1;
    uint8_t* to = out + panel / 2 * 2 * kPanelRows * triples + panel % 2 * kPanelRows + place;
    for (int64_t i = 0; i < window.k(); i++) {
      const int64_t tap = i / channels, channel = i % channels;
      const int code = static_cast<int>(packed_code(words + row * words_of_row, i, bits));
      to[triple_at(window, tap, channel) * two * kPanelRows] |= static_cast<uint8_t>(code << (channel % 3 * 2));
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

void convolution(const Kernels& kernels, const Convolution& layer, const ConvolutionCall& call) {
  const Job job(kernels, layer, call);
  const QuantizedImages& image = quantize_images(kernels, layer.plan, job.window, call, job.look_up);
  if (job.look_up) look_products_up(job, image);
  else multiply_copies(job, image);
}

void convolutions(const Kernels& kernels, const std::vector<ChainStep>& steps, const float* x, int64_t images, int64_t height, int64_t width,
                  float* y, int threads) {
  struct Made {
    const float* x;
    int64_t height, width;
  };
  std::vector<Made> made = {{x, height, width}};
  std::vector<int64_t> sizes;  // of slots
  for (const ChainStep& step : steps) {
    const Made& from = made[static_cast<size_t>(step.source)];
    const Window& window = step.layer->window;
    made.push_back({nullptr, window.rows(from.height), window.columns(from.width)});
    if (sizes.size() <= static_cast<size_t>(step.slot)) sizes.resize(static_cast<size_t>(step.slot) + 1);
    int64_t& size = sizes[static_cast<size_t>(step.slot)];
    size = std::max(size, round_up(images * made.back().height * made.back().width * window.outputs, 16));
  }
  std::vector<int64_t> begins(sizes.size() + 1);
  for (size_t i = 0; i < sizes.size(); i++) begins[i + 1] = begins[i] + sizes[i];
  float* between = scratch_of<Between, float>(begins.back());
  for (size_t i = 0; i < steps.size(); i++) {
    const ChainStep& step = steps[i];
    const Made& from = made[static_cast<size_t>(step.source)];
    float* to = i + 1 == steps.size() ? y : between + begins[static_cast<size_t>(step.slot)];
    const float* residual = step.residual < 0 ? nullptr : made[static_cast<size_t>(step.residual)].x;
    convolution(kernels, *step.layer, {from.x, images, from.height, from.width, step.again, residual, step.clip, to, threads});
    made[i + 1].x = to;
  }
}

}  // namespace bitbell
