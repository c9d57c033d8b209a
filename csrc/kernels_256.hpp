// Products with 256-bit vectors, for AVX2 (16-bit multiply and add) and AVX-VNNI (BITBELL_VNNI: 8-bit dot products).
#pragma once
#include <immintrin.h>

#include "kernels_images.hpp"
#include "kernels_training.hpp"

namespace bitbell {
namespace {

#ifdef BITBELL_VNNI
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

void prepare(const int8_t* x, int64_t k, int, int, int8_t* prepared) { std::memcpy(prepared, x, static_cast<size_t>(k)); }

INLINE __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// 8 rows' codes of k-group `j` of a chunk; `half`: which 8 of the panel's 64 rows.
template <int kBits>
INLINE __m256i take_field(const uint8_t* chunk, int half, int j) {
  constexpr int kPerByte = kBits == 3 ? 4 : 8 / kBits, kLow = kBits == 3 ? 2 : kBits;
  __m256i v = load256(chunk + j / kPerByte * 256 + half * 32);
  if (kBits == 8) return v;
  v = _mm256_and_si256(_mm256_srli_epi16(v, kLow * (j % kPerByte)), _mm256_set1_epi8((1 << kLow) - 1));
  if (kBits == 3) {
    __m256i top = load256(chunk + 512 + half * 32);
    top = j < 2 ? _mm256_slli_epi16(top, 2 - j) : _mm256_srli_epi16(top, j - 2);
    v = _mm256_or_si256(v, _mm256_and_si256(top, _mm256_set1_epi8(4)));
  }
  return v;
}

// acc + four products a lane. Codes of 8 bits go as two nibbles, since maddubs would saturate.
INLINE __m256i dot_bytes(__m256i acc, __m256i w, __m256i x, bool wide) {
#ifdef BITBELL_VNNI
  (void)wide;
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  const __m256i one = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
  if (!wide) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one));
  const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(w, nibble), x), one);
  const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), x), one);
  return _mm256_add_epi32(_mm256_add_epi32(acc, low), _mm256_slli_epi32(high, 4));
#endif
}

template <int kBits>
void one_row(const uint8_t* panel, int64_t k, const int8_t* x, int x_bits, int32_t* acc) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  const int64_t chunks = k / 4 / kGroups;
  __m256i total[8];
  for (int i = 0; i < 8; i++) total[i] = _mm256_setzero_si256();
  // Sums of products stay in 16 bits as long as they fit.
  const int64_t largest = 2 * ((1 << kBits) - 1) * (1 << (x_bits - 1));
  int64_t run = 32767 / largest / kGroups;
  const bool narrow = !kVnni && kBits < 8 && run > 0;
  if (!narrow) run = chunks;
  for (int64_t c = 0; c < chunks;) {
    const int64_t end = c + run < chunks ? c + run : chunks;
    __m256i sum[8];
    for (int i = 0; i < 8; i++) sum[i] = narrow ? _mm256_setzero_si256() : total[i];
    for (; c < end; c++, panel += kBytes) {
      for (int i = 0; i < kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(panel) + 3072 + i, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int j = 0; j < kGroups; j++) {
        int32_t four;
        std::memcpy(&four, x + (c * kGroups + j) * 4, 4);
        const __m256i q = _mm256_set1_epi32(four);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          const __m256i w = take_field<kBits>(panel, i, j);
          sum[i] = narrow ? _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(w, q)) : dot_bytes(sum[i], w, q, kBits == 8);
        }
      }
    }
    for (int i = 0; i < 8; i++)
      total[i] = narrow ? _mm256_add_epi32(total[i], _mm256_madd_epi16(sum[i], _mm256_set1_epi16(1))) : sum[i];
  }
  for (int i = 0; i < 8; i++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8 * i), total[i]);
}

void vector(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int x_bits, int32_t* acc) {
  for_width(bits, [&](auto width) { one_row<decltype(width)::value>(panel, k, x, x_bits, acc); });
}

constexpr int64_t kBlock = 256;  // k at a time: their 64 rows of unpacked codes take 16 KiB

// Codes of kBlock k as bytes: 256 bytes (64 rows x 4 k) a k-group.
template <int kBits>
void unpack(const uint8_t* panel, int64_t k, uint8_t* out) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes)
#pragma GCC unroll 8
    for (int j = 0; j < kGroups; j++, out += 256)
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + 32 * i), take_field<kBits>(panel, i, j));
}

// kRows input rows times 32 rows of weights, over k of a block.
template <int kRows>
INLINE void tile(const uint8_t* w, int64_t k, const int8_t* x, int64_t stride, int32_t* acc, bool wide) {
  __m256i sum[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < 4; i++)
      sum[r][i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + r * kPanelRows + 8 * i));
  for (int64_t g = 0; g < k / 4; g++, w += 256) {
    __m256i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32 * i));
    for (int r = 0; r < kRows; r++) {
      int32_t four;
      std::memcpy(&four, x + r * stride + 4 * g, 4);
      const __m256i q = _mm256_set1_epi32(four);
      for (int i = 0; i < 4; i++) sum[r][i] = dot_bytes(sum[r][i], v[i], q, wide);
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < 4; i++)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kPanelRows + 8 * i), sum[r][i]);
}

template <int kBits>
void rows(const uint8_t* panel, int64_t k, const int8_t* x, int64_t stride, int64_t m, int32_t* acc, uint8_t* scratch) {
  std::memset(acc, 0, static_cast<size_t>(m * kPanelRows) * 4);
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t block = k - k0 < kBlock ? k - k0 : kBlock;
    unpack<kBits>(panel + k0 * kPanelRows * kBits / 8, block, scratch);
    for (int half = 0; half < 2; half++) {
      int64_t i = 0;
      for (; i + 2 <= m; i += 2)
        tile<2>(scratch + 128 * half, block, x + i * stride + k0, stride, acc + i * kPanelRows + 32 * half, kBits == 8);
      if (i < m) tile<1>(scratch + 128 * half, block, x + i * stride + k0, stride, acc + i * kPanelRows + 32 * half, kBits == 8);
    }
  }
}

void matrix(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int64_t stride, int64_t m, int32_t* acc, uint8_t* scratch) {
  for_width(bits, [&](auto width) { rows<decltype(width)::value>(panel, k, x, stride, m, acc, scratch); });
}

// Levels of 8 codes (32-bit lanes): by arithmetic for bytes, else by two look-ups of 8 and a choice by bit 3.
template <int kBits>
INLINE __m256 look_up(__m256i code, __m256 low, __m256 high, __m256 first) {
  if (kBits == 8) return _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32(255))), first);
  if (kBits < 4) return _mm256_permutevar8x32_ps(low, code);  // uses the lowest 3 bits; the table repeats
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                          _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}

// Levels of k columns: 64 rows for each k.
template <int kBits>
void unpack_levels(const uint8_t* panel, int64_t k, const float* levels, float* out) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  const __m256 low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8), first = _mm256_set1_ps(levels[0]);
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes)
#pragma GCC unroll 8
    for (int j = 0; j < kGroups; j++, out += 256)
      for (int i = 0; i < 8; i++) {
        const __m256i w = take_field<kBits>(panel, i, j);
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++)
          _mm256_store_ps(out + 64 * l + 8 * i, look_up<kBits>(_mm256_srli_epi32(w, 8 * l), low, high, first));
      }
}

template <int kBits>
void float_rows(const uint8_t* panel, int64_t k, const float* x, int64_t stride, int64_t m, const float* levels, float* acc) {
  if (m > 2)
    return float_tiles(k, x, stride, m, acc, [=](int64_t k0, int64_t count, float* out) {
      unpack_levels<kBits>(panel + k0 * kPanelRows * kBits / 8, count, levels, out);
    });
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  const __m256 low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8), first = _mm256_set1_ps(levels[0]);
  for (int64_t r = 0; r < m; r++) {
    const uint8_t* p = panel;
    __m256 sum[8];
    for (int i = 0; i < 8; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t c = 0; c < k / 4 / kGroups; c++, p += kBytes)
#pragma GCC unroll 8
      for (int j = 0; j < kGroups; j++) {
        const float* q = x + r * stride + (c * kGroups + j) * 4;
        for (int i = 0; i < 8; i++) {
          const __m256i w = take_field<kBits>(p, i, j);
#pragma GCC unroll 4
          for (int l = 0; l < 4; l++)
            sum[i] = _mm256_fmadd_ps(look_up<kBits>(_mm256_srli_epi32(w, 8 * l), low, high, first), _mm256_set1_ps(q[l]), sum[i]);
        }
      }
    for (int i = 0; i < 8; i++) _mm256_storeu_ps(acc + r * kPanelRows + 8 * i, sum[i]);
  }
}

void floats(const uint8_t* panel, int bits, int64_t k, const float* x, int64_t stride, int64_t m, const float* levels, float* acc) {
  for_width(bits, [&](auto width) { float_rows<decltype(width)::value>(panel, k, x, stride, m, levels, acc); });
}

}  // namespace
}  // namespace bitbell
