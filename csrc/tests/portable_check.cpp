// Every usable level against plain loops, on random shapes and bits, without Python. Levels have to agree to the last
// bit, and so have machines: the checksum of all results but those of `floats` is printed, to be compared between them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../levels.hpp"
#include "../linear.hpp"

using namespace bitbell;

namespace {

uint64_t state = 1;

uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
int64_t random_to(int64_t low, int64_t high) { return low + random_bits() % (high - low + 1); }
// Roughly normal, the same on every machine: a sum of four exact fractions.
float random_float() {
  int64_t sum = 0;
  for (int i = 0; i < 4; i++) sum += random_to(-(1 << 21), 1 << 21);
  return static_cast<float>(sum) / (1 << 21);
}
std::vector<float> random_floats(int64_t n) {
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = random_float();
  return out;
}

uint64_t checksum = 14695981039346656037u;
bool counting = false;  // results of the first level go into the checksum

template <class T>
void count(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; counting && i < values.size() * sizeof(T); i++) checksum = (checksum ^ bytes[i]) * 1099511628211u;
}

void require(bool holds, const Kernels& kernels, const std::string& what) {
  if (holds) return;
  std::printf("%s: %s\n", kernels.name, what.c_str());
  std::exit(1);
}

void require_close(const Kernels& kernels, const char* what, double got, double expected, double size) {
  const bool close = std::fabs(got - expected) <= 1e-5 * size + 1e-6;
  require(close, kernels, std::string(what) + " gives " + std::to_string(got) + ", expected " + std::to_string(expected));
}

std::vector<double> rotated(const float* x, int64_t k, int64_t block) {
  std::vector<double> y(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; i++) {
    for (int64_t j = 0; j < block; j++) {
      const double value = x[i / block * block + j];
      y[static_cast<size_t>(i)] += __builtin_parityll(static_cast<unsigned long long>(i % block & j)) ? -value : value;
    }
    y[static_cast<size_t>(i)] /= std::sqrt(static_cast<double>(block));
  }
  return y;
}

// One random problem: its shape, its data, and the plan of its inputs.
struct Problem {
  int bits, threads;
  int64_t rows, k, m;
  std::vector<unsigned> weights;  // (rows, k) codes
  std::vector<uint32_t> words;
  std::vector<float> scale, offset, bias, x, thresholds;
  InputPlan plan;

  Problem() {
    bits = static_cast<int>(random_to(1, 8));
    threads = static_cast<int>(random_to(1, 3));
    plan.bits = static_cast<int>(random_to(1, 8));
    plan.rotation = int64_t{1} << random_to(0, 9);
    rows = random_to(1, 200), m = random_to(0, 1) ? 1 : random_to(2, 70);
    k = plan.rotation * random_to(1, std::max<int64_t>(1, 700 / plan.rotation));
    pack();
    scale = random_floats(rows), bias = random_floats(rows), x = random_floats(m * k);
    if (random_to(0, 1)) offset = random_floats(rows);
    choose_plan();
  }

  void pack() {
    const int64_t stride = (k * bits + 31) / 32;
    words.assign(static_cast<size_t>(rows * stride), 0);
    weights.resize(static_cast<size_t>(rows * k));
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < k; i++) {
        const unsigned code = random_bits() >> (32 - bits);
        weights[static_cast<size_t>(r * k + i)] = code;
        for (int64_t b = 0; b < bits; b++)
          words[static_cast<size_t>(r * stride + (i * bits + b) / 32)] |= (code >> b & 1u) << ((i * bits + b) % 32);
      }
  }

  void choose_plan() {
    plan.statistic = static_cast<Statistic>(random_to(0, 3));
    plan.smallest = 1e-6f;
    plan.divisor = plan.statistic == Statistic::none ? 0.0f : 1.5f / static_cast<float>(1 << (plan.bits - 1));
    plan.divisor_plus = plan.statistic == Statistic::none ? 0.4f : 0.0f;
    plan.step_factor = plan.divisor, plan.step_plus = plan.divisor_plus;
    plan.zero_point = 0.25 * static_cast<double>(random_to(-4, 4));
    plan.offset = random_to(0, 1) ? 0.125f : 0.0f;
    if (random_to(0, 1)) return;
    thresholds = random_floats((1 << plan.bits) - 1);
    std::sort(thresholds.begin(), thresholds.end());
    plan.thresholds = thresholds.data();
  }

  unsigned weight(int64_t row, int64_t i) const { return weights[static_cast<size_t>(row * k + i)]; }
};

struct Arranged {
  explicit Arranged(const Problem& p) : room(static_cast<size_t>(arranged_bytes(p.rows, p.k, p.bits) + 63)), sums(static_cast<size_t>(p.rows)) {
    data = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
    arrange(p.words.data(), p.rows, p.k, p.bits, data, sums.data(), p.threads);
  }
  Weights weights(const Problem& p) const {
    Weights w;
    w.data = data, w.bits = p.bits, w.rows = p.rows, w.k = p.k, w.sums = sums.data(), w.scale = p.scale.data();
    w.zero_point = static_cast<double>(1 << p.bits) / 2 - 0.5, w.bias = p.bias.data();
    w.offset = p.offset.empty() ? nullptr : p.offset.data();
    return w;
  }

  std::vector<uint8_t> room;
  std::vector<int32_t> sums;
  uint8_t* data;
};

struct Rows {
  explicit Rows(const Problem& p) : stride(padded_k(p.k) + 64), codes(static_cast<size_t>(p.m * stride)), step(static_cast<size_t>(p.m)), sum(static_cast<size_t>(p.m)) {}
  Codes view() { return {codes.data(), stride, step.data(), sum.data(), static_cast<int64_t>(step.size())}; }
  int code(int64_t row, int64_t i) const { return codes[static_cast<size_t>(row * stride + i)]; }

  int64_t stride;
  std::vector<int8_t> codes;
  std::vector<float> step;
  std::vector<int32_t> sum;
};

double size_of(Statistic statistic, const std::vector<double>& h) {
  double size = 0;
  for (double v : h) {
    if (statistic == Statistic::absmax) size = std::max(size, std::fabs(v));
    if (statistic == Statistic::absmean) size += std::fabs(v) / static_cast<double>(h.size());
    if (statistic == Statistic::rms) size += v * v / static_cast<double>(h.size());
  }
  return statistic == Statistic::rms ? std::sqrt(size) : size;
}

// Codes have to be right wherever the value is not next to a boundary, and the steps and sums everywhere.
void check_codes(const Kernels& kernels, const Problem& p, const Rows& got) {
  const int low = -(1 << (p.plan.bits - 1)), high = -low - 1;
  for (int64_t r = 0; r < p.m; r++) {
    const std::vector<double> h = rotated(p.x.data() + r * p.k, p.k, p.plan.rotation);
    const double size = std::max<double>(size_of(p.plan.statistic, h), p.plan.smallest);
    const double divisor = size * p.plan.divisor + p.plan.divisor_plus;
    require_close(kernels, "step", got.step[static_cast<size_t>(r)], size * p.plan.step_factor + p.plan.step_plus, 1);
    int32_t sum = 0;
    for (int64_t i = 0; i < padded_k(p.k); i++) {
      const int code = got.code(r, i);
      sum += code;
      if (i >= p.k) {
        require(code == 0, kernels, "a code beyond the end is not zero");
        continue;
      }
      const double v = h[static_cast<size_t>(i)] / divisor;
      const auto expected = [&](double at) {
        if (!p.plan.thresholds) return std::clamp(static_cast<int>(std::nearbyint(at - 0.5)), low, high);
        return low + static_cast<int>(std::upper_bound(p.thresholds.begin(), p.thresholds.end(), at) - p.thresholds.begin());
      };
      const double slack = 1e-4 * (1 + std::fabs(v));
      require(code >= expected(v - slack) && code <= expected(v + slack), kernels,
              "code " + std::to_string(code) + " for " + std::to_string(v) + " at " + std::to_string(p.plan.bits) + " bits");
    }
    require(sum == got.sum[static_cast<size_t>(r)], kernels, "the sum of the codes is wrong");
  }
}

// The outputs of a linear layer from its codes, in double.
void check_outputs(const Kernels& kernels, const Problem& p, const Weights& w, const Rows& codes, const std::vector<int32_t>& acc,
                   const std::vector<float>& y) {
  for (int64_t i = 0; i < p.m; i++)
    for (int64_t n = 0; n < p.rows; n++) {
      int64_t product = 0;
      double out = p.bias[static_cast<size_t>(n)], size = std::fabs(out);
      for (int64_t j = 0; j < p.k; j++) {
        product += static_cast<int64_t>(p.weight(n, j)) * codes.code(i, j);
        const double x = (codes.code(i, j) - p.plan.zero_point) * codes.step[static_cast<size_t>(i)] + p.plan.offset;
        const double offset = w.offset ? w.offset[n] : 0;
        const double value = (p.weight(n, j) - w.zero_point) * w.scale[n] + offset;
        out += x * value, size += std::fabs(x * value);
      }
      const auto at = static_cast<size_t>(i * p.rows + n);
      require(acc[at] == product, kernels, "the integer product is wrong at " + std::to_string(p.bits) + " bits");
      require_close(kernels, "linear", y[at], out, size);
    }
}

void check_floats(const Kernels& kernels, const Problem& p, const Weights& w) {
  std::vector<float> y(static_cast<size_t>(p.m * p.rows));
  linear_floats(kernels, w, p.x.data(), p.k, p.m, y.data(), p.rows, p.threads);
  for (int64_t i = 0; i < p.m; i++)
    for (int64_t n = 0; n < p.rows; n++) {
      double out = p.bias[static_cast<size_t>(n)], size = std::fabs(out);
      for (int64_t j = 0; j < p.k; j++) {
        const double offset = w.offset ? w.offset[n] : 0, x = p.x[static_cast<size_t>(i * p.k + j)];
        const double value = (p.weight(n, j) - w.zero_point) * w.scale[n] + offset;
        out += x * value, size += std::fabs(x * (p.weight(n, j) + w.zero_point) * w.scale[n]) + std::fabs(x * offset);
      }
      require_close(kernels, "linear_floats", y[static_cast<size_t>(i * p.rows + n)], out, size);
    }
}

// A transformer's floats; checked by what they have in common with plain loops, and counted.
void check_vectors(const Kernels& kernels, const Problem& p) {
  const int64_t n = p.k;
  std::vector<float> y(static_cast<size_t>(n)), soft(p.x.begin(), p.x.begin() + n);
  const float *a = p.x.data(), *b = p.x.data() + (p.m - 1) * n;
  double dot = 0, squares = 0;
  for (int64_t i = 0; i < n; i++) dot += 1.0 * a[i] * b[i], squares += 1.0 * a[i] * a[i];
  y[0] = kernels.dot(a, b, n);
  require_close(kernels, "dot", y[0], dot, static_cast<double>(n));
  count(y);
  kernels.rms_norm(a, b, 1e-5f, y.data(), n);
  require_close(kernels, "rms_norm", y[0], b[0] * a[0] / std::sqrt(squares / static_cast<double>(n) + 1e-5), 2);
  count(y);
  kernels.silu_times(a, b, y.data(), n);
  for (int64_t i = 0; i < n; i++) require_close(kernels, "silu_times", y[static_cast<size_t>(i)], a[i] / (1 + std::exp(-1.0 * a[i])) * b[i], 4);
  count(y);
  const float largest = kernels.softmax(soft.data(), n);
  double sum = 0, first = 0;
  for (int64_t i = 0; i < n; i++) sum += soft[static_cast<size_t>(i)], first += std::exp(1.0 * a[i] - largest);
  require_close(kernels, "softmax", sum, 1, 1);
  require_close(kernels, "softmax", soft[0], std::exp(1.0 * a[0] - largest) / first, 1);
  count(soft);
}

// All of one problem on one level; what it computed, for the comparison with other levels.
std::string check(const Kernels& kernels, const Problem& p) {
  std::vector<float> turned(p.x.size());
  kernels.rotate(p.x.data(), turned.data(), p.m * p.k, p.plan.rotation);
  for (int64_t r = 0; r < p.m; r++) {
    const std::vector<double> h = rotated(p.x.data() + r * p.k, p.k, p.plan.rotation);
    for (int64_t i = 0; i < p.k; i++) require_close(kernels, "rotate", turned[static_cast<size_t>(r * p.k + i)], h[static_cast<size_t>(i)], 4);
  }
  const Arranged arranged(p);
  const Weights w = arranged.weights(p);
  for (int64_t r = 0; r < p.rows; r++) {
    int32_t sum = 0;
    for (int64_t i = 0; i < p.k; i++) sum += static_cast<int32_t>(p.weight(r, i));
    require(sum == arranged.sums[static_cast<size_t>(r)], kernels, "arrange: a row's sum is wrong");
  }
  Rows rows(p);
  quantize_rows(kernels, p.plan, p.x.data(), p.k, p.m, p.k, rows.view(), p.threads);
  check_codes(kernels, p, rows);
  std::vector<int32_t> acc(static_cast<size_t>(p.m * p.rows));
  std::vector<float> y(acc.size());
  integer_product(kernels, w, rows.view(), p.plan.bits, acc.data(), p.threads);
  linear(kernels, w, p.plan, rows.view(), y.data(), p.rows, p.threads);
  check_outputs(kernels, p, w, rows, acc, y);
  check_floats(kernels, p, w);
  count(turned), count(rows.codes), count(rows.step), count(y);
  check_vectors(kernels, p);
  const auto bytes = [](const auto& v) { return std::string(reinterpret_cast<const char*>(v.data()), v.size() * sizeof v[0]); };
  return bytes(turned) + bytes(rows.codes) + bytes(rows.step) + bytes(y);
}

}  // namespace

int main(int arguments, char** values) {
  const int problems = arguments > 1 ? std::atoi(values[1]) : 60;
  for (int i = 0; i < problems; i++) {
    const Problem problem;
    std::string first;
    for (const Level& level : levels()) {
      if (!level.usable) continue;
      counting = first.empty();
      const std::string computed = check(*level.kernels, problem);
      if (first.empty()) first = computed;
      require(computed == first, *level.kernels, "not the same bits as the first level, problem " + std::to_string(i));
    }
  }
  std::string names;
  for (const Level& level : levels())
    if (level.usable) names += std::string(" ") + level.name;
  std::printf("ok: %d problems on%s\nchecksum %016llx\n", problems, names.c_str(), static_cast<unsigned long long>(checksum));
}
