// Choosing the next token from logits.
#pragma once
#include <cstdint>
#include <vector>

namespace bitbell {

// temperature 0: the first of the largest logits.
struct Sampling {
  double temperature = 0;
  int64_t top_k = 0;    // 0: no cut
  double top_p = 1;     // 1: no cut
  int64_t allowed = 0;  // tokens below this one may be chosen; 0: all
};

struct Candidate {
  double weight;
  int64_t token;
};

// Throws std::invalid_argument, naming the field, its value and what is allowed.
void check_sampling(const Sampling& how, int64_t n);

// A token, or -1 where an allowed logit is NaN (or, drawing at random, the largest is infinite). As transformers does:
// temperature, then top-k (ties with the last one stay), then top-p on what is left, with the token that crosses it.
// random_state moves on by one step of SplitMix64 (Steele, Lea and Flood, 2014) where a token is drawn at random. Same
// logits and state: same token on every machine. No allocation where `scratch` has room for n.
int64_t sample(const float* logits, int64_t n, const Sampling& how, uint64_t* random_state, std::vector<Candidate>& scratch);

}  // namespace bitbell
