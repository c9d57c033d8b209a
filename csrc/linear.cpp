#include "linear.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "pool.hpp"
#include "scratch.hpp"

namespace bitbell {
namespace {

constexpr int64_t kRowBlock = 256;  // input rows at a time: their codes stay in the second-level cache

constexpr int64_t kFloatRowBlock = 128;  // the same of floats

struct Accumulators {};
struct FloatSums {};
struct Unpacked {};
struct Prepared {};
struct Rotated {};
struct InputCodes {};
struct InputSteps {};
struct InputSums {};

// The accumulators of every (panel, input row): `use(row of weights, count, input row, accumulators)`.
template <class Use>
void for_each_panel(const Kernels& kernels, const Weights& w, const Codes& x, int x_bits, int threads, Use&& use) {
  const int64_t k = padded_k(w.k), bytes = panel_bytes(w.k, w.bits), panels = panels_of(w.rows);
  const int bits = kernel_bits(w.bits);
  int8_t* prepared = nullptr;
  if (x.rows == 1) {
    prepared = scratch_of<Prepared, int8_t>(2 * k);
    kernels.prepare(x.codes, k, bits, x_bits, prepared);
  }
  parallel_for(threads, panels, 1, [&, prepared](int64_t begin, int64_t end, int) {
    if (x.rows == 1) {
      alignas(64) int32_t acc[kPanelRows];
      for (int64_t p = begin; p < end; p++) {
        kernels.vector(w.data + p * bytes, bits, k, prepared, x_bits, acc);
        use(p * kPanelRows, std::min(kPanelRows, w.rows - p * kPanelRows), 0, acc);
      }
      return;
    }
    int32_t* acc = scratch_of<Accumulators, int32_t>(kRowBlock * kPanelRows);
    uint8_t* unpacked = scratch_of<Unpacked, uint8_t>(kMatrixScratch);
    for (int64_t m0 = 0; m0 < x.rows; m0 += kRowBlock) {
      const int64_t m = std::min(kRowBlock, x.rows - m0);
      for (int64_t p = begin; p < end; p++) {
        kernels.matrix(w.data + p * bytes, bits, k, x.codes + m0 * x.stride, x.stride, m, acc, unpacked);
        const int64_t row = p * kPanelRows, count = std::min(kPanelRows, w.rows - row);
        for (int64_t i = 0; i < m; i++) use(row, count, m0 + i, acc + i * kPanelRows);
      }
    }
  });
}

}  // namespace

void quantize_rows(const Kernels& kernels, const InputPlan& plan, const float* x, int64_t x_stride, int64_t m, int64_t k,
                   const Codes& out, int threads) {
  parallel_for(m < 2 ? 1 : threads, m, 1, [&](int64_t begin, int64_t end, int) {
    float* h = scratch_of<Rotated, float>(padded_k(k));
    for (int64_t i = begin; i < end; i++)
      kernels.quantize(plan, x + i * x_stride, k, out.codes + i * out.stride, out.step + i, out.sum + i, h);
  });
  // One step for all rows: NaN in one of them is NaN in all, as one tensor's statistics have it.
  if (plan.statistic == Statistic::none && std::any_of(out.step, out.step + m, [](float s) { return std::isnan(s); }))
    std::fill(out.step, out.step + m, std::numeric_limits<float>::quiet_NaN());
}

void integer_product(const Kernels& kernels, const Weights& w, const Codes& x, int x_bits, int32_t* acc, int threads) {
  for_each_panel(kernels, w, x, x_bits, threads, [&](int64_t row, int64_t count, int64_t i, const int32_t* from) {
    std::memcpy(acc + i * w.rows + row, from, static_cast<size_t>(count) * 4);
  });
}

void linear(const Kernels& kernels, const Weights& w, const InputPlan& plan, const Codes& x, float* y, int64_t y_stride, int threads) {
  for_each_panel(kernels, w, x, plan.bits, threads, [&](int64_t row, int64_t count, int64_t i, const int32_t* acc) {
    kernels.finish(w, plan, acc, row, count, x.step[i], x.sum[i], y + i * y_stride + row);
  });
}

void quantized_linear(const Kernels& kernels, const Weights& w, const InputPlan& plan, const float* x, int64_t m, float* y, int threads) {
  Codes codes;
  codes.stride = padded_k(w.k) + 64;  // rows a multiple of 4 KiB apart would fight for the same lines of the cache
  codes.codes = scratch_of<InputCodes, int8_t>(m * codes.stride);
  codes.step = scratch_of<InputSteps, float>(m);
  codes.sum = scratch_of<InputSums, int32_t>(m);
  codes.rows = m;
  quantize_rows(kernels, plan, x, w.k, m, w.k, codes, threads);
  linear(kernels, w, plan, codes, y, w.rows, threads);
}

void linear_floats(const Kernels& kernels, const Weights& w, const float* x, int64_t x_stride, int64_t m, float* y, int64_t y_stride,
                   int threads) {
  const int64_t k = padded_k(w.k), bytes = panel_bytes(w.k, w.bits);
  const int bits = kernel_bits(w.bits);
  // 16 levels at least, repeated: a look-up may then ignore whatever lies in the bits above a code.
  std::vector<float> levels(256);
  const int codes = 1 << w.bits;
  for (int i = 0; i < 256; i++) {
    const int code = bits < 8 ? i % codes : i;
    levels[static_cast<size_t>(i)] = w.table ? w.table[code] : static_cast<float>(code - w.zero_point);
  }
  std::vector<float> padded, sums(static_cast<size_t>(m));
  if (k != w.k) {
    padded.assign(static_cast<size_t>(m * k), 0.0f);
    for (int64_t i = 0; i < m; i++) std::memcpy(padded.data() + i * k, x + i * x_stride, static_cast<size_t>(w.k) * 4);
    x = padded.data();
    x_stride = k;
  }
  if (w.offset)
    for (int64_t i = 0; i < m; i++) {
      double sum = 0;
      for (int64_t j = 0; j < w.k; j++) sum += x[i * x_stride + j];
      sums[static_cast<size_t>(i)] = static_cast<float>(sum);
    }
  parallel_for(threads, panels_of(w.rows), 1, [&](int64_t begin, int64_t end, int) {
    float* acc = scratch_of<FloatSums, float>(std::min(m, kFloatRowBlock) * kPanelRows);
    for (int64_t p = begin; p < end; p++)
      for (int64_t m0 = 0; m0 < m; m0 += kFloatRowBlock) {
        const int64_t rows = std::min(kFloatRowBlock, m - m0), row = p * kPanelRows, count = std::min(kPanelRows, w.rows - row);
        kernels.floats(w.data + p * bytes, bits, k, x + m0 * x_stride, x_stride, rows, levels.data(), acc);
        for (int64_t i = 0; i < rows; i++)
          for (int64_t n = 0; n < count; n++) {
            float value = acc[i * kPanelRows + n] * w.scale[row + n];
            if (w.offset) value += sums[static_cast<size_t>(m0 + i)] * w.offset[row + n];
            y[(m0 + i) * y_stride + row + n] = w.bias ? value + w.bias[row + n] : value;
          }
      }
  });
}

namespace {

// Memory that is read from end to end misses fewer translations in large pages; a wish that the system may ignore.
void advise_large_pages(uint8_t* begin, uint8_t* end) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t to = reinterpret_cast<uintptr_t>(end) / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)begin, (void)end;
#endif
}

// Where code (row r of a panel, column k) of a plain layout of `bits` lies: byte offset in the panel, and bit.
inline void put_plain(uint8_t* panel, int bits, int64_t r, int64_t k, unsigned code) {
  const int64_t per_byte = 8 / bits, group = k / 4;
  uint8_t* at = panel + (group / per_byte * 4 + r / 16) * 64 + r % 16 * 4 + k % 4;
  *at = static_cast<uint8_t>(*at | code << (bits * (group % per_byte)));
}

// 3 bits: every 32 k, 8 vectors of the lower 2 bits (2 x 4 row groups), then 4 of the upper bit.
inline void put_three(uint8_t* panel, int64_t r, int64_t k, unsigned code) {
  uint8_t* chunk = panel + k / 32 * 768;
  put_plain(chunk, 2, r, k % 32, code & 3);
  put_plain(chunk + 512, 1, r, k % 32, code >> 2);
}

}  // namespace

void arrange(const uint32_t* words, int64_t rows, int64_t k, int bits, uint8_t* out, int32_t* sums, int threads) {
  const int64_t words_of_row = packed_words(k, bits), bytes = panel_bytes(k, bits);
  parallel_for(threads, panels_of(rows), 1, [&](int64_t begin, int64_t end, int) {
    advise_large_pages(out + begin * bytes, out + end * bytes);
    for (int64_t p = begin; p < end; p++) {
      uint8_t* panel = out + p * bytes;
      std::memset(panel, 0, static_cast<size_t>(bytes));
      for (int64_t r = 0; r < std::min(kPanelRows, rows - p * kPanelRows); r++) {
        const uint32_t* stream = words + (p * kPanelRows + r) * words_of_row;
        int32_t sum = 0;
        for (int64_t i = 0; i < k; i++) {
          const unsigned code = packed_code(stream, i, bits);
          sum += static_cast<int32_t>(code);
          if (bits == 3) put_three(panel, r, i, code);
          else put_plain(panel, kernel_bits(bits), r, i, code);
        }
        sums[p * kPanelRows + r] = sum;
      }
    }
  });
}

}  // namespace bitbell
