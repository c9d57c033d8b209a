// The float side of every level: rotation, quantization, epilogue, and the small operations of a transformer. Written
// once in vectors of 16 lanes; lanes, order and rounding are the same everywhere, so that every level gives the same bits
// (files are compiled with -ffp-contract=off). Everything has internal linkage: code of one instruction set must never be linked into another.
#pragma once
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "vectors.hpp"

namespace bitbell {
namespace {

INLINE F16 load(const float* p) { return load_lanes(p); }
INLINE F16 load_part(const float* p, int64_t count, float fill) {
  float lanes[16];
  store(lanes, all(fill));
  std::memcpy(lanes, p, static_cast<size_t>(count) * 4);
  return load(lanes);
}
INLINE void store_part(float* p, F16 v, int64_t count) {
  float lanes[16];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * 4);
}
INLINE F16 as_floats(I16 v) { return same_bits<float>(v); }
INLINE I16 as_integers(F16 v) { return same_bits<int32_t>(v); }
INLINE F16 larger(F16 a, F16 b) { return select(a > b, a, b); }
INLINE F16 smaller(F16 a, F16 b) { return select(a < b, a, b); }
INLINE F16 magnitude(F16 v) { return as_floats(as_integers(v) & 0x7fffffff); }

// Call `use` with the width that kernels are made for (1, 2, 3, 4 or 8) as a constant: use(Width<2>{}).
template <int kBits>
struct Width {
  static constexpr int value = kBits;
};
template <class Use>
INLINE void for_width(int bits, Use&& use) {
  switch (bits) {
    case 1: return use(Width<1>{});
    case 2: return use(Width<2>{});
    case 3: return use(Width<3>{});
    case 4: return use(Width<4>{});
    default: return use(Width<8>{});
  }
}

// The sum of 16 lanes, halves onto halves.
INLINE float sum_of(F16 v) {
  float a[16];
  store(a, v);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
}
INLINE float largest_of(F16 v) {
  float a[16];
  store(a, v);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}
INLINE int32_t sum_of(I16 v) {
  int32_t a[16], s = 0;
  store(a, v);
  for (int i = 0; i < 16; i++) s += a[i];
  return s;
}

// ---------------------------------------------------------------------------------------------------- rotation

// v[i ^ s] + v[i] in lanes without bit s, v[i ^ s] - v[i] in lanes with it. A product by 1 or -1 is not rounded.
template <int s>
INLINE F16 butterfly(F16 v) {
  float sign[16];
  for (int i = 0; i < 16; i++) sign[i] = i & s ? -1.0f : 1.0f;
  return multiply_add(v, load(sign), partners<s>(v));
}

// `kVectors` vectors hold one block, or several small ones; `block` as far as it lies within a vector.
template <int kVectors>
INLINE void transform(F16* v, int64_t block) {
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) {
    if (block > 1) v[i] = butterfly<1>(v[i]);
    if (block > 2) v[i] = butterfly<2>(v[i]);
    if (block > 4) v[i] = butterfly<4>(v[i]);
    if (block > 8) v[i] = butterfly<8>(v[i]);
  }
#pragma GCC unroll 3
  for (int h = 1; h < kVectors; h *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++)
      if (!(i & h)) {
        const F16 a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
}

template <int kVectors>
void rotate_blocks(const float* x, float* y, int64_t n, int64_t block, float factor) {
  for (int64_t i = 0; i < n; i += kVectors * 16) {
    F16 v[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) v[j] = load(x + i + 16 * j);
    transform<kVectors>(v, block);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) store(y + i + 16 * j, v[j] * factor);
  }
}

// Blocks beyond 128: the transform of 128 in place, then butterflies over memory, then the factor.
void rotate_wide(const float* x, float* y, int64_t n, int64_t block, float factor) {
  rotate_blocks<8>(x, y, n, 16, 1.0f);
  for (int64_t start = 0; start < n; start += block)
    for (int64_t h = 128; h < block; h *= 2)
      for (int64_t i = 0; i < block; i += 16)
        if (!(i & h)) {
          float* p = y + start + i;
          const F16 a = load(p), b = load(p + h);
          store(p, a + b);
          store(p + h, a - b);
        }
  for (int64_t i = 0; i < n; i += 16) store(y + i, load(y + i) * factor);
}

// n: a multiple of the block. Blocks of less than 16 may leave a part of a vector.
void rotate(const float* x, float* y, int64_t n, int64_t block) {
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  if (block == 1) {
    if (x != y) std::memmove(y, x, static_cast<size_t>(n) * 4);
    return;
  }
  if (block > 128) return rotate_wide(x, y, n, block, factor);
  if (block == 128) return rotate_blocks<8>(x, y, n, 16, factor);
  if (block == 64) return rotate_blocks<4>(x, y, n, 16, factor);
  if (block == 32) return rotate_blocks<2>(x, y, n, 16, factor);
  const int64_t whole = n / 16 * 16;
  rotate_blocks<1>(x, y, whole, block, factor);
  if (whole < n) {
    F16 v = load_part(x + whole, n - whole, 0);
    transform<1>(&v, block);
    store_part(y + whole, v * factor, n - whole);
  }
}

// ------------------------------------------------------------------------------------------------ quantization

float gather(Statistic statistic, const float* h, int64_t k) {
  F16 s[4] = {};
  const int64_t padded = padded_k(k);
  for (int64_t i = 0; i < padded; i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const F16 v = load(h + i + 16 * j);
      if (statistic == Statistic::rms) s[j] += v * v;
      else if (statistic == Statistic::absmean) s[j] += magnitude(v);
      else s[j] = larger(magnitude(v), s[j]);
    }
  if (statistic == Statistic::absmax) return largest_of(larger(larger(s[0], s[1]), larger(s[2], s[3])));
  return sum_of((s[0] + s[1]) + (s[2] + s[3]));
}

// Zero, or NaN if h holds NaN or infinity.
float trace_of_nan(const float* h, int64_t padded) {
  F16 s = {};
  for (int64_t i = 0; i < padded; i += 16) s += load(h + i) * 0.0f;
  return sum_of(s);
}

INLINE I16 put_codes(I16 code, int8_t* out) {
  store(out, convert<int8_t>(code));
  return code;
}

// code = how many of kCount thresholds are at most h, less half of the codes.
template <int kCount>
int32_t count_thresholds(const float* h, int64_t k, const float* thresholds, float scale, int8_t* out) {
  F16 t[kCount];
  for (int i = 0; i < kCount; i++) t[i] = all(thresholds[i] * scale);
  I16 sum = {};
  for (int64_t i = 0; i < k; i += 16) {
    const F16 v = load(h + i);
    I16 below = {};  // minus the count: a comparison that holds gives -1
#pragma GCC unroll 15
    for (int j = 0; j < kCount; j++) below += v >= t[j];
    sum += put_codes(-(kCount + 1) / 2 - below, out + i);
  }
  return sum_of(sum);
}

// tree[i] in each lane, i between 2**kLevel and 2**(kLevel+1) - 1.
template <int kLevel>
INLINE F16 entries_of(const float* tree, I16 i) {
  F16 found;
#if defined(__AVX512F__)
  // Tables of 32 in two registers, chosen from by the higher bits of i; instructions ignore the bits beyond theirs.
  const auto at = reinterpret_cast<__m512i>(i.part[0]);
  constexpr int kTables = kLevel < 5 ? 1 : 1 << (kLevel - 5);
  const float* first = tree + (kLevel < 4 ? 0 : 1 << kLevel);
  __m512 from[kTables];
#pragma GCC unroll 4
  for (int j = 0; j < kTables; j++) {
    const __m512 low = _mm512_loadu_ps(first + 32 * j);
    if (kLevel < 5) from[j] = _mm512_permutexvar_ps(at, low);
    else from[j] = _mm512_permutex2var_ps(low, at, _mm512_loadu_ps(first + 32 * j + 16));
  }
#pragma GCC unroll 2
  for (int tables = kTables / 2, bit = 32; tables; tables /= 2, bit *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(at, _mm512_set1_epi32(bit));
#pragma GCC unroll 2
    for (int j = 0; j < tables; j++) from[j] = _mm512_mask_blend_ps(odd, from[2 * j], from[2 * j + 1]);
  }
  found.part[0] = from[0];
#elif defined(__AVX2__)
  // The same with tables of 8 as far as that pays, then by address.
  constexpr int kTables = kLevel < 4 ? 1 : kLevel < 6 ? 1 << (kLevel - 3) : 0;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; part++) {
    const auto at = reinterpret_cast<__m256i>(i.part[part]);
    if constexpr (kTables == 0) {
      found.part[part] = _mm256_i32gather_ps(tree, at, 4);
    } else {
      __m256 from[kTables];
#pragma GCC unroll 4
      for (int j = 0; j < kTables; j++)
        from[j] = _mm256_permutevar8x32_ps(_mm256_loadu_ps(tree + (kLevel < 3 ? 0 : 1 << kLevel) + 8 * j), at);
#pragma GCC unroll 2
      for (int tables = kTables / 2, place = 3; tables; tables /= 2, place++) {
        const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(at, 31 - place));
#pragma GCC unroll 2
        for (int j = 0; j < tables; j++) from[j] = _mm256_blendv_ps(from[2 * j], from[2 * j + 1], odd);
      }
      found.part[part] = from[0];
    }
  }
#else
  int32_t at[16];
  float from[16];
  store(at, i);
  for (int j = 0; j < 16; j++) from[j] = tree[at[j]];
  found = load_lanes(from);
#endif
  return found;
}

template <int kLevels, int kLevel = 0>
INLINE I16 descend(const float* tree, F16 v, I16 i) {
  if constexpr (kLevel < kLevels) {
    i += i - (v >= entries_of<kLevel>(tree, i));  // a comparison that holds gives -1
    return descend<kLevels, kLevel + 1>(tree, v, i);
  } else {
    return i;
  }
}

// The same for 5 to 8 bits, by halving: down a tree of thresholds, in which entry i has 2i below and 2i + 1 above it.
template <int kBits>
int32_t search_thresholds(const float* h, int64_t k, const float* thresholds, float scale, int8_t* out) {
  constexpr int kCodes = 1 << kBits;
  alignas(64) float tree[kCodes] = {};
  for (int level = 0; level < kBits; level++)
    for (int i = 0; i < 1 << level; i++) tree[(1 << level) + i] = thresholds[((2 * i + 1) << (kBits - 1 - level)) - 1] * scale;
  I16 sum = {};
  for (int64_t i = 0; i < k; i += 16)
    sum += put_codes(descend<kBits>(tree, load(h + i), I16{} + 1) - (kCodes + kCodes / 2), out + i);
  return sum_of(sum);
}

// code = clip(round(h / divisor - 1/2)), to even on a tie.
int32_t round_uniform(const float* h, int64_t k, float divisor, int bits, int8_t* out) {
  const float low = -static_cast<float>(1 << (bits - 1));
  const F16 magic = all(12582912.0f);  // adding 1.5 * 2**23 leaves a float no bits below one
  I16 sum = {};
  for (int64_t i = 0; i < k; i += 16) {
    const F16 v = smaller(larger(load(h + i) / divisor - 0.5f, all(low)), all(-low - 1));
    sum += put_codes(convert<int32_t>((v + magic) - magic), out + i);
  }
  return sum_of(sum);
}

void quantize(const InputPlan& plan, const float* x, int64_t k, int8_t* codes, float* step, int32_t* sum, float* h) {
  const int64_t padded = padded_k(k);
  rotate(x, h, k, plan.rotation);
  for (int64_t i = k; i < padded; i++) h[i] = 0;
  float size = plan.statistic == Statistic::none ? 0 : size_of(plan.statistic, gather(plan.statistic, h, k), k);
  if (size < plan.smallest) size = plan.smallest;
  const float divisor = size * plan.divisor + plan.divisor_plus;
  *step = size * plan.step_factor + plan.step_plus + (plan.finite ? 0.0f : trace_of_nan(h, padded));
  if (!plan.thresholds) *sum = round_uniform(h, padded, divisor, plan.bits, codes);
  else if (plan.bits == 1) *sum = count_thresholds<1>(h, padded, plan.thresholds, divisor, codes);
  else if (plan.bits == 2) *sum = count_thresholds<3>(h, padded, plan.thresholds, divisor, codes);
  else if (plan.bits == 3) *sum = count_thresholds<7>(h, padded, plan.thresholds, divisor, codes);
  else if (plan.bits == 4) *sum = count_thresholds<15>(h, padded, plan.thresholds, divisor, codes);
  else if (plan.bits == 5) *sum = search_thresholds<5>(h, padded, plan.thresholds, divisor, codes);
  else if (plan.bits == 6) *sum = search_thresholds<6>(h, padded, plan.thresholds, divisor, codes);
  else if (plan.bits == 7) *sum = search_thresholds<7>(h, padded, plan.thresholds, divisor, codes);
  else *sum = search_thresholds<8>(h, padded, plan.thresholds, divisor, codes);
  for (int64_t i = k; i < padded; i++) {  // what was quantized beyond the end
    *sum -= codes[i];
    codes[i] = 0;
  }
}

// ---------------------------------------------------------------------------------------------------- epilogue

void finish(const Weights& w, const InputPlan& plan, const int32_t* acc, int64_t row, int64_t count, float step, int32_t sum,
            float* y) {
  // Exact in double: products of codes and zero points are multiples of a small fraction, far below 2**53.
  const double k = static_cast<double>(w.k), zx = plan.zero_point, zw = w.zero_point;
  const double base = k * zx * zw - zw * sum;
  for (int64_t i = 0; i < count; i++) {
    const double total = acc[i] + base - zx * w.sums[row + i];
    y[i] = static_cast<float>(total) * w.scale[row + i] * step;
  }
  if (plan.offset != 0 || w.offset) {
    const float x_levels = static_cast<float>(sum - k * zx);
    for (int64_t i = 0; i < count; i++) {
      const float w_levels = static_cast<float>(w.sums[row + i] - k * zw), w_offset = w.offset ? w.offset[row + i] : 0.0f;
      y[i] += plan.offset * (w_levels * w.scale[row + i]);
      y[i] += x_levels * step * w_offset;
      y[i] += static_cast<float>(k) * plan.offset * w_offset;
    }
  }
  if (w.bias)
    for (int64_t i = 0; i < count; i++) y[i] += w.bias[row + i];
}

// Whether four times every sum is an integer that int32 holds on the way: zero points are halves, and rows not too long.
bool fits_quarters(const Weights& w, int64_t k, const InputPlan& plan) {
  const double zx = plan.zero_point, zw = w.zero_point, x = 1 << (plan.bits - 1), codes = 1 << w.bits;
  const bool halves = 2 * zx == std::floor(2 * zx) && 2 * zw == std::floor(2 * zw);
  return halves && 4 * static_cast<double>(k) * (x + std::fabs(zx)) * (codes + std::fabs(zw)) < INT32_MAX;
}

// What turns sums into outputs in integers, as far as that is exact, four times as large; the same for all rows.
struct Quarters {
  bool fit;
  int32_t both, zero_w, zero_x;
  float step;  // a quarter of it: exact, wherever it is put
};

Quarters quarters_of(const OutputRows& rows, const InputPlan& plan) {
  int64_t most = 0;
  for (int64_t i = 0; i < rows.m; i++) most = rows.weights[i]->k > most ? rows.weights[i]->k : most;
  const Weights& any = *rows.weights[0];
  const bool fit = rows.count % 16 == 0 && plan.offset == 0 && !any.offset && fits_quarters(any, most, plan);
  if (!fit) return {};
  return {fit, static_cast<int32_t>(4 * plan.zero_point * any.zero_point), static_cast<int32_t>(4 * any.zero_point),
          static_cast<int32_t>(4 * plan.zero_point), rows.step * 0.25f};
}

// kVectors vectors of one row's outputs as `finish` has them, without offsets.
template <int kVectors>
INLINE void finish_quarters(const Weights& w, const Quarters& q, const int32_t* acc, int64_t row, int32_t plus, const float* residual, bool clip,
                            float* y) {
  F16 v[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) {
    const I16 total = load_lanes(acc + 16 * i) * 4 + (plus - q.zero_x * load_lanes(w.sums + row + 16 * i));
    v[i] = convert<float>(total) * load(w.scale + row + 16 * i) * q.step;
  }
  if (w.bias) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) v[i] += load(w.bias + row + 16 * i);
  }
  if (residual) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) v[i] += load(residual + 16 * i);
  }
  if (clip) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) v[i] = select(v[i] < all(0), all(0), v[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) store(y + 16 * i, v[i]);
}

// Rows [begin, end) of an OutputRows; acc begins with the first of them.
void finish_some(const OutputRows& rows, const InputPlan& plan, const Quarters& q, int64_t begin, int64_t end, const int32_t* acc) {
  for (int64_t i = begin; i < end; i++, acc += rows.acc_stride) {
    const Weights& w = *rows.weights[i];
    const float* residual = rows.residual ? rows.residual + i * rows.y_stride : nullptr;
    float* y = rows.y + i * rows.y_stride;
    if (q.fit) {
      const int32_t plus = static_cast<int32_t>(w.k) * q.both - q.zero_w * rows.sums[i];
      int64_t j = 0;
      for (; j + 64 <= rows.count; j += 64)
        finish_quarters<4>(w, q, acc + j, rows.row + j, plus, residual ? residual + j : nullptr, rows.clip, y + j);
      for (; j < rows.count; j += 16)
        finish_quarters<1>(w, q, acc + j, rows.row + j, plus, residual ? residual + j : nullptr, rows.clip, y + j);
      continue;
    }
    finish(w, plan, acc, rows.row, rows.count, rows.step, rows.sums[i], y);
    for (int64_t j = 0; residual && j < rows.count; j++) y[j] += residual[j];
    for (int64_t j = 0; rows.clip && j < rows.count; j++) y[j] = y[j] < 0 ? 0 : y[j];
  }
}

void finish_rows(const OutputRows& rows, const InputPlan& plan) {
  finish_some(rows, plan, quarters_of(rows, plan), 0, rows.m, rows.acc);
}

// ---------------------------------------------------------------------------------------------- products of floats

constexpr int64_t kFloatBlock = 64;  // k at a time: the levels of 64 rows take 16 KiB
constexpr int kSumRows = kPartLanes == 4 ? 3 : 6, kSumVectors = kPartLanes == 16 ? 4 : 1;  // as many sums as registers hold

// acc += kRows rows of floats times the levels of 16 * kSumVectors rows of weights; levels: 64 a k.
template <int kRows>
INLINE void float_tile(const float* levels, int64_t k, const float* x, int64_t stride, float* acc) {
  F16 sum[kRows][kSumVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kSumVectors; j++) sum[r][j] = load(acc + r * kPanelRows + 16 * j);
  for (int64_t i = 0; i < k; i++, levels += kPanelRows) {
    F16 w[kSumVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kSumVectors; j++) w[j] = load(levels + 16 * j);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const F16 q = all(x[r * stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kSumVectors; j++) sum[r][j] = multiply_add(w[j], q, sum[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < kSumVectors; j++) store(acc + r * kPanelRows + 16 * j, sum[r][j]);
}

// acc[m][64] = the levels of a panel times m rows of floats; unpack(first k, count, levels of 64 rows for each k).
template <class Unpack>
INLINE void float_tiles(int64_t k, const float* x, int64_t stride, int64_t m, float* acc, Unpack&& unpack) {
  alignas(64) float levels[kFloatBlock * kPanelRows];
  std::memset(acc, 0, static_cast<size_t>(m * kPanelRows) * 4);
  for (int64_t k0 = 0; k0 < k; k0 += kFloatBlock) {
    unpack(k0, kFloatBlock, levels);
    for (int64_t row = 0; row < kPanelRows; row += 16 * kSumVectors) {
      int64_t i = 0;
      for (; i + kSumRows <= m; i += kSumRows)
        float_tile<kSumRows>(levels + row, kFloatBlock, x + i * stride + k0, stride, acc + i * kPanelRows + row);
      for (; i + 2 <= m; i += 2) float_tile<2>(levels + row, kFloatBlock, x + i * stride + k0, stride, acc + i * kPanelRows + row);
      if (i < m) float_tile<1>(levels + row, kFloatBlock, x + i * stride + k0, stride, acc + i * kPanelRows + row);
    }
  }
}

// ------------------------------------------------------------------------------------------------- transformers

void rms_norm(const float* x, const float* weight, float epsilon, float* y, int64_t n) {
  F16 s = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) s += load(x + i) * load(x + i);
  if (i < n) {
    const F16 v = load_part(x + i, n - i, 0);
    s += v * v;
  }
  const float factor = 1.0f / std::sqrt(sum_of(s) / static_cast<float>(n) + epsilon);
  for (i = 0; i < n; i++) y[i] = weight[i] * (x[i] * factor);
}

// As fast as memory gives: sixteen sums, and the lines that come next asked for ahead.
float sum(const float* x, int64_t n) {
  F16 s[16] = {};
  for (int64_t i = 0; i < n; i += 256)
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
      __builtin_prefetch(x + i + 16 * j + 768);
      s[j] += load(x + i + 16 * j);
    }
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) s[j] += s[j + half];
  return sum_of(s[0]);
}

float dot(const float* a, const float* b, int64_t n) {
  F16 s[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) s[j] += load(a + i + 16 * j) * load(b + i + 16 * j);
  for (; i + 16 <= n; i += 16) s[0] += load(a + i) * load(b + i);
  if (i < n) s[1] += load_part(a + i, n - i, 0) * load_part(b + i, n - i, 0);
  return sum_of((s[0] + s[1]) + (s[2] + s[3]));
}

void add_scaled(float* y, const float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

// exp by 2**n * exp(r), |r| <= ln(2) / 2, and a polynomial; about 2 ulp. 0 below -87, NaN of NaN.
INLINE F16 exponential(F16 given) {
  F16 x = smaller(larger(given, all(-87.3f)), all(88.7f));
  const F16 magic = all(12582912.0f), n = (x * 1.44269504f + magic) - magic;
  const F16 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  F16 p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // n is at most 128, which has no exponent of its own: multiply by 2**(n - 1), then by 2.
  const I16 exponent = (convert<int32_t>(n) + 126) << 23;
  return select(given == given, p * as_floats(exponent) * 2.0f, given);
}

void silu_times(const float* gate, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F16 g = load(gate + i);
    store(y + i, g / (1.0f + exponential(-g)) * load(up + i));
  }
  if (i < n) {
    const F16 g = load_part(gate + i, n - i, 0);
    store_part(y + i, g / (1.0f + exponential(-g)) * load_part(up + i, n - i, 0), n - i);
  }
}

float softmax(float* x, int64_t n) {
  F16 top = all(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) top = larger(load(x + i), top);
  if (i < n) top = larger(load_part(x + i, n - i, -INFINITY), top);
  const float largest = largest_of(top);
  F16 s = {};
  for (i = 0; i + 16 <= n; i += 16) {
    const F16 e = exponential(load(x + i) - largest);
    store(x + i, e);
    s += e;
  }
  if (i < n) {
    const int64_t rest = n - i;
    const F16 e = exponential(load_part(x + i, rest, 0) - largest);
    store_part(x + i, e, rest);
    s += load_part(x + i, rest, 0);
  }
  const float factor = 1.0f / sum_of(s);
  for (i = 0; i < n; i++) x[i] *= factor;
  return largest;
}

INLINE F16 widen(Lanes<uint16_t> v, bool brain) {
  const U16 bits = convert<uint32_t>(v);
  if (brain) return same_bits<float>(bits << 16);
  // float16: move exponent and fraction into place, and let a multiplication correct the exponent's bias (finite values).
  const F16 number = same_bits<float>((bits & 0x7fffu) << 13) * 0x1p112f;
  return same_bits<float>(same_bits<uint32_t>(number) | (bits & 0x8000u) << 16);
}

template <bool kBrain>
float dot_narrow(const uint16_t* a, const float* b, int64_t n) {
  F16 s[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      if (j % 2 == 0) __builtin_prefetch(a + i + 16 * j + 1536);
      s[j] += widen(load_lanes(a + i + 16 * j), kBrain) * load(b + i + 16 * j);
    }
  for (; i < n; i += 16) {
    const int64_t rest = n - i < 16 ? n - i : 16;
    uint16_t lanes[16] = {};
    std::memcpy(lanes, a + i, static_cast<size_t>(rest) * 2);
    s[0] += widen(load_lanes(lanes), kBrain) * load_part(b + i, rest, 0);
  }
  return sum_of((s[0] + s[1]) + (s[2] + s[3]));
}

void dense(const void* matrix, int type, int64_t first, int64_t count, int64_t k, const float* x, float* y) {
  for (int64_t r = 0; r < count; r++) {
    const int64_t at = (first + r) * k;
    if (type == 0) y[r] = dot(static_cast<const float*>(matrix) + at, x, k);
    else if (type == 1) y[r] = dot_narrow<true>(static_cast<const uint16_t*>(matrix) + at, x, k);
    else y[r] = dot_narrow<false>(static_cast<const uint16_t*>(matrix) + at, x, k);
  }
}

}  // namespace
}  // namespace bitbell
