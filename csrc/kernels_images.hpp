// Convolutions of floats over images of few channels, and pooling. Written once in vectors of 16 lanes; sums are taken in one
// order everywhere, and levels with fused multiplications (all but the portable one) give the same bits.
#pragma once
#include "kernels_floats.hpp"

namespace bitbell {
namespace {

INLINE F16 scaled(F16 x, float factor, F16 plus) { return multiply_add(x, all(factor), plus); }

// ------------------------------------------------------------------------------------------------------- products

template <int kRows, int kVectors>
void tile_sums(const TileProduct& p, int64_t tile, int64_t column) {
  F16 sum[kRows][kVectors] = {};
  const float* w = p.w + column;
  for (int64_t row = 0; row < p.count; row++) {
    const float* x = p.rows[row] + tile * p.stride;
    for (int64_t i = 0; i < p.run; i++, w += p.width) {
      F16 weight[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) weight[j] = load(w + 16 * j);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; r++) {
        const F16 q = all(x[r * p.stride + i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) sum[r][j] = multiply_add(weight[j], q, sum[r][j]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) store(p.sums + (tile + r) * p.sums_stride + column + 16 * j, sum[r][j]);
}

template <int kVectors>
void all_tiles(const TileProduct& p, int64_t column) {
  int64_t tile = 0;
  for (; tile + kSumRows <= p.tiles; tile += kSumRows) tile_sums<kSumRows, kVectors>(p, tile, column);
  switch (p.tiles - tile) {
    case 5: return tile_sums<5, kVectors>(p, tile, column);
    case 4: return tile_sums<4, kVectors>(p, tile, column);
    case 3: return tile_sums<3, kVectors>(p, tile, column);
    case 2: return tile_sums<2, kVectors>(p, tile, column);
    case 1: return tile_sums<1, kVectors>(p, tile, column);
  }
}

void tile_product(const TileProduct& p) {
  int64_t column = 0;
  for (; kSumVectors == 4 && column + 64 <= p.width; column += 64) all_tiles<kSumVectors>(p, column);
  for (; column < p.width; column += 16) all_tiles<1>(p, column);
}

// ------------------------------------------------------------------------------------------------------- Winograd
// Five neighbouring outputs of four taps from eight products, by polynomials at 0, 1, -1, 2, -2, 1/2, -1/2 and infinity
// (Winograd 1980; Lavin and Gray, arXiv 1509.09308). Filters: images.cpp.

void to_points(const float* x, int64_t run, int64_t tiles, float* out, int64_t plane) {
  for (int64_t tile = 0; tile < tiles; tile++, x += kTileOutputs * run, out += run)
    for (int64_t lane = 0; lane < run; lane += 16) {  // what is written beyond a run is overwritten by the next
      F16 d[kTilePoints];
#pragma GCC unroll 8
      for (int i = 0; i < kTilePoints; i++) d[i] = load(x + i * run + lane);
      const auto put = [&](int point, F16 v) { store(out + point * plane + lane, v); };
      const auto pair = [&](int point, F16 even, F16 odd) { put(point, even + odd), put(point + 1, even - odd); };
      put(0, scaled(d[4] - d[2], 5.25f, d[0] - d[6]));
      pair(1, scaled(d[4], -4.25f, d[2] + d[6]), scaled(d[3], -4.25f, d[1] + d[5]));
      pair(3, scaled(d[4], -1.25f, scaled(d[2], 0.25f, d[6])), scaled(d[5], 2.0f, scaled(d[3], -2.5f, d[1] * 0.5f)));
      pair(5, scaled(d[4], -5.0f, scaled(d[2], 4.0f, d[6])), scaled(d[5], 0.5f, scaled(d[3], -2.5f, d[1] * 2.0f)));
      put(7, scaled(d[3] - d[5], 5.25f, d[7] - d[1]));
    }
}

void from_points(const float* sums, int64_t width, int64_t tiles, float* y, int64_t pixel) {
  const int64_t plane = tiles * width;
  for (int64_t tile = 0; tile < tiles; tile++, sums += width, y += kTileOutputs * pixel)
    for (int64_t lane = 0; lane < width; lane += 16) {
      F16 m[kTilePoints];
#pragma GCC unroll 8
      for (int i = 0; i < kTilePoints; i++) m[i] = load(sums + i * plane + lane);
      const F16 even1 = m[1] + m[2], even2 = m[3] + m[4], even3 = m[5] + m[6];
      const F16 odd1 = m[1] - m[2], odd2 = m[3] - m[4], odd3 = m[5] - m[6];
      float* to = y + lane;
      store(to, (m[0] + even1) + (even2 + even3));
      store(to + pixel, scaled(odd3, 0.5f, scaled(odd2, 2.0f, odd1)));
      store(to + 2 * pixel, scaled(even3, 0.25f, scaled(even2, 4.0f, even1)));
      store(to + 3 * pixel, scaled(odd3, 0.125f, scaled(odd2, 8.0f, odd1)));
      store(to + 4 * pixel, scaled(even3, 0.0625f, scaled(even2, 16.0f, even1 + m[7])));
    }
}

bool all_within(const float* x, int64_t n, float limit) {
  I16 within = all(0) == all(0);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) within = within & (all(limit) >= magnitude(load(x + i)));
  if (i < n) within = within & (all(limit) >= magnitude(load_part(x + i, n - i, 0)));
  return sum_of(within) == -16;
}

// -------------------------------------------------------------------------------------------------------- pooling

INLINE F16 larger_number(F16 a, F16 b) {  // b where one is NaN
#if defined(__AVX512F__)
  a.part[0] = _mm512_max_ps(a.part[0], b.part[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; i++) a.part[i] = _mm256_max_ps(a.part[i], b.part[i]);
#else
  a = select(a > b, a, b);
#endif
  return a;
}

// NaN where one is NaN: the bits of a number and of NaN together are NaN.
INLINE F16 larger_or_nan(F16 a, F16 b) { return as_floats(as_integers(larger_number(a, b)) | as_integers(larger_number(b, a))); }

template <int kVectors>
INLINE void pool_window(const PoolRow& p, int64_t begin, int64_t end, int64_t channel, int64_t count, float* y) {
  F16 most[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; j++) most[j] = all(-INFINITY);
  for (int64_t row = 0; row < p.count; row++)
    for (int64_t column = begin; column < end; column++) {
      const float* x = p.rows[row] + column * p.pixel + channel;
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) most[j] = larger_or_nan(count < 16 ? load_part(x, count, 0) : load(x + 16 * j), most[j]);
    }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; j++) {
    const int64_t at = channel + 16 * j;
    if (p.bias) most[j] += count < 16 ? load_part(p.bias + at, count, 0) : load(p.bias + at);
    if (p.clip) most[j] = select(most[j] < all(0), all(0), most[j]);
    if (count < 16) store_part(y + at, most[j], count);
    else store(y + at, most[j]);
  }
}

void pool_row(const PoolRow& p) {
  for (int64_t i = 0; i < p.outputs; i++) {
    const int64_t first = i * p.stride - p.padding, begin = first < 0 ? 0 : first;
    const int64_t end = first + p.kernel < p.columns ? first + p.kernel : p.columns;
    float* y = p.y + i * p.channels;
    int64_t channel = 0;
    for (; channel + 64 <= p.channels; channel += 64) pool_window<4>(p, begin, end, channel, 16, y);
    for (; channel + 16 <= p.channels; channel += 16) pool_window<1>(p, begin, end, channel, 16, y);
    if (channel < p.channels) pool_window<1>(p, begin, end, channel, p.channels - channel, y);
  }
}

constexpr ImageKernels kImages = {tile_product, to_points, from_points, all_within, pool_row};

}  // namespace
}  // namespace bitbell
