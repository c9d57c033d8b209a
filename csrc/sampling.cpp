#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace bitbell {
namespace {

double next_uniform(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// exp(x) for x <= 0. Written out, because the last bit of std::exp differs from library to library: x = n ln 2 + r with
// |r| <= ln 2 / 2, and a Taylor polynomial whose rest is below double's rounding.
double exponential(double x) {
  if (x < -700) return 0;
  const double n = std::floor(x * 1.4426950408889634 + 0.5);
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double sum = 1;
  for (int i = 14; i >= 1; --i) sum = 1 + sum * r / i;
  return std::ldexp(sum, static_cast<int>(n));
}

int64_t greedy(const float* logits, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(logits[i])) return -1;
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

// Tokens whose logit is at least the k-th largest, rising; all for k = 0. The weights are still logits.
void candidates_of(const float* logits, int64_t n, int64_t k, std::vector<Candidate>& out) {
  double least = -HUGE_VAL;
  out.clear();
  if (k > 0 && k < n) {
    for (int64_t i = 0; i < n; ++i) out.push_back({logits[i], i});
    const auto larger = [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; };
    std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), larger);
    least = out[k - 1].weight;
    out.clear();
  }
  for (int64_t i = 0; i < n; ++i) {
    if (logits[i] >= least) out.push_back({logits[i], i});
  }
}

// Move the likeliest candidates that together weigh at least top_p of `total` to the end of the list, the likeliest last.
// Returns where they begin; `total` becomes their weight.
size_t cut_to(double top_p, std::vector<Candidate>& list, double& total) {
  const auto less = [](const Candidate& a, const Candidate& b) {
    return a.weight < b.weight || (a.weight == b.weight && a.token > b.token);
  };
  std::make_heap(list.begin(), list.end(), less);
  double sum = 0;
  size_t begin = list.size();
  while (begin > 0 && (begin == list.size() || sum < top_p * total)) {
    std::pop_heap(list.begin(), list.begin() + begin, less);
    sum += list[--begin].weight;
  }
  total = sum;
  return begin;
}

template <class T>
[[noreturn]] void refuse(const char* name, T value, const std::string& allowed) {
  std::ostringstream text;
  text << name << " = " << value << ", must be " << allowed;
  throw std::invalid_argument(text.str());
}

}  // namespace

void check_sampling(const Sampling& how, int64_t n) {
  if (!(how.temperature >= 0 && how.temperature < HUGE_VAL)) refuse("temperature", how.temperature, "0 (greedy) or more");
  if (how.top_k < 0) refuse("top_k", how.top_k, "0 (no cut) or more");
  if (!(how.top_p > 0 && how.top_p <= 1)) refuse("top_p", how.top_p, "above 0 and at most 1");
  if (how.allowed < 0 || how.allowed > n) refuse("allowed", how.allowed, "0 (all) to " + std::to_string(n));
}

int64_t sample(const float* logits, int64_t n, const Sampling& how, uint64_t* random_state, std::vector<Candidate>& scratch) {
  check_sampling(how, n);
  if (how.allowed > 0) n = how.allowed;
  if (n < 1) refuse("n", n, "1 or more");
  const int64_t best = greedy(logits, n);
  if (best < 0 || how.temperature == 0) return best;
  const double largest = logits[best];
  if (std::isinf(largest)) return -1;

  candidates_of(logits, n, how.top_k, scratch);
  double total = 0;
  for (Candidate& candidate : scratch) {
    // A temperature near 0 makes this -infinity, or 0 / temperature = 0 for the largest: greedy, as it should be.
    candidate.weight = exponential((candidate.weight - largest) / how.temperature);
    total += candidate.weight;
  }
  const size_t begin = how.top_p < 1 ? cut_to(how.top_p, scratch, total) : 0;
  double left = next_uniform(random_state) * total;
  // From the end, where top-p has put the likeliest; rounding may leave a rest, which goes to the last that has weight.
  int64_t chosen = best;
  for (size_t i = scratch.size(); i-- > begin;) {
    if (scratch[i].weight == 0) continue;
    chosen = scratch[i].token;
    left -= scratch[i].weight;
    if (left < 0) break;
  }
  return chosen;
}

}  // namespace bitbell
