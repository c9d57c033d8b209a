// The tensors of a training step, row by row over all threads. Sums over rows are taken in one order, whatever the
// threads are.
#pragma once
#include "kernels.hpp"

namespace bitbell {

// A tensor of (rows, k) numbers: type kFloat32 or kBfloat16.
struct Rows {
  const void* data = nullptr;
  int type = kFloat32;
  int64_t rows = 0, k = 0;

  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * k * size_of_type(type); }
};

// Codes (rows, k) int8 of x by thresholds in units of each row's RMS (by_row: size has `rows` numbers), of the RMS of all of
// x, or of what `size` holds (given). size: what was in use, NaN where x holds NaN or infinity. kept: the rotated x, or null;
// of type kInt8 the codes by the thresholds, which are then of 8 bits, while codes have the uppermost `bits` of them.
void quantize_tensor(const Kernels& kernels, const InputPlan& plan, const Rows& x, bool by_row, bool given, float* size, int8_t* codes,
                     int bits, void* kept, int kept_type, int threads);

// BBQ's gradient of the input: rotate(factor (u - v mean(u v))), u = exp(-v**2 / 2) g, v = h / size, where `by_row` says over
// what the mean goes, and radial whether there is one. inverse_size, factor: one number, or `rows`. levels: (rows), the sums
// of level times g. out: (rows, k).
struct BellTensor {
  Rows g, h;
  int64_t h_rotation = 1, rotation = 1;  // of h that is still to come; of the result
  const int8_t* codes = nullptr;
  const float *inverse_size = nullptr, *factor = nullptr;
  bool size_by_row = false, factor_by_row = false, radial = true, by_row = false;
  float zero_point = 0;
  const float* bins = nullptr;  // of codes of 8 bits, see BellRow
  void* out = nullptr;
  int out_type = kFloat32;
  float* levels = nullptr;
};
void bell_gradient(const Kernels& kernels, const BellTensor& t, int threads);

// sums (rows) of codes (rows, k).
void sums_of_codes(const Kernels& kernels, const int8_t* codes, int64_t rows, int64_t k, int32_t* sums, int threads);

// y (rows, outputs) from products of codes `acc` (rows, outputs) int32, and the input's codes (rows, k) for their sums.
void outputs(const Kernels& kernels, const ProductRow& row, const int32_t* acc, const int8_t* x, int64_t rows, const float* x_step,
             bool step_by_row, void* y, int threads);

}  // namespace bitbell
