#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "linear.hpp"
#include "pool.hpp"

namespace bitbell {
namespace {

constexpr int64_t kKeyTile = 128;       // keys that stay in the first cache while all queries of a group meet them
constexpr int64_t kGroupQueries = 16;    // queries of a group, about
constexpr int64_t kDenseTile = 16;       // rows of a dense matrix that stay in cache while all inputs meet them
constexpr double kWorkOfThread = 65536;  // bytes to read that are worth a thread: some microseconds

void require(bool holds, const std::string& name, int64_t value, const std::string& allowed) {
  if (!holds) throw std::invalid_argument(name + " = " + std::to_string(value) + ", must be " + allowed);
}

std::string below(int64_t limit) { return "0 to " + std::to_string(limit - 1); }

template <class F>
void over(int threads, int64_t count, F&& body) {
  if (count <= 0) return;
  if (threads <= 1 || count == 1) {
    body(0, count, 0);
  } else {
    parallel_for(threads, count, 1, body);
  }
}

int threads_for(int threads, double bytes) {
  return static_cast<int>(std::clamp(bytes / kWorkOfThread, 1.0, static_cast<double>(threads)));
}

// Rows of a transformer's width take a microsecond or more each, a region about as long: worth it from two rows a thread.
int threads_for_rows(int threads, int64_t rows) { return static_cast<int>(std::clamp<int64_t>(rows / 2, 1, threads)); }

int64_t bytes_of_dense(int type) { return type == 0 ? 4 : 2; }

double weight_bytes(const LlamaLinear& layer) {
  if (!layer.dense) return static_cast<double>(arranged_bytes(layer.w.rows, layer.w.k, layer.w.bits));
  return static_cast<double>(layer.w.rows) * layer.w.k * bytes_of_dense(layer.dense_type);
}

// Whether two layers that are fed by one tensor take it in the same form.
bool same_input(const LlamaLinear& a, const LlamaLinear& b) {
  if (a.dense || b.dense) return a.dense && b.dense;
  return a.plan == b.plan && (a.plan || a.rotation == b.rotation);
}

// Rows [64 * begin, 64 * end) of packed weights, as weights of their own.
Weights panels_between(const Weights& w, int64_t begin, int64_t end) {
  Weights part = w;
  const int64_t row = begin * kPanelRows;
  part.data += begin * panel_bytes(w.k, w.bits);
  part.rows = std::min(w.rows, end * kPanelRows) - row;
  part.sums += row;
  part.scale += row;
  if (part.offset) part.offset += row;
  if (part.bias) part.bias += row;
  return part;
}

float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 0x3ffu;
  float out;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2**-24
    out = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -out : out;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

void read_row(const LlamaConfig& config, int64_t token, float* out) {
  const int64_t n = config.width;
  if (config.embedding_type == 0) {
    std::memcpy(out, static_cast<const float*>(config.embedding) + token * n, n * sizeof(float));
  } else if (config.embedding_type == 1) {
    const uint16_t* row = static_cast<const uint16_t*>(config.embedding) + token * n;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(row[i]) << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    }
  } else if (config.embedding_type == 2) {
    const uint16_t* row = static_cast<const uint16_t*>(config.embedding) + token * n;
    for (int64_t i = 0; i < n; ++i) out[i] = float_of_half(row[i]);
  } else {
    const int8_t* row = static_cast<const int8_t*>(config.embedding) + token * n;
    const float scale = config.embedding_scale[token];
    for (int64_t i = 0; i < n; ++i) out[i] = row[i] * scale;
  }
}

// out = x turned by the angles of one position, times scale; halves of a head turn together (transformers' rotate_half).
// `out` may be x.
void turn(const float* x, const float* cosines, const float* sines, int64_t half, float scale, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    out[i] = (low * cosines[i] - high * sines[i]) * scale;
    out[i + half] = (high * cosines[i] + low * sines[i]) * scale;
  }
}

// y += factors[0] * rows[0] + factors[1] * rows[1] ...; rows of n floats, `stride` apart.
void add_rows(const Kernels& kernels, float* y, const float* rows, int64_t stride, const float* factors, int64_t count,
              int64_t n) {
  for (int64_t i = 0; i < count; ++i) kernels.add_scaled(y, rows + i * stride, factors[i], n);
}

void check_linear(const std::string& name, const LlamaLinear& layer, int64_t rows, int64_t k) {
  require(layer.w.rows == rows, name + ": rows", layer.w.rows, std::to_string(rows));
  require(layer.w.k == k, name + ": k", layer.w.k, std::to_string(k));
  if (layer.dense) {
    require(layer.dense_type >= 0 && layer.dense_type <= 2, name + ": dense_type", layer.dense_type, "0, 1 or 2");
    return;
  }
  const int64_t rotation = layer.plan ? layer.plan->rotation : layer.rotation;
  require(layer.w.data && layer.w.sums && layer.w.scale, name + ": data, sums or scale", 0, "addresses");
  require(layer.w.bits >= 1 && layer.w.bits <= 8, name + ": bits", layer.w.bits, "1 to 8");
  require(rotation >= 1 && (rotation & (rotation - 1)) == 0 && k % rotation == 0, name + ": rotation", rotation,
          "a power of two that divides " + std::to_string(k));
  require(!layer.plan || !layer.w.table, name + ": table with a plan", 1, "absent: looked-up levels take float inputs");
}

void check_config(const LlamaConfig& c, int64_t layers, int64_t slots, int64_t positions) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"blocks", layers},       {"width", c.width},               {"heads", c.heads},           {"kv_heads", c.kv_heads},
      {"head_dim", c.head_dim}, {"feed_forward", c.feed_forward}, {"vocabulary", c.vocabulary}, {"slots", slots}};
  for (const auto& size : sizes) {
    require(size.second >= 1 && size.second < (int64_t{1} << 24), size.first, size.second, "1 to 16777215");
  }
  require(c.heads % c.kv_heads == 0, "kv_heads", c.kv_heads, "a divisor of heads = " + std::to_string(c.heads));
  require(c.head_dim % 2 == 0, "head_dim", c.head_dim, "even");
  require(positions >= 1 && positions <= c.max_positions, "positions", positions, "1 to " + std::to_string(c.max_positions));
  require(c.cosines && c.sines && c.embedding && c.final_norm, "cosines, sines, embedding or final_norm", 0, "addresses");
  require(c.embedding_type >= 0 && c.embedding_type <= 3, "embedding_type", c.embedding_type, "0 to 3");
  require(c.embedding_type != 3 || c.embedding_scale, "embedding_scale", 0, "an address where the embedding is int8");
}

void check_block(const std::string& name, const LlamaBlock& block, const LlamaConfig& c) {
  const int64_t queries = c.heads * c.head_dim, keys = c.kv_heads * c.head_dim;
  require(block.attention_norm && block.feed_forward_norm, name + ": attention_norm or feed_forward_norm", 0, "addresses");
  check_linear(name + ".q", block.q, queries, c.width);
  check_linear(name + ".k", block.k, keys, c.width);
  check_linear(name + ".v", block.v, keys, c.width);
  check_linear(name + ".o", block.o, c.width, queries);
  check_linear(name + ".gate", block.gate, c.feed_forward, c.width);
  check_linear(name + ".up", block.up, c.feed_forward, c.width);
  check_linear(name + ".down", block.down, c.width, c.feed_forward);
}

Buffer zeros(int64_t rows, int64_t stride) {
  const size_t bytes = static_cast<size_t>(rows) * stride * sizeof(float);
  Buffer buffer(bytes);
  std::memset(buffer.as<void>(), 0, bytes);
  return buffer;
}

}  // namespace

Buffer::Buffer(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
  if (!data_) throw std::bad_alloc();
}
Buffer::~Buffer() { std::free(data_); }
Buffer::Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

Llama::Llama(const LlamaConfig& config, std::vector<LlamaBlock> blocks, int64_t slots, int64_t positions)
    : config_(config), blocks_(std::move(blocks)), slots_(slots), positions_(positions) {
  const int64_t layers = static_cast<int64_t>(blocks_.size());
  check_config(config_, layers, slots, positions);
  for (int64_t i = 0; i < layers; ++i) check_block("blocks[" + std::to_string(i) + "]", blocks_[i], config_);
  check_linear("head", config_.head, config_.vocabulary, config_.width);
  room_ = round_up(positions, kKeyTile);
  const double floats = 1.0 * layers * slots * config_.kv_heads * room_ * config_.head_dim;
  if (floats > 1e15) throw std::bad_alloc();
  keys_ = Buffer(static_cast<size_t>(floats) * sizeof(float));
  values_ = Buffer(static_cast<size_t>(floats) * sizeof(float));
  length_.assign(slots, 0);
  next_.assign(slots, -1);
  last_.assign(slots, -1);

  // Rows a multiple of 4 KiB apart would fight for the same lines of the first-level cache.
  const auto stride = [](int64_t columns) { return padded_k(columns) + 16; };
  width_stride_ = stride(config_.width);
  query_stride_ = stride(config_.heads * config_.head_dim);
  kv_stride_ = stride(config_.kv_heads * config_.head_dim);
  wide_stride_ = stride(config_.feed_forward);
  entered_stride_ = round_up(std::max({width_stride_, query_stride_, wide_stride_}), 64);
  for (Buffer* buffer : {&hidden_, &added_, &normed_}) *buffer = zeros(kChunkRows, width_stride_);
  for (Buffer* buffer : {&query_, &attended_}) *buffer = zeros(kChunkRows, query_stride_);
  for (Buffer* buffer : {&key_, &value_}) *buffer = zeros(kChunkRows, kv_stride_);
  for (Buffer* buffer : {&gate_, &up_, &activated_}) *buffer = zeros(kChunkRows, wide_stride_);
  rotated_ = zeros(kChunkRows, entered_stride_);
  codes_ = Buffer(kChunkRows * entered_stride_);
  code_steps_ = Buffer(kChunkRows * sizeof(float));
  code_sums_ = Buffer(kChunkRows * sizeof(int32_t));
  group_rows_ = std::max<int64_t>(1, kGroupQueries / (config_.heads / config_.kv_heads));
  scores_stride_ = round_up(positions, 16);
  groups_.reserve(kChunkRows);
  wanted_.reserve(kChunkRows);
  candidates_.reserve(config_.vocabulary);
  logits_ = Buffer(config_.vocabulary * sizeof(float));
}

void Llama::check_slot(int64_t slot) const { require(slot >= 0 && slot < slots_, "slot", slot, below(slots_)); }

int64_t Llama::length(int64_t slot) const {
  check_slot(slot);
  return length_[slot];
}

void Llama::rewind(int64_t slot, int64_t length) {
  check_slot(slot);
  require(length >= 0 && length <= length_[slot], "length", length, "0 to " + std::to_string(length_[slot]));
  length_[slot] = length;
}

void Llama::check(const int64_t* tokens, int64_t rows, const int64_t* slot, const int64_t* position) {
  const auto at = [](const char* name, int64_t row) { return std::string(name) + "[" + std::to_string(row) + "]"; };
  for (int64_t row = 0; row < rows; ++row) {
    if (slot[row] < 0 || slot[row] >= slots_) require(false, at("slots", row), slot[row], below(slots_));
    next_[slot[row]] = -1;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t s = slot[row], p = position[row];
    if (tokens[row] < 0 || tokens[row] >= config_.vocabulary) {
      require(false, at("tokens", row), tokens[row], below(config_.vocabulary));
    }
    if (p < 0 || p >= positions_) require(false, at("positions", row), p, below(positions_));
    if (next_[s] >= 0 && p != next_[s]) {
      require(false, at("positions", row), p, std::to_string(next_[s]) + ", the next of slot " + std::to_string(s));
    }
    if (next_[s] < 0 && p > length_[s]) {
      require(false, at("positions", row), p,
              "at most " + std::to_string(length_[s]) + ", the length of slot " + std::to_string(s));
    }
    next_[s] = p + 1;
    last_[s] = row;
  }
}

void Llama::reserve(int threads) {
  require(threads >= 1 && threads <= kMaxThreads, "threads", threads, "1 to " + std::to_string(kMaxThreads));
  if (threads <= threads_) return;
  const int64_t queries = group_rows_ * (config_.heads / config_.kv_heads);
  scores_ = Buffer(static_cast<size_t>(threads) * queries * scores_stride_ * sizeof(float));
  threads_ = threads;
}

void Llama::forward(const Kernels& kernels, const int64_t* tokens, int64_t rows, const int64_t* slot, const int64_t* position,
                    const bool* want_logits, float* logits, int threads) {
  require(rows >= 0, "rows", rows, "0 or more");
  check(tokens, rows, slot, position);
  const Eager eager;
  reserve(threads);
  for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
    const int64_t count = std::min(kChunkRows, rows - begin);
    const Step step{kernels, threads, count, tokens + begin, slot + begin, position + begin};
    wanted_.clear();
    for (int64_t row = 0; row < count; ++row) {
      const bool wanted = want_logits ? want_logits[begin + row] : last_[slot[begin + row]] == begin + row;
      if (wanted) wanted_.push_back(row);
    }
    embed(step);
    group_rows(step);
    run_blocks(step, !wanted_.empty());
    const int64_t written = static_cast<int64_t>(wanted_.size());
    write_logits(step, written, logits);
    logits += written * config_.vocabulary;
    for (int64_t row = 0; row < count; ++row) length_[step.slot[row]] = step.position[row] + 1;
  }
}

void Llama::embed(const Step& step) {
  for (int64_t row = 0; row < step.rows; ++row) {
    read_row(config_, step.tokens[row], hidden_.as<float>() + row * width_stride_);
  }
}

void Llama::group_rows(const Step& step) {
  groups_.clear();
  for (int64_t row = 0; row < step.rows; ++row) {
    const bool joins = !groups_.empty() && step.slot[row] == step.slot[row - 1] && groups_.back().count < group_rows_;
    if (joins) {
      ++groups_.back().count;
    } else {
      groups_.push_back({row, 1});
    }
  }
}

void Llama::run_blocks(const Step& step, bool wanted) {
  const Kernels& kernels = step.kernels;
  float *hidden = hidden_.as<float>(), *added = added_.as<float>(), *normed = normed_.as<float>();
  float *gate = gate_.as<float>(), *up = up_.as<float>(), *activated = activated_.as<float>();
  const int64_t n = config_.width, layers = static_cast<int64_t>(blocks_.size());
  const auto norm = [&](const float* weight, bool add) {
    return [=, &kernels](int64_t begin, int64_t end) {
      for (int64_t at = begin * width_stride_; at < end * width_stride_; at += width_stride_) {
        if (add) kernels.add_scaled(hidden + at, added + at, 1.0f, n);
        kernels.rms_norm(hidden + at, weight, config_.epsilon, normed + at, n);
      }
    };
  };
  const auto activate = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * wide_stride_; at < end * wide_stride_; at += wide_stride_) {
      kernels.silu_times(gate + at, up + at, activated + at, config_.feed_forward);
    }
  };
  for (int64_t i = 0; i < layers; ++i) {
    const LlamaBlock& block = blocks_[i];
    const Product qkv[] = {{&block.q, query_.as<float>(), query_stride_},
                           {&block.k, key_.as<float>(), kv_stride_},
                           {&block.v, value_.as<float>(), kv_stride_}};
    const Product o[] = {{&block.o, added, width_stride_}}, down[] = {{&block.down, added, width_stride_}};
    const Product gate_up[] = {{&block.gate, gate, wide_stride_}, {&block.up, up, wide_stride_}};
    multiply(step, qkv, 3, step.rows, normed, width_stride_, norm(block.attention_norm, i > 0));
    over(threads_for_rows(step.threads, step.rows), step.rows,
         [&](int64_t begin, int64_t end, int) { store_keys(step, i, begin, end); });
    if (i + 1 == layers && !wanted) return;  // later tokens need this layer's keys and values, nobody its outputs
    attend(step, i);
    multiply(step, o, 1, step.rows, attended_.as<float>(), query_stride_, [](int64_t, int64_t) {});
    multiply(step, gate_up, 2, step.rows, normed, width_stride_, norm(block.feed_forward_norm, true));
    multiply(step, down, 1, step.rows, activated, wide_stride_, activate);
  }
}

void Llama::write_logits(const Step& step, int64_t count, float* logits) {
  if (count == 0) return;
  const Product head[] = {{&config_.head, logits, config_.vocabulary}};
  const auto norm = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = wanted_[i] * width_stride_, n = config_.width;
      step.kernels.add_scaled(hidden_.as<float>() + at, added_.as<float>() + at, 1.0f, n);
      float* normed = normed_.as<float>() + i * width_stride_;
      step.kernels.rms_norm(hidden_.as<float>() + at, config_.final_norm, config_.epsilon, normed, n);
    }
  };
  multiply(step, head, 1, count, normed_.as<float>(), width_stride_, norm);
}

// y = x times each product's weights, with `before(begin, end)` making rows of x. Neighbours that take x in the same form
// share one region over rows, that makes the form, and one over the panels of all their weights.
template <class Before>
void Llama::multiply(const Step& step, const Product* products, int count, int64_t rows, const float* x, int64_t x_stride,
                     Before&& before) {
  for (int first = 0, end = 0; first < count; first = end) {
    int64_t panels = 0;
    double bytes = 0;
    for (; end < count && same_input(*products[first].layer, *products[end].layer); ++end) {
      panels += panels_of(products[end].layer->w.rows);
      bytes += weight_bytes(*products[end].layer);
    }
    over(threads_for_rows(step.threads, rows), rows, [&](int64_t from, int64_t to, int) {
      if (first == 0) before(from, to);
      enter(step.kernels, *products[first].layer, x, x_stride, from, to);
    });
    over(threads_for(step.threads, bytes * rows), panels, [&](int64_t from, int64_t to, int) {
      for (int i = first; i < end && to > 0; ++i) {
        const int64_t own = panels_of(products[i].layer->w.rows);
        const int64_t begin = std::max<int64_t>(from, 0), stop = std::min(to, own);
        if (begin < stop) multiply_panels(step.kernels, products[i], x, x_stride, rows, begin, stop);
        from -= own;
        to -= own;
      }
    });
  }
}

// Rows [begin, end) of x in the form that the layer takes: codes, or rotated floats.
void Llama::enter(const Kernels& kernels, const LlamaLinear& layer, const float* x, int64_t x_stride, int64_t begin,
                  int64_t end) {
  if (layer.dense || (!layer.plan && layer.rotation == 1)) return;
  const int64_t k = layer.w.k;
  for (int64_t row = begin; row < end; ++row) {
    float* rotated = rotated_.as<float>() + row * entered_stride_;
    if (layer.plan) {
      // Row by row: NaN in one sequence must not reach the others of the call, as it would in one tensor.
      int8_t* codes = codes_.as<int8_t>() + row * entered_stride_;
      float* step = code_steps_.as<float>() + row;
      int32_t* sum = code_sums_.as<int32_t>() + row;
      kernels.quantize(*layer.plan, x + row * x_stride, k, codes, step, sum, rotated);
    } else {
      kernels.rotate(x + row * x_stride, rotated, k, layer.rotation);
      std::fill(rotated + k, rotated + padded_k(k), 0.0f);  // a wider layer may have written there
    }
  }
}

void Llama::multiply_panels(const Kernels& kernels, const Product& product, const float* x, int64_t x_stride, int64_t rows,
                            int64_t begin, int64_t end) {
  const LlamaLinear& layer = *product.layer;
  const int64_t first = begin * kPanelRows, last = std::min(layer.w.rows, end * kPanelRows);
  if (layer.dense) {
    const int64_t tile = rows == 1 ? last - first : kDenseTile;
    for (int64_t at = first; at < last; at += tile) {
      const int64_t count = std::min(tile, last - at);
      for (int64_t row = 0; row < rows; ++row) {
        float* y = product.y + row * product.stride + at;
        kernels.dense(layer.dense, layer.dense_type, at, count, layer.w.k, x + row * x_stride, y);
        if (layer.w.bias) kernels.add_scaled(y, layer.w.bias + at, 1.0f, count);
      }
    }
    return;
  }
  const Weights part = panels_between(layer.w, begin, end);
  if (layer.plan) {
    Codes codes{codes_.as<int8_t>(), entered_stride_, code_steps_.as<float>(), code_sums_.as<int32_t>(), rows};
    linear(kernels, part, *layer.plan, codes, product.y + first, product.stride, 1);
  } else if (layer.rotation > 1) {
    linear_floats(kernels, part, rotated_.as<float>(), entered_stride_, rows, product.y + first, product.stride, 1);
  } else {
    linear_floats(kernels, part, x, x_stride, rows, product.y + first, product.stride, 1);
  }
}

float* Llama::cache(const Buffer& buffer, int64_t layer, int64_t slot, int64_t kv_head) const {
  return buffer.as<float>() + ((layer * slots_ + slot) * config_.kv_heads + kv_head) * room_ * config_.head_dim;
}

// Turn queries and keys of rows [begin, end) by their positions; keys and values go to the cache.
void Llama::store_keys(const Step& step, int64_t layer, int64_t begin, int64_t end) {
  const int64_t n = config_.head_dim, half = n / 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = step.slot[row], position = step.position[row];
    const float *cosines = config_.cosines + position * half, *sines = config_.sines + position * half;
    float* query = query_.as<float>() + row * query_stride_;
    for (int64_t head = 0; head < config_.heads; ++head) {
      turn(query + head * n, cosines, sines, half, config_.attention_scale, query + head * n);
    }
    float* key = key_.as<float>() + row * kv_stride_;
    const float* value = value_.as<float>() + row * kv_stride_;
    for (int64_t head = 0; head < config_.kv_heads; ++head) {
      turn(key + head * n, cosines, sines, half, 1.0f, key + head * n);
      float* column = cache(keys_, layer, slot, head) + position / kKeyTile * kKeyTile * n + position % kKeyTile;
      for (int64_t i = 0; i < n; ++i) column[i * kKeyTile] = key[head * n + i];
      std::memcpy(cache(values_, layer, slot, head) + position * n, value + head * n, n * sizeof(float));
    }
  }
}

void Llama::attend(const Step& step, int64_t layer) {
  const int64_t groups = static_cast<int64_t>(groups_.size()), items = config_.kv_heads * groups;
  const int64_t shared = config_.heads / config_.kv_heads, scores_of_thread = group_rows_ * shared * scores_stride_;
  double bytes = 0;
  for (int64_t row = 0; row < step.rows; ++row) bytes += 8.0 * (step.position[row] + 1) * config_.heads * config_.head_dim;
  const int threads = threads_for(step.threads, bytes);
  // A kv head and a group of rows are an item. Where there are few, their queries are shared out too.
  const bool even = items >= 4 * threads || (groups == step.rows && items % threads == 0);
  const int64_t pieces = even ? 1 : std::min(round_up(4 * threads, items) / items, group_rows_ * shared);
  // Heads outside: in decoding every thread has the same heads at each token, and finds them in its own cache.
  over(threads, items * pieces, [&](int64_t begin, int64_t end, int thread) {
    float* scores = scores_.as<float>() + thread * scores_of_thread;
    for (int64_t i = begin; i < end; ++i) {
      const Group& group = groups_[i / pieces % groups];
      const int64_t queries = group.count * shared, part = i % pieces;
      attend_group(step, layer, group, i / pieces / groups, queries * part / pieces, queries * (part + 1) / pieces, scores);
    }
  });
}

// Outputs of queries [first, last) of a group's rows and the query heads of one kv head: each tile of keys and values is
// read once for all of them.
void Llama::attend_group(const Step& step, int64_t layer, const Group& group, int64_t kv_head, int64_t first, int64_t last,
                         float* scores) {
  const Kernels& kernels = step.kernels;
  const int64_t n = config_.head_dim, shared = config_.heads / config_.kv_heads;
  const int64_t slot = step.slot[group.first], longest = first < last ? step.position[group.first + (last - 1) / shared] + 1 : 0;
  const float *keys = cache(keys_, layer, slot, kv_head), *values = cache(values_, layer, slot, kv_head);
  const auto place = [&](int64_t query) {
    return (group.first + query / shared) * query_stride_ + (kv_head * shared + query % shared) * n;
  };
  const auto seen = [&](int64_t query) { return step.position[group.first + query / shared] + 1; };
  for (int64_t tile = 0; tile < longest; tile += kKeyTile) {
    for (int64_t query = first; query < last; ++query) {
      const int64_t count = std::min(kKeyTile, seen(query) - tile);
      if (count <= 0) continue;
      float* out = scores + query * scores_stride_ + tile;
      std::fill_n(out, count, 0.0f);
      add_rows(kernels, out, keys + tile * n, kKeyTile, query_.as<float>() + place(query), n, count);
    }
  }
  for (int64_t query = first; query < last; ++query) {
    kernels.softmax(scores + query * scores_stride_, seen(query));
    std::fill_n(attended_.as<float>() + place(query), n, 0.0f);
  }
  for (int64_t tile = 0; tile < longest; tile += kKeyTile) {
    for (int64_t query = first; query < last; ++query) {
      const int64_t count = std::min(kKeyTile, seen(query) - tile);
      float* out = attended_.as<float>() + place(query);
      add_rows(kernels, out, values + tile * n, n, scores + query * scores_stride_ + tile, count, n);
    }
  }
}

int64_t Llama::generate(const Kernels& kernels, const int64_t* prompt, int64_t count, int64_t slot, int64_t max_new_tokens,
                        const int64_t* end_tokens, int64_t end_count, const Sampling& how, uint64_t* random_state, int64_t* out,
                        const std::atomic<bool>* cancel, const Progress& progress, int threads) {
  check_slot(slot);
  require(count >= 1, "tokens of the prompt", count, "1 or more");
  require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more");
  // The last new token is not fed back, so it needs no position.
  const int64_t room = positions_ - length_[slot] - count + 1;
  require(max_new_tokens <= room, "max_new_tokens", max_new_tokens,
          "at most " + std::to_string(room) + ", the room that the prompt leaves in slot " + std::to_string(slot));
  check_sampling(how, config_.vocabulary);
  const Eager eager;  // between tokens too
  for (int64_t i = 0; i < count; ++i) {
    require(prompt[i] >= 0 && prompt[i] < config_.vocabulary, "tokens", prompt[i], below(config_.vocabulary));
  }
  const auto go_on = [&](int64_t token) {
    if (cancel && cancel->load(std::memory_order_relaxed)) return false;
    return !progress.report || progress.report(progress.context, token);
  };
  int64_t slots[kChunkRows], places[kChunkRows];
  bool want[kChunkRows];
  std::fill_n(slots, kChunkRows, slot);
  std::fill_n(want, kChunkRows, false);
  for (int64_t begin = 0; begin < count; begin += kChunkRows) {
    const int64_t rows = std::min(kChunkRows, count - begin);
    for (int64_t row = 0; row < rows; ++row) places[row] = length_[slot] + row;
    want[rows - 1] = begin + rows == count;
    forward(kernels, prompt + begin, rows, slots, places, want, logits_.as<float>(), threads);
    if (!go_on(-1)) return 0;
  }
  want[0] = true;
  for (int64_t made = 0;;) {
    const int64_t token = sample(logits_.as<float>(), config_.vocabulary, how, random_state, candidates_);
    if (token < 0) throw std::runtime_error("logits hold NaN or infinity after " + std::to_string(length_[slot]) + " tokens");
    out[made++] = token;
    const bool ended = std::find(end_tokens, end_tokens + end_count, token) != end_tokens + end_count;
    if (!go_on(token) || ended || made == max_new_tokens) return made;
    places[0] = length_[slot];
    forward(kernels, &token, 1, slots, places, want, logits_.as<float>(), threads);
  }
}

}  // namespace bitbell
