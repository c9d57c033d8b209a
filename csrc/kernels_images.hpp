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
  constexpr int kTwo = kSumVectors < 2 ? 1 : 2, kThree = kSumVectors < 3 ? 1 : 3;
  int64_t column = 0;
  for (; column + 16 * kSumVectors <= p.width; column += 16 * kSumVectors) all_tiles<kSumVectors>(p, column);
  switch ((p.width - column) / 16) {
    case 3: return all_tiles<kThree>(p, column);
    case 2: return all_tiles<kTwo>(p, column);
    case 1: return all_tiles<1>(p, column);
  }
}

// ------------------------------------------------------------------------------------------------------- Winograd
// Five neighbouring outputs of four taps from eight products, by polynomials at 0, 1, -1, 2, -2, 1/2, -1/2 and infinity
// (Winograd 1980; Lavin and Gray, arXiv 1509.09308). Filters: images.cpp.

// Lanes of one run; or, of runs of 8 at most, of two tiles' in halves.
template <bool kPair>
INLINE F16 load_runs(const float* x, int64_t tile) {
  if (!kPair) return load(x);
  F16 v;
#if defined(__AVX512F__)
  v.part[0] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(x)), _mm256_loadu_ps(x + tile), 1);
#else
  for (int i = 0; i < kParts; i++)
    std::memcpy(&v.part[i], x + (2 * i < kParts ? 0 : tile) + i * kPartLanes % 8, sizeof v.part[i]);
#endif
  return v;
}
template <bool kPair>
INLINE void store_runs(float* out, int64_t run, F16 v) {
  if (!kPair) return store(out, v);
#if defined(__AVX512F__)
  _mm256_storeu_ps(out, _mm512_castps512_ps256(v.part[0]));
  _mm256_storeu_ps(out + run, _mm512_extractf32x8_ps(v.part[0], 1));
#else
  for (int i = 0; i < kParts; i++) std::memcpy(out + (2 * i < kParts ? 0 : run) + i * kPartLanes % 8, &v.part[i], sizeof v.part[i]);
#endif
}

// What is written beyond a run is overwritten by the next.
template <bool kPair>
INLINE void tile_to_points(const float* x, int64_t run, float* out, int64_t plane) {
  F16 d[kTilePoints];
#pragma GCC unroll 8
  for (int i = 0; i < kTilePoints; i++) d[i] = load_runs<kPair>(x + i * run, kTileOutputs * run);
  const auto put = [&](int point, F16 v) { store_runs<kPair>(out + point * plane, run, v); };
  const auto pair = [&](int point, F16 even, F16 odd) { put(point, even + odd), put(point + 1, even - odd); };
  put(0, scaled(d[4] - d[2], 5.25f, d[0] - d[6]));
  pair(1, scaled(d[4], -4.25f, d[2] + d[6]), scaled(d[3], -4.25f, d[1] + d[5]));
  pair(3, scaled(d[4], -1.25f, scaled(d[2], 0.25f, d[6])), scaled(d[5], 2.0f, scaled(d[3], -2.5f, d[1] * 0.5f)));
  pair(5, scaled(d[4], -5.0f, scaled(d[2], 4.0f, d[6])), scaled(d[5], 0.5f, scaled(d[3], -2.5f, d[1] * 2.0f)));
  put(7, scaled(d[3] - d[5], 5.25f, d[7] - d[1]));
}

void to_points(const float* x, int64_t run, int64_t tiles, float* out, int64_t plane) {
  int64_t tile = 0;
  for (; run <= 8 && tile + 2 <= tiles; tile += 2) tile_to_points<true>(x + tile * kTileOutputs * run, run, out + tile * run, plane);
  for (; tile < tiles; tile++)
    for (int64_t lane = 0; lane < run; lane += 16) tile_to_points<false>(x + tile * kTileOutputs * run + lane, run, out + tile * run + lane, plane);
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
INLINE void pool_window(const float* x, int64_t pixel, int64_t count, int64_t lanes, float* y) {
  const auto vector = [=](int64_t i, int j) { return lanes < 16 ? load_part(x + i * pixel, lanes, 0) : load(x + i * pixel + 16 * j); };
  F16 most[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; j++) most[j] = vector(0, j);
  for (int64_t i = 1; i < count; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) most[j] = larger_or_nan(vector(i, j), most[j]);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; j++) store(y + 16 * j, most[j]);
}

void pool_columns(const PoolColumns& p) {
  float* y = p.y;
  for (int64_t i = 0; i < p.outputs; i++) {
    const int64_t first = i * p.stride - p.padding, begin = first < 0 ? 0 : first;
    const int64_t end = first + p.kernel < p.columns ? first + p.kernel : p.columns;
    const float* x = p.x + begin * p.pixel;
    int64_t channel = 0;
    for (; channel + 64 <= p.channels; channel += 64, y += 64) pool_window<4>(x + channel, p.pixel, end - begin, 16, y);
    for (; channel + 16 <= p.channels; channel += 16, y += 16) pool_window<1>(x + channel, p.pixel, end - begin, 16, y);
    if (channel < p.channels) pool_window<1>(x + channel, p.pixel, end - begin, p.channels - channel, y), y += 16;
  }
}

void pool_rows(const PoolRows& p) {
  int64_t at = 0;
  for (int64_t i = 0; i < p.columns; i++)
    for (int64_t channel = 0; channel < p.channels; channel += 16, at += 16) {
      const int64_t lanes = p.channels - channel;
      F16 most = load(p.rows[0] + at);
      for (int64_t row = 1; row < p.count; row++) most = larger_or_nan(load(p.rows[row] + at), most);
      if (p.bias) most += lanes < 16 ? load_part(p.bias + channel, lanes, 0) : load(p.bias + channel);
      if (p.clip) most = select(most < all(0), all(0), most);
      float* y = p.y + i * p.channels + channel;
      if (lanes < 16) store_part(y, most, lanes);
      else store(y, most);
    }
}

// ----------------------------------------------------------------------------------------------------------- head

constexpr int64_t kRowsAtOnce = 64;  // so that sums of many rows round little

void means(const float* x, int64_t rows, int64_t n, float* y) {
  for (int64_t column = 0; column < n; column += 16) {
    const int64_t lanes = n - column;
    F16 total = {};
    for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
      F16 sum = {};
      for (int64_t i = first; i < rows && i < first + kRowsAtOnce; i++)
        sum += lanes < 16 ? load_part(x + i * n + column, lanes, 0) : load(x + i * n + column);
      total += sum;
    }
    total = total / all(static_cast<float>(rows));
    if (lanes < 16) store_part(y + column, total, lanes);
    else store(y + column, total);
  }
}

// As fast as memory gives: the row after the next is asked for ahead.
void matrix_rows(const float* matrix, const float* bias, int64_t rows, int64_t k, int64_t first, int64_t count, const float* x, int64_t m,
                 float* y) {
  for (int64_t row = first; row < first + count; row++) {
    for (int64_t j = 0; j < k; j += 16) __builtin_prefetch(matrix + (row + 2) * k + j);
    for (int64_t i = 0; i < m; i++) y[i * rows + row] = dot(matrix + row * k, x + i * k, k) + (bias ? bias[row] : 0.0f);
  }
}

constexpr ImageKernels kImages = {tile_product, to_points, from_points, all_within, pool_columns, pool_rows, means, matrix_rows};

}  // namespace
}  // namespace bitbell
