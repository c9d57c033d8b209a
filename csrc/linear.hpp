// Linear layers on packed weights, over all threads.
#pragma once
#include "kernels.hpp"

namespace bitbell {

// Codes of m rows of k floats (row to row: x_stride floats).
void quantize_rows(const Kernels& kernels, const InputPlan& plan, const float* x, int64_t x_stride, int64_t m, int64_t k,
                   const Codes& out, int threads);

// acc (m, rows) int32 = unsigned weight codes times centred input codes.
void integer_product(const Kernels& kernels, const Weights& w, const Codes& x, int x_bits, int32_t* acc, int threads);

// y (m, rows), row to row y_stride floats: the layer's outputs.
void linear(const Kernels& kernels, const Weights& w, const InputPlan& plan, const Codes& x, float* y, int64_t y_stride, int threads);

// Both in one: from floats to outputs. Codes live in memory of the calling thread.
void quantized_linear(const Kernels& kernels, const Weights& w, const InputPlan& plan, const float* x, int64_t m, float* y, int threads);

// The same for inputs left in floats (weight-only). x: (m, k) floats, already rotated.
void linear_floats(const Kernels& kernels, const Weights& w, const float* x, int64_t x_stride, int64_t m, float* y, int64_t y_stride,
                   int threads);

// Words of a row of k packed codes, and its code i.
constexpr int64_t packed_words(int64_t k, int bits) { return (k * bits + 31) / 32; }
inline unsigned packed_code(const uint32_t* row, int64_t i, int bits) {
  const int64_t bit = i * bits, word = bit / 32;
  uint64_t pair = row[word];
  if (bit % 32 + bits > 32) pair |= static_cast<uint64_t>(row[word + 1]) << 32;
  return static_cast<unsigned>(pair >> (bit % 32)) & ((1u << bits) - 1);
}

// Rearrange the packed file format (rows, packed words) to panels; sums: (rows) int32, of the unsigned codes.
void arrange(const uint32_t* words, int64_t rows, int64_t k, int bits, uint8_t* out, int32_t* sums, int threads);

}  // namespace bitbell
