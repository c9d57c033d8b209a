#include "images.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.hpp"
#include "scratch.hpp"

namespace bitbell {
namespace {

constexpr int64_t kPanel = 64;          // outputs that are summed at a time
constexpr int64_t kTilesAtOnce = 12;    // whose sums the nearest cache holds
constexpr float kLimit = 0x1p50f;       // of pixels and weights: sums of their products, and of points', are finite
constexpr double kPoints[] = {0, 1, -1, 2, -2, 0.5, -0.5};  // and infinity

// What the taps' products with 1, a, a**2, ... at a point are divided by.
double divisor_of(int point) {
  double d = point == 0 ? -1 : 1;
  for (int i = 0; i < 7; i++)
    if (i != point) d *= kPoints[point] - kPoints[i];
  return d;
}

struct Rings {};
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

// Panels of at most 64 outputs: (points,) kernel rows, taps and channels of a row, outputs. Points sum over phases of the stride
// instead of taps.
FloatConvolution::Floats FloatConvolution::arrange(const float* weight, bool points) const {
  const Window& w = window_;
  const int64_t taps = points ? w.stride_w : w.kernel_w, planes = points ? kTilePoints : 1;
  const size_t count = static_cast<size_t>(planes * w.kernel_h * taps * w.channels * width_);
  Floats out(new (std::align_val_t(64)) float[count]());
  float* to = out.get();
  for (int64_t panel = 0; panel < width_; panel += kPanel)
    for (int64_t point = 0; point < planes; point++)
      for (int64_t row = 0; row < w.kernel_h; row++)
        for (int64_t tap = 0; tap < taps; tap++)
          for (int64_t channel = 0; channel < w.channels; channel++, to += panel_width(panel))
            for (int64_t i = 0; i < std::min(kPanel, w.outputs - panel); i++) {
              const float* filter = weight + (((panel + i) * w.channels + channel) * w.kernel_h + row) * w.kernel_w;
              if (!points) {
                to[i] = filter[tap];
                continue;
              }
              double sum = 0, power = 1;
              for (int64_t p = 0; p < kTileTaps; p++, power *= point < 7 ? kPoints[point] : 0) {
                const int64_t column = p * w.stride_w + tap;
                const double value = column < w.kernel_w ? filter[column] : 0;
                sum += point < 7 ? value * power / divisor_of(static_cast<int>(point)) : p == kTileTaps - 1 ? value : 0;
              }
              to[i] = static_cast<float>(sum);
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

// A row of the image with zeros around it, and, for points, transformed. padded: zero where no pixel is written.
void FloatConvolution::load_row(const Kernels& kernels, const Batch& batch, int64_t image, int64_t row, const Way& way, float* padded,
                                float* out) const {
  const int64_t channels = window_.channels, plane = batch.height * batch.width;
  float* to = (way.points ? padded : out) + window_.left * channels;
  const float* x = batch.x + image * plane * channels + row * batch.width * (batch.channels_last ? channels : 1);
  if (batch.channels_last) {
    std::memcpy(to, x, static_cast<size_t>(batch.width * channels) * 4);
  } else {
    for (int64_t i = 0; i < batch.width; i++)
      for (int64_t channel = 0; channel < channels; channel++) to[i * channels + channel] = x[channel * plane + i];
  }
  if (way.points) kernels.images->to_points(padded, way.run, way.tiles, out, way.tiles * way.run + kBeyond);
}

// Sums of one row of outputs, without bias. rows: of the kernel, `count` of which, from `first` on, lie in the image.
void FloatConvolution::convolve_row(const Kernels& kernels, const Way& way, const float* const* rows, int64_t first, int64_t count, float* sums,
                                    float* y) const {
  const int64_t planes = way.points ? kTilePoints : 1, of_row = way.run, of_point = window_.kernel_h * of_row;
  const float* weights = way.points ? points_.get() : direct_.get();
  std::vector<const float*> at(static_cast<size_t>(count));
  for (int64_t panel = 0; panel < width_; panel += kPanel) {
    const int64_t width = panel_width(panel);
    const int64_t step = way.points ? kTilesAtOnce : way.tiles;
    for (int64_t tile = 0; tile < way.tiles; tile += step) {
      TileProduct product;
      product.width = width, product.count = count, product.run = way.run, product.stride = way.stride;
      product.tiles = std::min(step, way.tiles - tile), product.rows = at.data();
      for (int64_t point = 0; point < planes; point++) {
        const int64_t skip = (way.points ? point * (way.tiles * way.run + kBeyond) : 0) + tile * way.stride;
        for (int64_t i = 0; i < count; i++) at[static_cast<size_t>(i)] = rows[first + i] + skip;
        product.w = weights + (point * of_point + first * of_row) * width;
        product.sums = way.points ? sums + point * product.tiles * width : y + tile * width_ + panel;
        product.sums_stride = way.points ? width : width_;
        kernels.images->tile_product(product);
      }
      if (way.points) kernels.images->from_points(sums, width, product.tiles, y + tile * kTileOutputs * width_ + panel, width_);
    }
    weights += planes * of_point * width;
  }
}

// Rows [begin, end) of one image's outputs. Rows of the input and of sums are kept for as long as windows reach them.
void FloatConvolution::band(const Kernels& kernels, const Batch& batch, int64_t image, const Way& way, const Pooling& pooling, bool clip,
                            int64_t begin, int64_t end, float* y) const {
  const Window& w = window_;
  const int64_t columns = w.columns(batch.width), rows = w.rows(batch.height), pooled = pooling.columns(columns);
  const int64_t sum_row = (way.tiles * (way.points ? kTileOutputs : 1)) * width_;
  const int64_t padded_floats = round_up(std::max((way.tiles * kTileOutputs + kTileTaps - 1) * way.stride, w.padded_width(batch.width) * w.channels) + kBeyond, 16);
  float* padded = scratch_of<Rings, float>(padded_floats + w.kernel_h * way.row_floats + pooling.kernel_h * sum_row);
  float *inputs = padded + padded_floats, *outputs = inputs + w.kernel_h * way.row_floats;
  std::memset(padded, 0, static_cast<size_t>(padded_floats + w.kernel_h * way.row_floats) * 4);
  float* sums = scratch_of<Sums, float>(kTilePoints * kTilesAtOnce * kPanel);
  std::vector<const float*> window_rows(static_cast<size_t>(w.kernel_h)), pool_rows(static_cast<size_t>(pooling.kernel_h));
  int64_t loaded = 0, summed = 0;
  PoolRow row;
  row.columns = columns, row.pixel = width_, row.kernel = pooling.kernel_w, row.stride = pooling.stride_w;
  row.padding = pooling.padding_w, row.outputs = pooled, row.channels = w.outputs, row.bias = bias_.get(), row.clip = clip;
  row.rows = pool_rows.data();
  for (int64_t i = begin; i < end; i++) {
    const int64_t at = i * pooling.stride_h - pooling.padding_h;
    const int64_t from = std::max<int64_t>(at, 0), to = std::min(at + pooling.kernel_h, rows);
    for (summed = std::max(summed, from); summed < to; summed++) {
      const int64_t top = summed * w.stride_h - w.top;
      const int64_t lowest = std::clamp<int64_t>(top, 0, batch.height), highest = std::clamp<int64_t>(top + w.kernel_h, 0, batch.height);
      for (loaded = std::max(loaded, lowest); loaded < highest; loaded++)
        load_row(kernels, batch, image, loaded, way, padded, inputs + loaded % w.kernel_h * way.row_floats);
      for (int64_t r = lowest; r < highest; r++) window_rows[static_cast<size_t>(r - top)] = inputs + r % w.kernel_h * way.row_floats;
      const int64_t first = highest > lowest ? lowest - top : 0;
      convolve_row(kernels, way, window_rows.data(), first, highest - lowest, sums, outputs + summed % pooling.kernel_h * sum_row);
    }
    for (int64_t r = from; r < to; r++) pool_rows[static_cast<size_t>(r - from)] = outputs + r % pooling.kernel_h * sum_row;
    row.count = to - from, row.y = y + i * pooled * w.outputs;
    kernels.images->pool_row(row);
  }
}

void FloatConvolution::run(const Kernels& kernels, const Batch& batch, const Pooling& pooling, bool clip, float* y, int threads) const {
  const Window& w = window_;
  const int64_t pixels = batch.height * batch.width * w.channels, rows = pooling.rows(w.rows(batch.height));
  const int64_t of_image = rows * pooling.columns(w.columns(batch.width)) * w.outputs, total = batch.images * rows;
  std::vector<char> within(static_cast<size_t>(batch.images), 0);
  if (points_)
    parallel_for(threads, batch.images, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; i++) within[static_cast<size_t>(i)] = kernels.images->all_within(batch.x + i * pixels, pixels, kLimit);
    });
  // As few bands as there are threads: where two meet, rows are computed twice.
  parallel_for(threads, total, (total + threads - 1) / threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end;) {
      const int64_t image = i / rows, last = std::min(end, (image + 1) * rows);
      const Way how = way(within[static_cast<size_t>(image)], batch.width);
      band(kernels, batch, image, how, pooling, clip, i - image * rows, last - image * rows, y + image * of_image);
      i = last;
    }
  });
}

void max_pool(const Kernels& kernels, const float* x, int64_t images, int64_t height, int64_t width, int64_t channels, const Pooling& pooling,
              bool clip, float* y, int threads) {
  const int64_t rows = pooling.rows(height), columns = pooling.columns(width);
  parallel_for(threads, images * rows, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<const float*> window(static_cast<size_t>(pooling.kernel_h));
    PoolRow row;
    row.columns = width, row.pixel = row.channels = channels, row.kernel = pooling.kernel_w, row.stride = pooling.stride_w;
    row.padding = pooling.padding_w, row.outputs = columns, row.clip = clip, row.rows = window.data();
    for (int64_t i = begin; i < end; i++) {
      const int64_t image = i / rows, top = i % rows * pooling.stride_h - pooling.padding_h;
      row.count = 0;
      for (int64_t r = std::max<int64_t>(top, 0); r < std::min(top + pooling.kernel_h, height); r++)
        window[static_cast<size_t>(row.count++)] = x + (image * height + r) * width * channels;
      row.y = y + i * columns * channels;
      kernels.images->pool_row(row);
    }
  });
}

}  // namespace bitbell
