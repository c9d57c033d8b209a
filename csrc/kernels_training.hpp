// Rows of a training step: quantized, given their outputs, and given BBQ's gradient. As in kernels_floats.hpp, lanes and
// order are the same at every level. Tensors come in float32 or bfloat16; all arithmetic is in float32.
#pragma once
#include "kernels_floats.hpp"

namespace bitbell {
namespace {

// x as float32 in `out`, zero from k to padded_k(k).
void widen_row(const void* x, int type, int64_t k, float* out) {
  if (type == kBfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < k; i++) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  } else {
    std::memcpy(out, x, static_cast<size_t>(k) * 4);
  }
  for (int64_t i = k; i < padded_k(k); i++) out[i] = 0;
}

// The float32 numbers h in `type`, rounded to even; NaN stays NaN.
void narrow_row(const float* h, int64_t k, void* out, int type) {
  if (type != kBfloat16) {
    std::memcpy(out, h, static_cast<size_t>(k) * 4);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t i = 0; i < k; i++) {
    uint32_t bits;
    std::memcpy(&bits, h + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

void rotate_row(const void* x, int type, int64_t k, int64_t block, float* h) {
  if (type == kBfloat16 || block == 1) {
    widen_row(x, type, k, h);
    rotate(h, h, k, block);
    return;
  }
  rotate(static_cast<const float*>(x), h, k, block);
  for (int64_t i = k; i < padded_k(k); i++) h[i] = 0;
}

float squares_of_row(const void* x, int type, int64_t k, float* h) {
  widen_row(x, type, k, h);
  F16 s[4] = {};
  for (int64_t i = 0; i < padded_k(k); i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const F16 v = load(h + i + 16 * j);
      s[j] += v * v;
    }
  return sum_of((s[0] + s[1]) + (s[2] + s[3]));
}

void quantize_row(const InputPlan& plan, const void* x, int type, int64_t k, int8_t* codes, float* step, float* h, void* kept,
                  int kept_type) {
  rotate_row(x, type, k, plan.rotation, h);
  InputPlan bare = plan;
  bare.rotation = 1;
  int32_t sum;
  quantize(bare, h, k, codes, step, &sum, h);
  if (kept) narrow_row(h, k, kept, kept_type);
}

int32_t sum_of_codes(const int8_t* codes, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; i++) sum += codes[i];
  return sum;
}

// exp(-w**2 / 2), as 2**n 2**r with |r| <= 1/2; about 2 ulp, 2**-126 at the least, NaN of NaN.
INLINE F16 bell(F16 w) {
  const F16 asked = w * w * -0.72134752f, least = all(-126.0f), t = select(least > asked, least, asked);
  const F16 placed = t + 12582912.0f, r = t - (placed - 12582912.0f);  // adding 1.5 * 2**23 leaves no bits below one
  F16 p = all(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 0.24022651f;
  p = p * r + 0.69314718f;
  p = p * r + 1.0f;
  return p * as_floats((as_integers(placed) << 23) + 0x3f800000);
}

// v, u, and the sums of their product and of levels and g, from codes of 8 bits.
void bell_slopes_of_bins(const BellRow& row, float* v, float* u, float* along, float* levels) {
  widen_row(row.g, row.g_type, row.k, u);
  F16 a = {}, l = {};
  for (int64_t i = 0; i < row.k; i += 16) {
    float place[16] = {}, slope[16] = {}, level[16] = {};
    const int64_t count = row.k - i < 16 ? row.k - i : 16;
    for (int64_t j = 0; j < count; j++) {
      const int bin = row.codes[i + j] + 128;
      place[j] = row.bins[bin], slope[j] = row.bins[256 + bin], level[j] = row.bins[512 + bin];
    }
    const F16 g = load(u + i), w = load(place), s = load(slope) * g;
    l += load(level) * g;
    a += s * w;
    store(v + i, w);
    store(u + i, s);
  }
  for (int64_t i = round_up(row.k, 16); i < padded_k(row.k); i++) v[i] = 0;
  *along = sum_of(a);
  *levels = sum_of(l);
}

// v = h / size and u = exp(-v**2 / 2) g, with their product's sum and that of levels and g.
void bell_slopes(const BellRow& row, float* v, float* u, float* along, float* levels) {
  if (row.bins) return bell_slopes_of_bins(row, v, u, along, levels);
  const int64_t k = row.k, padded = padded_k(k);
  rotate_row(row.h, row.h_type, k, row.rotation, v);
  widen_row(row.g, row.g_type, k, u);
  int8_t last[64] = {};
  F16 a[2] = {}, l[2] = {};
  for (int64_t i = 0; i < padded; i += 64) {
    const int8_t* codes = row.codes + i;
    if (i + 64 > k) codes = static_cast<const int8_t*>(std::memcpy(last, codes, static_cast<size_t>(k - i)));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const F16 g = load(u + i + 16 * j), w = load(v + i + 16 * j) * row.inverse_size;
      const F16 slope = bell(w) * g;
      const F16 level = convert<float>(convert<int32_t>(load_lanes(codes + 16 * j))) - row.zero_point;
      l[j & 1] += level * g;
      a[j & 1] += slope * w;
      store(v + i + 16 * j, w);
      store(u + i + 16 * j, slope);
    }
  }
  *along = sum_of(a[0] + a[1]);
  *levels = sum_of(l[0] + l[1]);
}

// out = rotate(factor (u - v mean)), in place of u on the way.
void bell_gradient(const float* v, float* u, int64_t k, float factor, float mean, int64_t rotation, void* out, int type) {
  for (int64_t i = 0; i < padded_k(k); i += 16) store(u + i, (load(u + i) - load(v + i) * mean) * factor);
  rotate(u, u, k, rotation);
  narrow_row(u, k, out, type);
}

// y = (codes . codes - z_w sum(x) - z_x sum(w) + K z_x z_w) * step_w * step_x
void output_row(const ProductRow& row, const int32_t* acc, int32_t x_sum, float x_step, float* scratch, void* y) {
  const double base = row.k * row.x_zero * row.w_zero - row.w_zero * x_sum;
  if (row.fits_quarters) {  // half-integer zero points: four times the sum is an integer
    const int32_t plus = static_cast<int32_t>(4 * base), zero = static_cast<int32_t>(4 * row.x_zero);
    for (int64_t i = 0; i < row.outputs; i++)
      scratch[i] = static_cast<float>(4 * acc[i] + (plus - zero * row.w_sums[i])) * 0.25f * row.w_step[i] * x_step;
  } else {
    for (int64_t i = 0; i < row.outputs; i++)
      scratch[i] = static_cast<float>(acc[i] + (base - row.x_zero * row.w_sums[i])) * row.w_step[i] * x_step;
  }
  narrow_row(scratch, row.outputs, y, row.type);
}

const TrainingKernels kTraining = {squares_of_row, quantize_row, sum_of_codes, bell_slopes, bell_gradient, output_row};

}  // namespace
}  // namespace bitbell
