#include "training.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.hpp"

namespace bitbell {
namespace {

// A thread's room for `count` rows of k floats.
struct Room {
  explicit Room(int64_t k, int64_t count = 1) : stride(padded_k(k)), floats(static_cast<size_t>(stride * count)) {}
  float* operator[](int64_t i) { return floats.data() + i * stride; }
  int64_t stride;
  std::vector<float> floats;
};

double sum_over(const std::vector<float>& rows) {
  double sum = 0;
  for (const float value : rows) sum += value;
  return sum;
}

}  // namespace

void quantize_tensor(const Kernels& kernels, const InputPlan& given_plan, const Rows& x, bool by_row, bool given, float* size, int8_t* codes,
                     int bits, void* kept, int kept_type, int threads) {
  const TrainingKernels& training = *kernels.training;
  InputPlan plan = given_plan;
  plan.step_factor = 1, plan.step_plus = 0;
  std::vector<float> sizes(static_cast<size_t>(x.rows));
  if (by_row) {
    plan.statistic = Statistic::rms, plan.divisor = 1, plan.divisor_plus = 0;
  } else {
    float one = given ? *size : 0;
    if (!given) {  // the rotation keeps lengths
      parallel_for(threads, x.rows, 1, [&](int64_t begin, int64_t end, int) {
        Room room(x.k);
        for (int64_t i = begin; i < end; i++) sizes[static_cast<size_t>(i)] = training.squares(x.row(i), x.type, x.k, room[0]);
      });
      one = static_cast<float>(std::sqrt(sum_over(sizes) / static_cast<double>(x.rows * x.k)));
      if (one < plan.smallest) one = plan.smallest;
    }
    plan.statistic = Statistic::none, plan.smallest = 0, plan.divisor_plus = plan.step_plus = one;
  }
  const int64_t kept_bytes = x.k * size_of_type(kept_type);
  parallel_for(threads, x.rows, 1, [&](int64_t begin, int64_t end, int) {
    Room room(x.k);
    std::vector<int8_t> padded(static_cast<size_t>(room.stride));
    const bool fine = kept && kept_type == kInt8, fits = x.k == room.stride && !fine;
    for (int64_t i = begin; i < end; i++) {
      void* keep = kept ? static_cast<char*>(kept) + i * kept_bytes : nullptr;
      int8_t* to = fits ? codes + i * x.k : padded.data();
      training.quantize(plan, x.row(i), x.type, x.k, to, &sizes[static_cast<size_t>(i)], room[0], fine ? nullptr : keep, kept_type);
      if (fine) {
        std::copy(to, to + x.k, static_cast<int8_t*>(keep));
        for (int8_t& code : padded) code = static_cast<int8_t>(code >> (8 - bits));
      }
      if (!fits) std::copy(to, to + x.k, codes + i * x.k);
    }
  });
  if (by_row) {
    std::copy(sizes.begin(), sizes.end(), size);
  } else {
    *size = plan.divisor_plus;
    for (const float value : sizes)
      if (std::isnan(value)) *size = value;
  }
}

void bell_gradient(const Kernels& kernels, const BellTensor& t, int threads) {
  const TrainingKernels& training = *kernels.training;
  const int64_t rows = t.g.rows, k = t.g.k, out_bytes = k * size_of_type(t.out_type);
  const auto slopes = [&](int64_t i, float* v, float* u, float* along) {
    const BellRow row{t.h.row(i), t.g.row(i), t.codes + i * k,         t.h.type,     t.g.type,
                      k,          t.h_rotation, t.inverse_size[t.size_by_row ? i : 0], t.zero_point,  t.bins};
    training.slopes(row, v, u, along, t.levels + i);
  };
  double mean_of_all = 0;
  if (t.radial && !t.by_row) {
    std::vector<float> along(static_cast<size_t>(rows));
    parallel_for(threads, rows, 1, [&](int64_t begin, int64_t end, int) {
      Room room(k, 2);
      for (int64_t i = begin; i < end; i++) slopes(i, room[0], room[1], &along[static_cast<size_t>(i)]);
    });
    mean_of_all = sum_over(along) / static_cast<double>(rows * k);
  }
  parallel_for(threads, rows, 1, [&](int64_t begin, int64_t end, int) {
    Room room(k, 2);
    for (int64_t i = begin; i < end; i++) {
      float along;
      slopes(i, room[0], room[1], &along);
      const float mean = !t.radial ? 0 : t.by_row ? along / static_cast<float>(k) : static_cast<float>(mean_of_all);
      training.gradient(room[0], room[1], k, t.factor[t.factor_by_row ? i : 0], mean, t.rotation, static_cast<char*>(t.out) + i * out_bytes,
                        t.out_type);
    }
  });
}

void sums_of_codes(const Kernels& kernels, const int8_t* codes, int64_t rows, int64_t k, int32_t* sums, int threads) {
  parallel_for(threads, rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) sums[i] = kernels.training->sum_of_codes(codes + i * k, k);
  });
}

void outputs(const Kernels& kernels, const ProductRow& row, const int32_t* acc, const int8_t* x, int64_t rows, const float* x_step,
             bool step_by_row, void* y, int threads) {
  const TrainingKernels& training = *kernels.training;
  const int64_t bytes = row.outputs * size_of_type(row.type);
  parallel_for(threads, rows, 1, [&](int64_t begin, int64_t end, int) {
    Room room(row.outputs);
    for (int64_t i = begin; i < end; i++)
      training.outputs(row, acc + i * row.outputs, training.sum_of_codes(x + i * row.k, row.k), x_step[step_by_row ? i : 0], room[0],
                       static_cast<char*>(y) + i * bytes);
  });
}

}  // namespace bitbell
