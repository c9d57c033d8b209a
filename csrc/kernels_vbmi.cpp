// AVX-512 with VBMI: as the level below, and products of 1- and 2-bit codes by look-up. One instruction looks 64 sums of three
// products up, so that three times as many are had as from one that multiplies; sums of eight stay in bytes, and are then
// added up in 16 bits.
#include <array>

#include "kernels_512.hpp"

namespace bitbell {
namespace {

// The sums of every three input codes (-2 .. 1, first the lowest two bits of a line's number) with every three weight codes.
struct Sums {
  alignas(4096) std::array<uint8_t, 64 * 64> of{};
  constexpr Sums() {
    for (int x = 0; x < 64; x++)
      for (int w = 0; w < 64; w++) {
        int sum = kTripleBias;
        for (int place = 0; place < 6; place += 2) sum += ((x >> place & 3) - 2) * (w >> place & 3);
        of[static_cast<size_t>(64 * x + w)] = static_cast<uint8_t>(sum);
      }
  }
};
constexpr Sums kSums;

// Addresses of 16 triples of digits (codes plus 2) in 48 bytes, as many as `left` codes have.
INLINE void put_lines(__m512i digits, int64_t left, uint16_t* out) {
  alignas(64) static constexpr std::array<int8_t, 64> kPlaces = [] {
    std::array<int8_t, 64> places{};
    for (int i = 0; i < 64; i++) places[static_cast<size_t>(i)] = static_cast<int8_t>(i % 4 < 3 ? i / 4 * 3 + i % 4 : 0);
    return places;
  }();
  // Codes beyond the last one are the next pixel's, or whatever is there: their weight codes are 0.
  const __m512i spread = _mm512_and_si512(_mm512_permutexvar_epi8(load512(kPlaces.data()), digits), _mm512_set1_epi8(3));
  const __m512i number = _mm512_dpbusd_epi32(_mm512_setzero_si512(), spread, _mm512_set1_epi32(0x00100401));
  const __mmask16 kept = static_cast<__mmask16>(left < 48 ? (1 << triples_of(left)) - 1 : 0xffff);
  _mm512_mask_cvtepi32_storeu_epi16(out, kept, _mm512_slli_epi32(number, 6));
}

void triples(const int8_t* codes, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 48, out += 16) put_lines(_mm512_add_epi8(load512(codes + i), _mm512_set1_epi8(2)), count - i, out);
}

// Codes of one pixel as bits: of each threshold, where the numbers reach it.
template <int kCount>
INLINE int32_t lines_of_pixel(const __m512 (&t)[kCount], const float* h, int64_t count, uint16_t* out) {
  int64_t sum = -count * ((kCount + 1) / 2);
  for (int64_t i = 0; i < count; i += 48, out += 16) {
    const int64_t left = count - i;
    const uint64_t own = left < 48 ? (uint64_t{1} << left) - 1 : (uint64_t{1} << 48) - 1;
    uint64_t reached[kCount] = {};
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
      if (16 * j >= left) break;
      const __m512 v = _mm512_loadu_ps(h + i + 16 * j);
#pragma GCC unroll 3
      for (int c = 0; c < kCount; c++) reached[c] |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, t[c], _CMP_GE_OQ)) << (16 * j);
    }
    __m512i digits = _mm512_set1_epi8(static_cast<char>(2 - (kCount + 1) / 2));
#pragma GCC unroll 3
    for (int c = 0; c < kCount; c++) {
      sum += __builtin_popcountll(reached[c] & own);
      digits = _mm512_mask_add_epi8(digits, reached[c], digits, _mm512_set1_epi8(1));
    }
    put_lines(digits, left, out);
  }
  return static_cast<int32_t>(sum);
}

template <int kCount>
void lines_of_pixels(const InputPlan& plan, const float* h, int64_t pixels, int64_t count, uint16_t* out, int32_t* sums) {
  __m512 t[kCount];
  for (int c = 0; c < kCount; c++) t[c] = _mm512_set1_ps(plan.thresholds[c] * plan.divisor_plus);
  for (int64_t i = 0; i < pixels; i++, h += count, out += triples_of(count)) sums[i] = lines_of_pixel<kCount>(t, h, count, out);
}

void lines(const InputPlan& plan, const float* h, int64_t pixels, int64_t count, uint16_t* out, int32_t* sums) {
  if (plan.bits == 1) lines_of_pixels<1>(plan, h, pixels, count, out, sums);
  else lines_of_pixels<3>(plan, h, pixels, count, out, sums);
}

// Kept where it is: compilers would otherwise look everything up first and run out of registers.
#define IN_REGISTER(v) asm volatile("" : "+v"(v))

// s[p][r] += sums of four triples of kRows windows and kPanels panels; or = where `first`.
template <int kRows, int kPanels>
INLINE void add_four(const uint8_t* table, const uint8_t* w, const uint16_t* const* x, int64_t at, __m512i (&s)[kPanels][kRows], bool first) {
  uint64_t four[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) std::memcpy(&four[r], x[r] + at, 8);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i i[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; p++) i[p] = _mm512_loadu_si512(w + 64 * (kPanels * j + p));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const __m512i sums = _mm512_load_si512(table + static_cast<uint16_t>(four[r]));
      four[r] >>= 16;
      asm volatile("" : "+r"(four[r]));
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; p++) {
        const __m512i found = _mm512_permutexvar_epi8(i[p], sums);
        s[p][r] = first && j == 0 ? found : _mm512_add_epi8(s[p][r], found);
        IN_REGISTER(s[p][r]);
      }
    }
  }
}

// What eight triples gave, in bytes, to sums of 16 bits: of all, the odd ones as the upper byte, and of the odd ones.
template <int kRows, int kPanels>
INLINE void add_sums(__m512i (&s)[kPanels][kRows], __m512i (&all)[kPanels][kRows], __m512i (&odd)[kPanels][kRows]) {
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; p++)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      all[p][r] = _mm512_add_epi16(all[p][r], s[p][r]);
      odd[p][r] = _mm512_add_epi16(odd[p][r], _mm512_srli_epi16(s[p][r], 8));
      IN_REGISTER(all[p][r]);
      IN_REGISTER(odd[p][r]);
    }
}

// Sums of 16 bits to acc.
template <int kRows, int kPanels>
INLINE void put_sums(const __m512i (&all)[kPanels][kRows], const __m512i (&odd)[kPanels][kRows], int32_t first, bool add, int32_t* acc) {
  const __m512i low = _mm512_set1_epi32(0xffff), begin = _mm512_set1_epi32(first);
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; p++)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      int32_t* to = acc + (r * kPanels + p) * kPanelRows;
      const __m512i even = _mm512_sub_epi16(all[p][r], _mm512_slli_epi16(odd[p][r], 8));
      const __m512i rows[4] = {_mm512_and_si512(even, low), _mm512_and_si512(odd[p][r], low), _mm512_srli_epi32(even, 16),
                               _mm512_srli_epi32(odd[p][r], 16)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) _mm512_storeu_si512(to + 16 * j, _mm512_add_epi32(add ? load512(to + 16 * j) : begin, rows[j]));
    }
}

// Not inlined: the registers are all its own.
template <int kRows, int kPanels>
__attribute__((noinline)) void lookup_tile(const uint8_t* w, const Run* runs, int64_t count, const uint16_t* const* given, int32_t first,
                                           bool add, int32_t* acc) {
  const uint8_t* table = kSums.of.data();
  __m512i all[kPanels][kRows], odd[kPanels][kRows], s[kPanels][kRows];
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; p++)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) all[p][r] = odd[p][r] = _mm512_setzero_si512();
  const uint16_t* x[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) x[r] = given[r];
  for (int64_t run = 0; run < count; run++) {
    int64_t k = runs[run].x;
    const int64_t end = k + runs[run].triples;
    for (; k + 8 <= end; k += 8, w += 8 * 64 * kPanels) {
      add_four<kRows, kPanels>(table, w, x, k, s, true);
      add_four<kRows, kPanels>(table, w + 4 * 64 * kPanels, x, k + 4, s, false);
      add_sums<kRows, kPanels>(s, all, odd);
    }
    if (k < end) {
      add_four<kRows, kPanels>(table, w, x, k, s, true);
      add_sums<kRows, kPanels>(s, all, odd);
      w += 4 * 64 * kPanels;
    }
  }
  put_sums<kRows, kPanels>(all, odd, first, add, acc);
}

// s[r] += the sums of one triple of the kSharedTaps pixels of each of kRows windows beside each other; or = where `first`.
template <int kRows>
INLINE void add_taps(const uint8_t* table, const uint8_t* w, const uint16_t* x, int64_t pixel, __m512i (&s)[1][kRows], bool first) {
  __m512i i[kSharedTaps];
#pragma GCC unroll 3
  for (int tap = 0; tap < kSharedTaps; tap++) i[tap] = _mm512_loadu_si512(w + 64 * tap);
#pragma GCC unroll 10
  for (int p = 0; p < kRows + kSharedTaps - 1; p++) {
    const __m512i sums = _mm512_load_si512(table + x[p * pixel]);
#pragma GCC unroll 3
    for (int tap = 0; tap < kSharedTaps; tap++) {
      const int r = p - tap;
      if (r < 0 || r >= kRows) continue;
      const __m512i found = _mm512_permutexvar_epi8(i[tap], sums);
      s[0][r] = first && tap == 0 ? found : _mm512_add_epi8(s[0][r], found);
      IN_REGISTER(s[0][r]);
    }
  }
}

// The same of windows beside each other and one panel: a pixel's table is loaded once for all windows that it is part of.
template <int kRows>
__attribute__((noinline)) void shared_tile(const uint8_t* w, const Run* runs, int64_t count, const uint16_t* given, int64_t pixel,
                                           int32_t first, bool add, int32_t* acc) {
  constexpr int kTogether = 3, kBytes = 64 * kSharedTaps;  // 3 triples of 3 taps, at most 27 each: a byte holds their sum
  const uint8_t* table = kSums.of.data();
  __m512i all[1][kRows], odd[1][kRows], s[1][kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) all[0][r] = odd[0][r] = _mm512_setzero_si512();
  for (int64_t run = 0; run < count; run++) {
    const uint16_t* x = given + runs[run].x;
    const uint16_t* const end = x + runs[run].triples;
    for (; x + kTogether <= end; x += kTogether) {
#pragma GCC unroll 3
      for (int j = 0; j < kTogether; j++, w += kBytes) add_taps<kRows>(table, w, x + j, pixel, s, j == 0);
      add_sums<kRows, 1>(s, all, odd);
    }
    for (; x < end; x++, w += kBytes) {
      add_taps<kRows>(table, w, x, pixel, s, true);
      add_sums<kRows, 1>(s, all, odd);
    }
  }
  put_sums<kRows, 1>(all, odd, first, add, acc);
}

// Asks for what is added to a window's outputs while its sums are looked up.
INLINE void prefetch_residual(const OutputRows& rows, int64_t i) {
  for (int64_t j = 0; j < rows.count; j += 16) __builtin_prefetch(rows.residual + i * rows.y_stride + j);
}

// Rows of windows: calls tile(Width<how many>, the first) of at most kMost, and only of windows that `together` lets.
template <int kMost, class Tile, class Together>
INLINE void for_tiles(int64_t m, Together&& together, Tile&& tile) {
  for (int64_t i = 0; i < m;) {
    if (kMost >= 8 && together(i, 8)) tile(Width<8>{}, i), i += 8;
    else if (together(i, 4)) tile(Width<4>{}, i), i += 4;
    else if (together(i, 2)) tile(Width<2>{}, i), i += 2;
    else tile(Width<1>{}, i), i += 1;
  }
}

void lookup_product(const LookupProduct& p) {
  const Quarters quarters = p.finish ? quarters_of(*p.finish, *p.plan) : Quarters{};
  const auto fit = [&](int64_t i, int64_t count) { return i + count <= p.m; };
  const auto beside = [&](int64_t i, int64_t count) { return fit(i, count) && p.x[i + count - 1] - p.x[i] == (count - 1) * p.pixel; };
  const int64_t ahead = p.bytes * 4 / (p.m + 3) + 64;  // of the weights that come next, for every 4 windows
  const auto with_outputs = [&](int64_t i, int64_t count, auto&& sum) {
    int32_t* acc = p.acc + i * p.panels * kPanelRows;
    for (const uint8_t *next = p.w + p.bytes + i / 4 * ahead, *end = next + ahead * count / 4; next < end; next += 64)
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    for (int64_t r = 0; p.finish && p.finish->residual && r < count; r++) prefetch_residual(*p.finish, i + r);
    sum(acc);
    if (p.finish) finish_some(*p.finish, *p.plan, quarters, i, i + count, acc);
  };
  const auto tile = [&](auto panels, auto rows, int64_t i) {
    with_outputs(i, rows.value, [&](int32_t* acc) { lookup_tile<rows.value, panels.value>(p.w, p.runs, p.count, p.x + i, p.first, p.add, acc); });
  };
  const auto shared = [&](auto rows, int64_t i) {
    with_outputs(i, rows.value, [&](int32_t* acc) { shared_tile<rows.value>(p.w, p.runs, p.count, p.x[i], p.pixel, p.first, p.add, acc); });
  };
  if (p.pixel) for_tiles<8>(p.m, beside, shared);
  else if (p.panels == 2) for_tiles<4>(p.m, fit, [&](auto rows, int64_t i) { tile(Width<2>{}, rows, i); });
  else for_tiles<8>(p.m, fit, [&](auto rows, int64_t i) { tile(Width<1>{}, rows, i); });
}

constexpr LookupKernels kLookups = {triples, lines, lookup_product};

}  // namespace

extern const Kernels kAvx512Vbmi;
const Kernels kAvx512Vbmi = {"avx512vbmi", quantize, prepare, vector,     vnni_matrix, floats, finish, finish_rows, gather, rotate, rms_norm,
                             sum,          dot,      add_scaled, silu_times, softmax,   dense,  &kImages, &kTraining, &kLookups};
}  // namespace bitbell
