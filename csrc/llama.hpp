// The step of LLaMA-family models (transformers' LlamaForCausalLM), from tokens to logits, in one call.
//
// A Llama serves several sequences: each has a slot with keys and values of its own, and a call takes rows of any slots.
// Memory of weights is borrowed; everything else is owned and taken once, so that a step allocates nothing.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "sampling.hpp"

namespace bitbell {

constexpr int64_t kChunkRows = 128;  // rows that go through the model together; a longer prompt takes several chunks

// One of three kinds: packed weights and quantized inputs (plan), packed weights and float inputs (no plan), dense.
struct LlamaLinear {
  Weights w;                        // of a dense matrix only rows, k and bias
  const InputPlan* plan = nullptr;  // layers fed by one tensor that name the same plan quantize it once
  int64_t rotation = 1;             // block by which the inputs of packed weights without a plan rotate
  const void* dense = nullptr;      // (rows, k), or null
  int dense_type = 0;               // 0 float32, 1 bfloat16, 2 float16
};

struct LlamaBlock {
  const float* attention_norm = nullptr;     // (width)
  LlamaLinear q, k, v, o;
  const float* feed_forward_norm = nullptr;  // (width)
  LlamaLinear gate, up, down;
};

struct LlamaConfig {
  int64_t width = 0, heads = 0, kv_heads = 0, head_dim = 0, feed_forward = 0, vocabulary = 0;
  float epsilon = 1e-6f;
  float attention_scale = 1;                 // of q . k
  int64_t max_positions = 0;
  const float* cosines = nullptr;            // (max_positions, head_dim / 2), scaling included
  const float* sines = nullptr;
  const void* embedding = nullptr;           // (vocabulary, width)
  int embedding_type = 0;                    // 0 float32, 1 bfloat16, 2 float16, 3 int8
  const float* embedding_scale = nullptr;    // (vocabulary): value of one step of a row of int8
  const float* final_norm = nullptr;         // (width)
  LlamaLinear head;
};

// Memory on a 64-byte boundary; not cleared, so that pages are taken when they are first written.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

// Called after each token, and with -1 after each chunk of the prompt; false stops.
struct Progress {
  bool (*report)(void* context, int64_t token) = nullptr;
  void* context = nullptr;
};

class Llama {
 public:
  // Throws std::invalid_argument where shapes do not fit, std::bad_alloc where memory does not.
  Llama(const LlamaConfig& config, std::vector<LlamaBlock> blocks, int64_t slots, int64_t positions);

  // Each row is a token of a slot at a position; rows of one slot have rising positions, the first of them at most the
  // slot's length (a smaller one rewinds). want_logits: per row, or null for the last row of each slot.
  // logits: (wanted rows, vocabulary). Throws std::invalid_argument before anything is written.
  void forward(const Kernels& kernels, const int64_t* tokens, int64_t rows, const int64_t* slot, const int64_t* position,
               const bool* want_logits, float* logits, int threads);

  // Append the prompt and then up to max_new_tokens to a slot; returns how many went to `out` (an end token included).
  // Stops at one of end_tokens, when `cancel` is set, or when `progress` says so. Throws std::runtime_error for NaN.
  int64_t generate(const Kernels& kernels, const int64_t* prompt, int64_t count, int64_t slot, int64_t max_new_tokens,
                   const int64_t* end_tokens, int64_t end_count, const Sampling& how, uint64_t* random_state, int64_t* out,
                   const std::atomic<bool>* cancel, const Progress& progress, int threads);

  void reset(int64_t slot) { rewind(slot, 0); }
  void rewind(int64_t slot, int64_t length);  // forget what is beyond `length` tokens
  int64_t length(int64_t slot) const;
  int64_t slots() const { return slots_; }
  int64_t positions() const { return positions_; }
  int64_t vocabulary() const { return config_.vocabulary; }

 private:
  // Consecutive rows of one slot that attend together, so that a key is read once for all of them.
  struct Group {
    int64_t first, count;
  };
  struct Product {
    const LlamaLinear* layer;
    float* y;
    int64_t stride;
  };
  struct Step {
    const Kernels& kernels;
    int threads;
    int64_t rows;             // of this chunk
    const int64_t *tokens, *slot, *position;
  };

  void check(const int64_t* tokens, int64_t rows, const int64_t* slot, const int64_t* position);
  void check_slot(int64_t slot) const;
  void reserve(int threads);
  void embed(const Step& step);
  void group_rows(const Step& step);
  void run_blocks(const Step& step, bool wanted);
  void write_logits(const Step& step, int64_t count, float* logits);
  void store_keys(const Step& step, int64_t layer, int64_t begin, int64_t end);
  void attend(const Step& step, int64_t layer);
  void attend_group(const Step& step, int64_t layer, const Group& group, int64_t kv_head, int64_t first, int64_t last, float* scores);
  template <class Before>
  void multiply(const Step& step, const Product* products, int count, int64_t rows, const float* x, int64_t x_stride,
                Before&& before);
  void enter(const Kernels& kernels, const LlamaLinear& layer, const float* x, int64_t x_stride, int64_t begin, int64_t end);
  void multiply_panels(const Kernels& kernels, const Product& product, const float* x, int64_t x_stride, int64_t rows,
                       int64_t begin, int64_t end);
  float* cache(const Buffer& buffer, int64_t layer, int64_t slot, int64_t kv_head) const;

  LlamaConfig config_;
  std::vector<LlamaBlock> blocks_;
  int64_t slots_, positions_;
  // float32 (layers, slots, kv heads, room_, head_dim); keys lie in tiles of positions, transposed, so that the scores of
  // neighbouring positions are sums of vectors.
  Buffer keys_, values_;
  int64_t room_;                       // positions, up to a whole tile
  std::vector<int64_t> length_;        // per slot
  std::vector<int64_t> next_, last_;   // per slot: what check() follows; the last row of the call

  // Scratch of a chunk: (kChunkRows, stride) floats, zero beyond a row's own, as products of padded weights need it.
  int64_t width_stride_, query_stride_, kv_stride_, wide_stride_, entered_stride_;
  Buffer hidden_, added_, normed_, query_, key_, value_, attended_, gate_, up_, activated_, rotated_;
  Buffer codes_, code_steps_, code_sums_;  // of the product at hand
  Buffer scores_;                          // (threads, rows of a group x query heads of a kv head, positions)
  int64_t group_rows_, scores_stride_;
  int threads_ = 0;
  std::vector<Group> groups_;
  std::vector<Candidate> candidates_;
  Buffer logits_;                          // of generate: (vocabulary)
  std::vector<int64_t> wanted_;
};

}  // namespace bitbell
