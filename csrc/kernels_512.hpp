// Products with 512-bit vectors and VNNI. One row: codes are masked where they stand, each field of a byte summed at its
// own power of two, so that nothing is shifted but the sums. Many rows: codes become bytes in the first-level cache.
#pragma once
#include <immintrin.h>

#include "kernels_images.hpp"
#include "kernels_training.hpp"

namespace bitbell {
namespace {

constexpr int64_t kAhead = 8192;  // bytes ahead of use that weights are asked for; 3 KiB were slower out of a shared cache

INLINE __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

// How many fields of a byte share one sum: the inputs of all but the last of them are multiplied by the missing power of
// two, as far as they fit into a byte. Zero: no such way, fields are shifted down instead.
INLINE int shared_fields(int bits, int x_bits) {
  if (bits == 1) return x_bits <= 5 ? 4 : 0;
  if (bits == 2) return x_bits <= 6 ? 2 : 1;
  return bits == 4 ? 1 : 0;
}

// Inputs times the missing powers of two, where `shared` fields of `bits` share a sum.
void lift(const int8_t* x, int64_t k, int bits, int shared, int8_t* lifted) {
  alignas(64) int32_t shifts[16], kept[16];  // of four inputs, and the bits of each that are its own after shifting
  for (int i = 0; i < 16; i++) {
    shifts[i] = bits * (shared - 1 - i % shared);
    kept[i] = static_cast<int32_t>(0x01010101u * ((0xffu << shifts[i]) & 0xffu));
  }
  const __m512i count = load512(shifts), mask = load512(kept);
  for (int64_t i = 0; i < k; i += 64)
    _mm512_storeu_si512(lifted + i, _mm512_and_si512(_mm512_sllv_epi32(load512(x + i), count), mask));
}

// 3 bits are multiplied as 2 and 1 where the inputs can be lifted for both: first for the one, then for the other.
INLINE bool as_two_and_one(int bits, int x_bits) { return bits == 3 && x_bits <= 5; }

void prepare(const int8_t* x, int64_t k, int bits, int x_bits, int8_t* prepared) {
  if (as_two_and_one(bits, x_bits)) {
    lift(x, k, 2, 2, prepared);
    return lift(x, k, 1, 4, prepared + k);
  }
  const int shared = shared_fields(bits, x_bits);
  if (shared > 1) lift(x, k, bits, shared, prepared);
  else std::memcpy(prepared, x, static_cast<size_t>(k));
}

INLINE __m512i four_inputs(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// sum += four vectors of kBits-bit codes (1, 2 or 4) times 8 / kBits groups of lifted inputs, kShared fields to a sum.
template <int kBits, int kShared>
INLINE void add_fields(const uint8_t* codes, const int8_t* x, __m512i (&sum)[4][8 / kBits / kShared]) {
  __m512i w[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead + 64 * i, _MM_HINT_T0);
    w[i] = load512(codes + 64 * i);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8 / kBits; j++) {
    const __m512i q = four_inputs(x + 4 * j);
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << (kBits * j)));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[i][j / kShared] = _mm512_dpbusd_epi32(sum[i][j / kShared], _mm512_and_si512(w[i], mask), q);
  }
}

// The sums of one vector's fields, each brought down from its power of two.
template <int kBits, int kShared>
INLINE __m512i total_of(const __m512i (&sum)[8 / kBits / kShared]) {
  __m512i total = _mm512_setzero_si512();
  for (int s = 0; s < 8 / kBits / kShared; s++)
    total = _mm512_add_epi32(total, _mm512_srai_epi32(sum[s], kBits * (kShared * (s + 1) - 1)));
  return total;
}

template <int kBits, int kShared>
void one_row_masked(const uint8_t* panel, int64_t k, const int8_t* x, int32_t* acc) {
  constexpr int kGroups = 8 / kBits;
  __m512i sum[4][kGroups / kShared] = {};
  for (int64_t c = 0; c < k / 4 / kGroups; c++) add_fields<kBits, kShared>(panel + 256 * c, x + 4 * kGroups * c, sum);
  for (int i = 0; i < 4; i++) _mm512_storeu_si512(acc + 16 * i, total_of<kBits, kShared>(sum[i]));
}

void one_row_two_and_one(const uint8_t* panel, int64_t k, const int8_t* x, int32_t* acc) {
  __m512i low[4][2] = {}, top[4][2] = {};
  for (int64_t c = 0; c < k / 32; c++, panel += 768, x += 32) {
    add_fields<2, 2>(panel, x, low);
    add_fields<2, 2>(panel + 256, x + 16, low);
    add_fields<1, 4>(panel + 512, x + k, top);
  }
  for (int i = 0; i < 4; i++)
    _mm512_storeu_si512(acc + 16 * i, _mm512_add_epi32(total_of<2, 2>(low[i]), _mm512_slli_epi32(total_of<1, 4>(top[i]), 2)));
}

// 16 rows' codes of k-group `j` of a chunk, shifted down to bytes.
template <int kBits>
INLINE __m512i take_field(const uint8_t* chunk, int i, int j) {
  constexpr int kPerByte = kBits == 3 ? 4 : 8 / kBits, kLow = kBits == 3 ? 2 : kBits;
  __m512i v = load512(chunk + j / kPerByte * 256 + i * 64);
  if (kBits == 8) return v;
  if (j % kPerByte) v = _mm512_srli_epi16(v, kLow * (j % kPerByte));
  v = _mm512_and_si512(v, _mm512_set1_epi8((1 << kLow) - 1));
  if (kBits == 3) {
    __m512i top = load512(chunk + 512 + i * 64);
    if (j != 2) top = j < 2 ? _mm512_slli_epi16(top, 2 - j) : _mm512_srli_epi16(top, j - 2);
    v = _mm512_ternarylogic_epi32(v, top, _mm512_set1_epi8(4), 0xf8);  // v | (top & 4)
  }
  return v;
}

// Fields shifted down: 3 and 8 bits, and wide inputs.
template <int kBits>
void one_row_shifted(const uint8_t* panel, int64_t k, const int8_t* x, int32_t* acc) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  __m512i sum[4], other[4];
  for (int i = 0; i < 4; i++) sum[i] = other[i] = _mm512_setzero_si512();
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes, x += 4 * kGroups) {
#pragma GCC unroll 12
    for (int i = 0; i < kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(panel) + kAhead + i, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int j = 0; j < kGroups; j++) {
      const __m512i q = four_inputs(x + 4 * j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m512i& to = (kGroups == 1 ? c : j) % 2 ? other[i] : sum[i];  // two chains hide the latency
        to = _mm512_dpbusd_epi32(to, take_field<kBits>(panel, i, j), q);
      }
    }
  }
  for (int i = 0; i < 4; i++) _mm512_storeu_si512(acc + 16 * i, _mm512_add_epi32(sum[i], other[i]));
}

void vector(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int x_bits, int32_t* acc) {
  const int shared = shared_fields(bits, x_bits);
  if (bits == 1) return shared ? one_row_masked<1, 4>(panel, k, x, acc) : one_row_shifted<1>(panel, k, x, acc);
  if (bits == 2) return shared == 2 ? one_row_masked<2, 2>(panel, k, x, acc) : one_row_masked<2, 1>(panel, k, x, acc);
  if (bits == 4) return one_row_masked<4, 1>(panel, k, x, acc);
  if (bits == 8) return one_row_shifted<8>(panel, k, x, acc);
  return as_two_and_one(bits, x_bits) ? one_row_two_and_one(panel, k, x, acc) : one_row_shifted<3>(panel, k, x, acc);
}

constexpr int64_t kBlock = 256;  // k at a time: their 64 rows of unpacked codes take 16 KiB

// Codes of k columns as bytes: 256 bytes (64 rows x 4 k) a k-group.
template <int kBits>
void unpack_bits(const uint8_t* panel, int64_t k, uint8_t* out) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes)
#pragma GCC unroll 8
    for (int j = 0; j < kGroups; j++, out += 256)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) _mm512_store_si512(out + 64 * i, take_field<kBits>(panel, i, j));
}

INLINE void unpack(const uint8_t* panel, int bits, int64_t k, uint8_t* out) {
  for_width(bits, [&](auto width) { unpack_bits<decltype(width)::value>(panel, k, out); });
}

// kRows input rows times 64 rows of weights, over k columns; w: unpacked bytes.
template <int kRows>
void tile(const uint8_t* w, int64_t k, const int8_t* x, int64_t stride, int32_t* acc) {
  __m512i sum[kRows][4];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[r][i] = load512(acc + r * kPanelRows + 16 * i);
  for (int64_t g = 0; g < k / 4; g++, w += 256) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = _mm512_load_si512(w + 64 * i);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m512i q = four_inputs(x + r * stride + 4 * g);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], v[i], q);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm512_storeu_si512(acc + r * kPanelRows + 16 * i, sum[r][i]);
}

// All of m rows over one block of k.
void tiles(const uint8_t* w, int64_t k, const int8_t* x, int64_t stride, int64_t m, int32_t* acc) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) tile<6>(w, k, x + i * stride, stride, acc + i * kPanelRows);
  const int8_t* rest = x + i * stride;
  int32_t* to = acc + i * kPanelRows;
  switch (m - i) {
    case 5: return tile<5>(w, k, rest, stride, to);
    case 4: return tile<4>(w, k, rest, stride, to);
    case 3: return tile<3>(w, k, rest, stride, to);
    case 2: return tile<2>(w, k, rest, stride, to);
    case 1: return tile<1>(w, k, rest, stride, to);
  }
}

void vnni_matrix(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int64_t stride, int64_t m, int32_t* acc, uint8_t* scratch) {
  std::memset(acc, 0, static_cast<size_t>(m * kPanelRows) * 4);
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t block = k - k0 < kBlock ? k - k0 : kBlock;
    unpack(panel + k0 * kPanelRows * bits / 8, bits, block, scratch);
    tiles(scratch, block, x + k0, stride, m, acc);
  }
}

// Levels of 16 codes (32-bit lanes): a look-up that ignores all but the lowest 4 bits, or arithmetic for bytes.
template <int kBits>
INLINE __m512 look_up(__m512i code, __m512 levels, __m512 first) {
  if (kBits == 8) return _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32(255))), first);
  return _mm512_permutexvar_ps(code, levels);
}

template <int kBits, int kRows>
void float_rows(const uint8_t* panel, int64_t k, const float* x, int64_t stride, const float* levels, float* acc) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  const __m512 table = _mm512_loadu_ps(levels), first = _mm512_set1_ps(levels[0]);
  __m512 sum[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < 4; i++) sum[r][i] = _mm512_setzero_ps();
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes, x += 4 * kGroups) {
#pragma GCC unroll 12
    for (int i = 0; i < kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(panel) + kAhead + i, _MM_HINT_T0);
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 8
      for (int j = 0; j < kGroups; j++) {
        // 3 bits are put together; others are looked up where they stand, once the byte's field is at the bottom.
        const __m512i w = kBits == 3 ? take_field<3>(panel, i, j) : load512(panel + 64 * i);
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++) {
          const int shift = 8 * l + (kBits == 3 || kBits == 8 ? 0 : kBits * j);
          const __m512 level = look_up<kBits>(shift ? _mm512_srli_epi32(w, shift) : w, table, first);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; r++)
            sum[r][i] = _mm512_fmadd_ps(level, _mm512_set1_ps(x[r * stride + 4 * j + l]), sum[r][i]);
        }
      }
  }
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < 4; i++) _mm512_storeu_ps(acc + r * kPanelRows + 16 * i, sum[r][i]);
}

// Levels of k columns: 64 rows for each k.
template <int kBits>
void unpack_levels(const uint8_t* panel, int64_t k, const float* levels, float* out) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  const __m512 table = _mm512_loadu_ps(levels), first = _mm512_set1_ps(levels[0]);
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes)
#pragma GCC unroll 8
    for (int j = 0; j < kGroups; j++, out += 256)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512i w = take_field<kBits>(panel, i, j);
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++)
          _mm512_store_ps(out + 64 * l + 16 * i, look_up<kBits>(l ? _mm512_srli_epi32(w, 8 * l) : w, table, first));
      }
}

template <int kBits>
void any_float_rows(const uint8_t* panel, int64_t k, const float* x, int64_t stride, int64_t m, const float* levels, float* acc) {
  switch (m) {
    case 1: return float_rows<kBits, 1>(panel, k, x, stride, levels, acc);
    case 2: return float_rows<kBits, 2>(panel, k, x, stride, levels, acc);
    case 3: return float_rows<kBits, 3>(panel, k, x, stride, levels, acc);
    case 4: return float_rows<kBits, 4>(panel, k, x, stride, levels, acc);
  }
  float_tiles(k, x, stride, m, acc, [=](int64_t k0, int64_t count, float* out) {
    unpack_levels<kBits>(panel + k0 * kPanelRows * kBits / 8, count, levels, out);
  });
}

void floats(const uint8_t* panel, int bits, int64_t k, const float* x, int64_t stride, int64_t m, const float* levels, float* acc) {
  for_width(bits, [&](auto width) { any_float_rows<decltype(width)::value>(panel, k, x, stride, m, levels, acc); });
}

}  // namespace
}  // namespace bitbell
