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

// Rearrange the packed file format (rows, packed words) to panels; sums: (rows) int32, of the unsigned codes.
void arrange(const uint32_t* words, int64_t rows, int64_t k, int bits, uint8_t* out, int32_t* sums, int threads);

}  // namespace bitbell
