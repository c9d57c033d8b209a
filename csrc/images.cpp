#include "images.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "pool.hpp"
#include "scratch.hpp"

namespace bitbell {
namespace {

constexpr int64_t kPanel = 64;          // outputs that are summed at a time
constexpr int64_t kTilesAtOnce = 24;    // whose sums the nearest cache holds
constexpr float kLimit = 256;           // of pixels and weights: points spread the rounding of large ones over their tile
constexpr double kPoints[] = {0, 1, -1, 2, -2, 0.5, -0.5};  // and infinity

// What the taps' products with 1, a, a**2, ... at a point are divided by.
double divisor_of(int point) {
  double d = point == 0 ? -1 : 1;
  for (int i = 0; i < 7; i++)
    if (i != point) d *= kPoints[point] - kPoints[i];
  return d;
}

// The polynomial of a phase's taps, of which there are `count / stride`, rounded up.
float at_point(const float* filter, int64_t count, int64_t stride, int64_t point) {
  if (point == kTilePoints - 1) return filter[(kTileTaps - 1) * stride];
  double sum = 0, power = 1 / divisor_of(static_cast<int>(point));
  for (int64_t column = 0; column < count; column += stride, power *= kPoints[point]) sum += filter[column] * power;
  return static_cast<float>(sum);
}

struct Rows {};
struct Sums {};

}  // namespace

FloatConvolution::FloatConvolution(const Window& window, const float* weight, const float* bias)
    : window_(window), width_(round_up(window.outputs, 16)) {
  const Window& w = window_;
  direct_ = arrange(weight, false);
  const int64_t taps = (w.kernel_w + w.stride_w - 1) / w.stride_w, count = w.outputs * w.channels * w.taps();
  const bool within = std::all_of(weight, weight + count, [](float v) { return std::fabs(v) <= kLimit; });
  if (within && (taps == kTileTaps || taps == kTileTaps - 1)) points_ = arrange(weight, true);
  bias_.reset(new (std::align_val_t(64)) float[static_cast<size_t>(width_)]());
  if (bias) std::copy(bias, bias + w.outputs, bias_.get());
}

int64_t FloatConvolution::panel_width(int64_t panel) const { return std::min(kPanel, width_ - panel); }

// Numbers of a row that are summed at a point: all phases of the stride, but at infinity those alone that have a last tap.
int64_t FloatConvolution::run_of(int64_t point) const {
  const Window& w = window_;
  const int64_t last = std::max<int64_t>(0, w.kernel_w - (kTileTaps - 1) * w.stride_w);
  return (point == kTilePoints - 1 ? last : w.stride_w) * w.channels;
}

// Panels of at most 64 outputs: (points,) kernel rows, taps and channels of a row, outputs. Points sum over phases of the stride
// instead of taps.
FloatConvolution::Floats FloatConvolution::arrange(const float* weight, bool points) const {
  const Window& w = window_;
  const int64_t planes = points ? kTilePoints : 1, most = (points ? w.stride_w : w.kernel_w) * w.channels;
  const size_t count = static_cast<size_t>(planes * w.kernel_h * most * width_);
  Floats out(new (std::align_val_t(64)) float[count]());
  float* to = out.get();
  for (int64_t panel = 0; panel < width_; panel += kPanel)
    for (int64_t point = 0; point < planes; point++)
      for (int64_t row = 0; row < w.kernel_h; row++)
        for (int64_t k = 0; k < (points ? run_of(point) : most); k++, to += panel_width(panel))
          for (int64_t i = 0; i < std::min(kPanel, w.outputs - panel); i++) {
            const int64_t tap = k / w.channels, channel = k % w.channels;
            const float* filter = weight + (((panel + i) * w.channels + channel) * w.kernel_h + row) * w.kernel_w;
            to[i] = points ? at_point(filter + tap, w.kernel_w - tap, w.stride_w, point) : filter[tap];
          }
  return out;
}

FloatConvolution::Way FloatConvolution::way(bool points, int64_t width) const {
  const Window& w = window_;
  Way way;
  way.points = points;
  way.stride = w.stride_w * w.channels;
  way.run = points ? way.stride : w.kernel_w * w.channels;
  const int64_t outputs = w.columns(width);
  way.tiles = points ? (outputs + kTileOutputs - 1) / kTileOutputs : outputs;
  way.row_floats = points ? kTilePoints * (way.tiles * way.run + kBeyond) : (w.padded_width(width) + w.kernel_w) * w.channels;
  way.row_floats = round_up(way.row_floats, 16);
  return way;
}

// A row of the image with zeros around it, and, for points, transformed. padded: zero where no pixel is written. False: it has
// numbers that points cannot take.
bool FloatConvolution::load_row(const Kernels& kernels, const Batch& batch, int64_t image, int64_t row, const Way& way, float* padded,
                                float* out) const {
  const int64_t channels = window_.channels, plane = batch.height * batch.width;
  float* to = (way.points ? padded : out) + window_.left * channels;
  const int64_t of_row = batch.width * (batch.channels_last ? channels : 1), planes = batch.channels_last ? 1 : channels;
  const float* x = batch.x + image * plane * channels + row * of_row;
  if (row + window_.stride_h < batch.height)  // of what comes next
    for (int64_t i = 0; i < planes; i++)
      for (int64_t j = 0; j < of_row; j += 16) __builtin_prefetch(x + i * plane + window_.stride_h * of_row + j);
  if (batch.channels_last) {
    std::memcpy(to, x, static_cast<size_t>(batch.width * channels) * 4);
  } else {
    for (int64_t i = 0; i < batch.width; i++)
      for (int64_t channel = 0; channel < channels; channel++) to[i * channels + channel] = x[channel * plane + i];
  }
  if (!way.points) return true;
  if (!kernels.images->all_within(to, batch.width * channels, kLimit)) return false;
  kernels.images->to_points(padded, way.run, way.tiles, out, way.tiles * way.run + kBeyond);
  return true;
}

// Sums of one row of outputs, without bias. rows: the `count` that lie in the image, from the kernel's row `first` on.
void FloatConvolution::convolve_row(const Kernels& kernels, const Way& way, const float* const* rows, int64_t first, int64_t count, float* sums,
                                    float* y) const {
  const int64_t planes = way.points ? kTilePoints : 1;
  const int64_t of_panel = window_.kernel_h * (way.points ? (kTilePoints - 1) * way.run + run_of(kTilePoints - 1) : way.run);
  const float* weights = way.points ? points_.get() : direct_.get();
  const float* at[kMostRows];
  for (int64_t panel = 0; panel < width_; panel += kPanel) {
    const int64_t width = panel_width(panel);
    const int64_t step = way.points ? kTilesAtOnce : way.tiles;
    for (int64_t tile = 0; tile < way.tiles; tile += step) {
      TileProduct product;
      product.width = width, product.count = count, product.stride = way.stride;
      product.tiles = std::min(step, way.tiles - tile), product.rows = at;
      const float* of_point = weights;
      for (int64_t point = 0; point < planes; point++) {
        product.run = way.points ? run_of(point) : way.run;
        const int64_t skip = (way.points ? point * (way.tiles * way.run + kBeyond) : 0) + tile * way.stride;
        for (int64_t i = 0; i < count; i++) at[i] = rows[i] + skip;
        product.w = of_point + first * product.run * width;
        of_point += window_.kernel_h * product.run * width;
        product.sums = way.points ? sums + point * product.tiles * width : y + tile * width_ + panel;
        product.sums_stride = way.points ? width : width_;
        kernels.images->tile_product(product);
      }
      if (way.points) kernels.images->from_points(sums, width, product.tiles, y + tile * kTileOutputs * width_ + panel, width_);
    }
    weights += of_panel * width;
  }
}

// Rows [begin, end) of one image's outputs; false where points cannot take its numbers. Rows of the input and of outputs are kept
// for as long as windows reach them.
bool FloatConvolution::band(const Kernels& kernels, const Batch& batch, int64_t image, const Way& way, const Pooling& pooling, bool clip,
                            int64_t begin, int64_t end, float* y) const {
  const Window& w = window_;
  const int64_t columns = w.columns(batch.width), rows = w.rows(batch.height), pooled = pooling.columns(columns);
  const int64_t pixels = way.tiles * (way.points ? kTileOutputs : 1), of_row = std::max(pixels, pooled) * width_;
  const int64_t read = std::max((way.tiles * kTileOutputs + kTileTaps - 1) * way.stride, w.padded_width(batch.width) * w.channels);
  const int64_t padded_floats = round_up(read + kBeyond, 16), input_floats = w.kernel_h * way.row_floats;
  float* padded = scratch_of<Rows, float>(padded_floats + input_floats + (pooling.kernel_h + 1) * of_row);
  float *inputs = padded + padded_floats, *outputs = inputs + input_floats, *wide = outputs + pooling.kernel_h * of_row;
  std::memset(padded, 0, static_cast<size_t>(padded_floats + input_floats) * 4);
  float* sums = scratch_of<Sums, float>(kTilePoints * kTilesAtOnce * kPanel);
  const float *window_rows[kMostRows], *pool_rows[kMostRows];
  const bool narrow = pooling.kernel_w == 1 && pooling.stride_w == 1;
  PoolColumns along = {wide, columns, width_, width_, pooling.kernel_w, pooling.stride_w, pooling.padding_w, pooled, nullptr};
  PoolRows across = {pool_rows, 0, pooled, w.outputs, bias_.get(), clip, nullptr};
  int64_t loaded = 0, done = 0;
  for (int64_t i = begin; i < end; i++) {
    const int64_t at = i * pooling.stride_h - pooling.padding_h;
    const int64_t from = std::max<int64_t>(at, 0), to = std::min(at + pooling.kernel_h, rows);
    for (done = std::max(done, from); done < to; done++) {
      const int64_t top = done * w.stride_h - w.top;
      const int64_t lowest = std::clamp<int64_t>(top, 0, batch.height), highest = std::clamp<int64_t>(top + w.kernel_h, 0, batch.height);
      for (loaded = std::max(loaded, lowest); loaded < highest; loaded++)
        if (!load_row(kernels, batch, image, loaded, way, padded, inputs + loaded % w.kernel_h * way.row_floats)) return false;
      for (int64_t r = lowest; r < highest; r++) window_rows[r - lowest] = inputs + r % w.kernel_h * way.row_floats;
      along.y = outputs + done % pooling.kernel_h * of_row;
      convolve_row(kernels, way, window_rows, highest > lowest ? lowest - top : 0, highest - lowest, sums, narrow ? along.y : wide);
      if (!narrow) kernels.images->pool_columns(along);
    }
    for (int64_t r = from; r < to; r++) pool_rows[r - from] = outputs + r % pooling.kernel_h * of_row;
    across.count = to - from, across.y = y + i * pooled * w.outputs;
    kernels.images->pool_rows(across);
  }
  return true;
}

void FloatConvolution::run(const Kernels& kernels, const Batch& batch, const Pooling& pooling, bool clip, float* y, int threads) const {
  const Window& w = window_;
  const int64_t rows = pooling.rows(w.rows(batch.height)), total = batch.images * rows;
  const int64_t of_image = rows * pooling.columns(w.columns(batch.width)) * w.outputs;
  std::vector<std::atomic<bool>> directly(static_cast<size_t>(batch.images));
  for (auto& image : directly) image = !points_;
  const auto pass = [&](bool points) {
    // As few bands as there are threads: where two meet, rows are computed twice.
    parallel_for(threads, total, (total + threads - 1) / threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin, last; i < end; i = last) {
        const int64_t image = i / rows;
        last = std::min(end, (image + 1) * rows);
        std::atomic<bool>& direct = directly[static_cast<size_t>(image)];
        if (direct == points) continue;
        if (!band(kernels, batch, image, way(points, batch.width), pooling, clip, i - image * rows, last - image * rows, y + image * of_image))
          direct = true;
      }
    });
  };
  if (points_) pass(true);
  if (std::any_of(directly.begin(), directly.end(), [](const std::atomic<bool>& image) { return image.load(); })) pass(false);
}

void max_pool(const Kernels& kernels, const float* x, int64_t images, int64_t height, int64_t width, int64_t channels, const Pooling& pooling,
              float* y, int threads) {
  const int64_t rows = pooling.rows(height), columns = pooling.columns(width), of_row = columns * round_up(channels, 16);
  parallel_for(threads, images * rows, 1, [&](int64_t begin, int64_t end, int) {
    float* pooled = scratch_of<Rows, float>(pooling.kernel_h * of_row);
    const float* window[kMostRows];
    PoolColumns along = {nullptr, width, channels, channels, pooling.kernel_w, pooling.stride_w, pooling.padding_w, columns, nullptr};
    PoolRows across = {window, 0, columns, channels, nullptr, false, nullptr};
    int64_t done = 0;  // rows of all images
    for (int64_t i = begin; i < end; i++) {
      const int64_t image = i / rows * height, top = image + i % rows * pooling.stride_h - pooling.padding_h;
      const int64_t from = std::max(top, image), to = std::min(top + pooling.kernel_h, image + height);
      for (done = std::max(done, from); done < to; done++) {
        along.x = x + done * width * channels, along.y = pooled + done % pooling.kernel_h * of_row;
        kernels.images->pool_columns(along);
      }
      for (int64_t r = from; r < to; r++) window[r - from] = pooled + r % pooling.kernel_h * of_row;
      across.count = to - from, across.y = y + i * columns * channels;
      kernels.images->pool_rows(across);
    }
  });
}

}  // namespace bitbell
