// Llama for Python. Every call lets go of the interpreter, and calls of several threads take turns.
#include "llama_binding.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "bindings.hpp"
#include "levels.hpp"
#include "llama.hpp"

namespace nb = nanobind;

namespace bitbell {
namespace {

using Integers = std::vector<int64_t>;
using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Plans by the dict they were read from: layers that name the same dict share one plan, and quantize their input once.
using Plans = std::map<PyObject*, std::unique_ptr<InputPlan>>;

nb::dict dict_entry(const nb::dict& from, const char* key) {
  nb::object value = entry<nb::object>(from, key);
  if (!nb::isinstance<nb::dict>(value)) throw nb::type_error((std::string(key) + " must be a dict").c_str());
  return nb::cast<nb::dict>(value);
}

LlamaLinear linear_from(const nb::dict& from, Plans& plans) {
  LlamaLinear layer;
  if (from.contains("dense")) {
    layer.dense = address<void>(from, "dense");
    layer.dense_type = entry<int>(from, "dense_type");
    layer.w.rows = entry<int64_t>(from, "rows");
    layer.w.k = entry<int64_t>(from, "k");
    layer.w.bias = address<float>(from, "bias");
    require_entry(layer.dense, "dense", 0, "an address");
    return layer;
  }
  layer.w = weights_from(dict_entry(from, "weights"));
  if (entry<nb::object>(from, "plan").is_none()) {
    layer.rotation = entry<int64_t>(from, "rotation");
  } else {
    const nb::dict plan = dict_entry(from, "plan");
    std::unique_ptr<InputPlan>& known = plans[plan.ptr()];
    if (!known) known = std::make_unique<InputPlan>(plan_from(plan));
    layer.plan = known.get();
  }
  return layer;
}

LlamaBlock block_from(const nb::dict& from, Plans& plans) {
  LlamaBlock block;
  block.attention_norm = address<float>(from, "attention_norm");
  block.feed_forward_norm = address<float>(from, "feed_forward_norm");
  const std::pair<const char*, LlamaLinear*> layers[] = {
      {"q", &block.q},       {"k", &block.k},   {"v", &block.v},      {"o", &block.o},
      {"gate", &block.gate}, {"up", &block.up}, {"down", &block.down}};
  for (const auto& layer : layers) *layer.second = linear_from(dict_entry(from, layer.first), plans);
  return block;
}

LlamaConfig config_from(const nb::dict& from, Plans& plans) {
  LlamaConfig config;
  config.width = entry<int64_t>(from, "width");
  config.heads = entry<int64_t>(from, "heads");
  config.kv_heads = entry<int64_t>(from, "kv_heads");
  config.head_dim = entry<int64_t>(from, "head_dim");
  config.feed_forward = entry<int64_t>(from, "feed_forward");
  config.vocabulary = entry<int64_t>(from, "vocabulary");
  config.epsilon = entry<float>(from, "epsilon");
  config.attention_scale = entry<float>(from, "attention_scale");
  config.max_positions = entry<int64_t>(from, "max_positions");
  config.cosines = address<float>(from, "cosines");
  config.sines = address<float>(from, "sines");
  config.embedding = address<void>(from, "embedding");
  config.embedding_type = entry<int>(from, "embedding_type");
  config.embedding_scale = address<float>(from, "embedding_scale");
  config.final_norm = address<float>(from, "final_norm");
  config.head = linear_from(dict_entry(from, "head"), plans);
  return config;
}

std::vector<LlamaBlock> blocks_from(const std::vector<nb::dict>& from, Plans& plans) {
  std::vector<LlamaBlock> blocks;
  for (const nb::dict& block : from) blocks.push_back(block_from(block, plans));
  return blocks;
}

void require_shape(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// Lets Python's signal handlers run now and then, and hands tokens to a callback.
struct Listener {
  nb::object callback;  // None, or called with each token
  std::chrono::steady_clock::time_point looked = std::chrono::steady_clock::now();

  bool hear(int64_t token) {
    const bool calls = !callback.is_none() && token >= 0;
    const auto now = std::chrono::steady_clock::now();
    if (!calls && now - looked < std::chrono::milliseconds(20)) return true;
    looked = now;
    nb::gil_scoped_acquire python;
    if (PyErr_CheckSignals() != 0) nb::raise_python_error();
    return !calls || !callback(token).is(nb::bool_(false));
  }
};

class BoundLlama {
 public:
  BoundLlama(const nb::dict& config, const std::vector<nb::dict>& blocks, int64_t slots, int64_t positions,
             const std::string& level)
      : kernels_(kernels_of(level)), llama_(config_from(config, plans_), blocks_from(blocks, plans_), slots, positions) {}

  void forward(const Integers& tokens, const Integers& slots, const Integers& positions, const Matrix& logits,
               const std::optional<std::vector<bool>>& want, int threads) {
    nb::gil_scoped_release others_run;
    const Turn turn(*this);
    const size_t rows = tokens.size();
    require_shape(slots.size() == rows && positions.size() == rows && (!want || want->size() == rows),
                  "tokens, slots, positions and want must be of one length, got " + std::to_string(rows) + ", " +
                      std::to_string(slots.size()) + ", " + std::to_string(positions.size()) +
                      (want ? " and " + std::to_string(want->size()) : ""));
    std::unique_ptr<bool[]> wanted(want ? new bool[rows] : nullptr);
    if (want) std::copy(want->begin(), want->end(), wanted.get());
    const int64_t count = want ? std::count(want->begin(), want->end(), true) : different(slots);
    const int64_t shape[] = {static_cast<int64_t>(logits.shape(0)), static_cast<int64_t>(logits.shape(1))};
    require_shape(shape[0] == count && shape[1] == llama_.vocabulary(),
                  "logits must have shape (" + std::to_string(count) + ", " + std::to_string(llama_.vocabulary()) + "), got (" +
                      std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ")");
    llama_.forward(kernels_, tokens.data(), static_cast<int64_t>(rows), slots.data(), positions.data(), wanted.get(),
                   logits.data(), threads);
  }

  std::pair<Integers, uint64_t> generate(const Integers& prompt, int64_t max_new_tokens, const Integers& end_tokens,
                                         int64_t slot, double temperature, int64_t top_k, double top_p, int64_t allowed,
                                         uint64_t state, nb::object on_token, int threads) {
    const Sampling how{temperature, top_k, top_p, allowed};
    Listener listener{std::move(on_token)};
    const Progress progress{
        [](void* context, int64_t token) { return static_cast<Listener*>(context)->hear(token); }, &listener};
    Integers out;
    {
      nb::gil_scoped_release others_run;
      const Turn turn(*this);
      cancelled_ = false;
      out.resize(std::clamp<int64_t>(max_new_tokens, 0, llama_.positions()));
      const int64_t made = llama_.generate(
          kernels_, prompt.data(), static_cast<int64_t>(prompt.size()), slot, max_new_tokens, end_tokens.data(),
          static_cast<int64_t>(end_tokens.size()), how, &state, out.data(), &cancelled_, progress, threads);
      out.resize(made);
    }
    return {out, state};
  }

  void cancel() { cancelled_ = true; }
  void rewind(int64_t slot, int64_t length) {
    nb::gil_scoped_release others_run;
    const Turn turn(*this);
    llama_.rewind(slot, length);
  }
  int64_t length(int64_t slot) {
    nb::gil_scoped_release others_run;
    const Turn turn(*this);
    return llama_.length(slot);
  }
  int64_t slots() const { return llama_.slots(); }
  int64_t positions() const { return llama_.positions(); }
  int64_t vocabulary() const { return llama_.vocabulary(); }
  const char* level() const { return kernels_.name; }

 private:
  static int64_t different(Integers values) {
    std::sort(values.begin(), values.end());
    return std::unique(values.begin(), values.end()) - values.begin();
  }

  // Calls of several threads wait for each other. One from inside another, as on_token can make, would wait for itself.
  class Turn {
   public:
    explicit Turn(BoundLlama& llama) : llama_(llama) {
      if (llama_.caller_ == std::this_thread::get_id()) throw std::runtime_error("on_token called the Llama that called it");
      llama_.mutex_.lock();
      llama_.caller_ = std::this_thread::get_id();
    }
    ~Turn() {
      llama_.caller_ = std::thread::id();
      llama_.mutex_.unlock();
    }

   private:
    BoundLlama& llama_;
  };

  Plans plans_;
  const Kernels& kernels_;
  Llama llama_;
  std::mutex mutex_;
  std::atomic<std::thread::id> caller_{};  // whose turn it is
  std::atomic<bool> cancelled_{false};
};

std::pair<int64_t, uint64_t> sample_from(const Vector& logits, double temperature, int64_t top_k, double top_p,
                                         int64_t allowed, uint64_t state) {
  nb::gil_scoped_release others_run;
  std::vector<Candidate> scratch;
  const int64_t n = static_cast<int64_t>(logits.shape(0));
  const int64_t token = sample(logits.data(), n, {temperature, top_k, top_p, allowed}, &state, scratch);
  return {token, state};
}

}  // namespace
}  // namespace bitbell

void bind_llama(nb::module_& m) {
  using namespace bitbell;
  using namespace nb::literals;
  nb::class_<BoundLlama>(m, "Llama",
                         "The step of a LLaMA-family model, from tokens to logits. Borrows the memory that config and blocks "
                         "name by address: keep the tensors alive. Layers that name the same plan dict share their codes.")
      .def(nb::init<const nb::dict&, const std::vector<nb::dict>&, int64_t, int64_t, const std::string&>(), "config"_a,
           "blocks"_a, "slots"_a, "positions"_a, "level"_a = "auto")
      .def("forward", &BoundLlama::forward, "tokens"_a, "slots"_a, "positions"_a, nb::arg("logits").noconvert(), "want"_a = nb::none(),
           "threads"_a = 1,
           "Write the logits of the wanted rows (None: the last of each slot) to `logits`, float32 (wanted, vocabulary). "
           "A slot's positions go on from at most its length.")
      .def("generate", &BoundLlama::generate, "prompt"_a, "max_new_tokens"_a, "end_tokens"_a = Integers(), "slot"_a = 0,
           "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "allowed"_a = 0, "state"_a = 0,
           "on_token"_a = nb::none(), "threads"_a = 1,
           "Append the prompt to a slot and continue it: (new tokens, random state). Stops at an end token (which is "
           "returned), at cancel(), where on_token(token) returns False, and at Ctrl-C.")
      .def("cancel", &BoundLlama::cancel, "Stop the generate that runs in another thread, at its next token.")
      .def("reset", [](BoundLlama& self, int64_t slot) { self.rewind(slot, 0); }, "slot"_a)
      .def("rewind", &BoundLlama::rewind, "slot"_a, "length"_a, "Forget what a slot holds beyond `length` tokens.")
      .def("length", &BoundLlama::length, "slot"_a)
      .def_prop_ro("slots", &BoundLlama::slots)
      .def_prop_ro("positions", &BoundLlama::positions)
      .def_prop_ro("vocabulary", &BoundLlama::vocabulary)
      .def_prop_ro("level", &BoundLlama::level);
  m.def("sample", &sample_from, "logits"_a, "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "allowed"_a = 0,
        "state"_a = 0, "(token, random state): temperature 0 is greedy; 0, 1 and 0 cut nothing; -1 where logits hold NaN.");
}
