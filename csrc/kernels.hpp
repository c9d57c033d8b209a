// What the kernels take, and the table of functions that every instruction set fills.
//
// Weights lie in panels of 64 rows ("k4n16"): a 64-byte vector holds 16 rows x 4 consecutive k, and each byte the codes
// of 8 / bits consecutive groups of 4 k, the first in the lowest bits. Four such vectors, of the panel's rows 0-15,
// 16-31, 32-47 and 48-63, follow each other, so that a panel is one stream. 3 bits are a stream of 2 bits and one of 1
// bit, interleaved every 32 k; 5 to 8 bits take a byte. Rows and k are padded to multiples of 64 with code 0.
//
// Every level computes the same codes, integers, steps and outputs, to the last bit: reductions have a fixed order of 16
// lanes, and multiplications and additions are never fused. Only products with float inputs (`floats`, and
// those of ImageKernels) may round differently.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace bitbell {

constexpr int64_t kPanelRows = 64;
constexpr int64_t kStepOfK = 64;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int kernel_bits(int bits) { return bits <= 4 ? bits : 8; }
constexpr int64_t padded_k(int64_t k) { return round_up(k, kStepOfK); }
constexpr int64_t panels_of(int64_t rows) { return round_up(rows, kPanelRows) / kPanelRows; }
// Bytes of one panel, and of a whole matrix.
constexpr int64_t panel_bytes(int64_t k, int bits) { return padded_k(k) * kPanelRows * kernel_bits(bits) / 8; }
constexpr int64_t arranged_bytes(int64_t rows, int64_t k, int bits) { return panels_of(rows) * panel_bytes(k, bits); }

// A matrix of packed codes and what turns products of codes into outputs. Pointers are borrowed.
struct Weights {
  const uint8_t* data = nullptr;   // arranged_bytes(rows, k, bits), 64-byte aligned
  int bits = 0;                    // of the codes, 1 to 8
  int64_t rows = 0, k = 0;         // outputs, inputs
  const int32_t* sums = nullptr;   // (rows): sum of the unsigned codes of each row
  const float* scale = nullptr;    // (rows): value of one level
  double zero_point = 0;           // of the unsigned codes: level = code - zero_point
  const float* offset = nullptr;   // (rows): added to every value, or null
  const float* bias = nullptr;     // (rows), or null
  const float* table = nullptr;    // (2**bits) levels where the grid is not uniform (float inputs only), or null
};

enum class Statistic : int { none = 0, rms = 1, absmax = 2, absmean = 3 };

// How a row of floats becomes codes:  h = rotate(x);  size = max(statistic(h), smallest), 0 without a statistic;
// v = h / (size * divisor + divisor_plus);  code = -2**(bits-1) + (how many thresholds <= v)
// step = size * step_factor + step_plus
struct InputPlan {
  int bits = 0;                       // 1 to 8; codes are centred: -2**(bits-1) .. 2**(bits-1) - 1
  int64_t rotation = 1;               // block, a power of two; 1: none
  Statistic statistic = Statistic::none;
  float smallest = 0;                 // of the size
  float divisor = 0, divisor_plus = 1;
  float step_factor = 0, step_plus = 0;
  const float* thresholds = nullptr;  // (2**bits - 1) rising; null: code = clip(round(v - 1/2))
  double zero_point = 0;              // of the centred codes
  float offset = 0;                   // added to every value
  bool finite = false;                // the input is known to hold neither NaN nor infinity
};

// Codes of `rows` inputs, and what the products need of them.
struct Codes {
  int8_t* codes = nullptr;    // (rows, stride), centred; zero beyond k
  int64_t stride = 0;         // bytes from row to row, at least padded_k(k)
  float* step = nullptr;      // (rows); NaN where the row holds NaN or infinity
  int32_t* sum = nullptr;     // (rows): sum of codes
  int64_t rows = 0;
};

// A statistic of `count` numbers, from what Kernels::gather found: the largest magnitude, or the sum of its parts.
inline float size_of(Statistic statistic, double gathered, int64_t count) {
  if (statistic == Statistic::absmax) return static_cast<float>(gathered);
  const float mean = static_cast<float>(gathered / static_cast<double>(count));
  return statistic == Statistic::rms ? std::sqrt(mean) : mean;
}

// Outputs [row, row + count) of m inputs, from accumulators. Then residual is added, unless it is null, and with `clip` negative
// numbers become 0 (NaN stays).
struct OutputRows {
  const Weights* const* weights = nullptr;  // (m)
  const int32_t* acc = nullptr;             // (m), from row to row acc_stride
  int64_t acc_stride = 0, row = 0, count = 0, m = 0;
  float step = 0;
  const int32_t* sums = nullptr;            // (m)
  const float* residual = nullptr;
  bool clip = false;
  float* y = nullptr;                       // (m), from row to row, like residual, y_stride
  int64_t y_stride = 0;
};

// Types of tensors that a training step takes.
constexpr int kFloat32 = 0, kBfloat16 = 1, kInt8 = 2;
constexpr int64_t size_of_type(int type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

// What BBQ's gradient of one row is computed from. h: the rotated input, or rotated by `rotation` first. With `bins`, codes
// are of 8 bits, and h is not read: (3, 256) numbers say each bin's v, slope and level.
struct BellRow {
  const void *h = nullptr, *g = nullptr;
  const int8_t* codes = nullptr;
  int h_type = kFloat32, g_type = kFloat32;
  int64_t k = 0, rotation = 1;
  float inverse_size = 1, zero_point = 0;
  const float* bins = nullptr;
};

// What turns a row of products of centred codes into outputs.
struct ProductRow {
  int64_t outputs = 0, k = 0;
  double x_zero = 0, w_zero = 0;
  bool fits_quarters = false;      // whether int32 holds four times every sum on the way
  const int32_t* w_sums = nullptr; // (outputs): sums of codes
  const float* w_step = nullptr;   // (outputs)
  int type = kFloat32;             // of the outputs
};

// Rows of a training step, see kernels_training.hpp. h, v, u, scratch: padded_k(k) floats.
struct TrainingKernels {
  float (*squares)(const void* x, int type, int64_t k, float* h);
  // Codes are written up to padded_k(k). kept: the rotated x, or null.
  void (*quantize)(const InputPlan& plan, const void* x, int type, int64_t k, int8_t* codes, float* step, float* h, void* kept, int kept_type);
  int32_t (*sum_of_codes)(const int8_t* codes, int64_t k);
  void (*slopes)(const BellRow& row, float* v, float* u, float* along, float* levels);
  void (*gradient)(const float* v, float* u, int64_t k, float factor, float mean, int64_t rotation, void* out, int type);
  void (*outputs)(const ProductRow& row, const int32_t* acc, int32_t x_sum, float x_step, float* scratch, void* y);
};

// Products of 1- and 2-bit codes by look-up, for instruction sets that look 64 bytes up at a time. Three input codes are the
// address of a table of 64 sums, one for every three weight codes. A panel of weights holds 64 bytes a triple: byte 4 q + j
// has three codes of row 16 j + q, the first in the lowest bits. Two panels may take turns.
constexpr int64_t kTripleStep = 4;   // triples of a run are padded to multiples of this with weight codes 0
constexpr int64_t kTripleBlock = 256;  // triples of one call at most: their sums fit 16 bits
constexpr int64_t kTripleBias = 18;  // that every table's sums have, so that none is negative
constexpr int64_t kSharedTaps = 3;   // of windows beside each other that share look-ups
constexpr uint16_t kZeroTriple = 42 * 64;  // three centred codes 0
constexpr int64_t triples_of(int64_t codes) { return (codes + 2) / 3; }

struct Run {
  int64_t x = 0, triples = 0;  // where it begins in the inputs, from the window's first
};

// acc[m][64 * panels] = first, or += where `add`, the sums (and kTripleBias a triple) of the runs of m windows that begin at
// x[m]. A run is a multiple of kTripleStep triples, with weights of each. Where `pixel` is given, a run is the triples of a
// pixel, each with weights of kSharedTaps taps, for which `pixel` addresses lie between; windows may then lie so as well.
struct LookupProduct {
  const uint8_t* w = nullptr;
  int64_t bytes = 0;  // of weights; what follows them comes next
  int panels = 1;
  const Run* runs = nullptr;
  int64_t count = 0;  // of runs
  const uint16_t* const* x = nullptr;
  int64_t pixel = 0;
  int64_t m = 0;
  int32_t first = 0;
  bool add = false;
  int32_t* acc = nullptr;
  const OutputRows* finish = nullptr;  // of the m windows, which are then complete; or null
  const InputPlan* plan = nullptr;
};

struct LookupKernels {
  // Table addresses (triples_of(count)) of `count` centred codes; 64 bytes from every code on may be read.
  void (*triples)(const int8_t* codes, int64_t count, uint16_t* out);
  // The same of pixels of `count` rotated, finite numbers, and their sums of codes, by a plan of thresholds and no statistic. 48 numbers
  // from every one on may be read.
  void (*lines)(const InputPlan& plan, const float* h, int64_t pixels, int64_t count, uint16_t* out, int32_t* sums);
  void (*product)(const LookupProduct& product);
};

// Sums over the windows of a row of outputs: sums[tile][column] = sum over rows r and i < run of w[r][i][column] times
// rows[r][tile * stride + i].
struct TileProduct {
  const float* w = nullptr;  // (count, run, width), 64-byte aligned
  int64_t width = 0;         // a multiple of 16
  const float* const* rows = nullptr;
  int64_t count = 0, run = 0, stride = 0, tiles = 0;
  float* sums = nullptr;
  int64_t sums_stride = 0;
};

// The largest numbers of windows along a row; NaN is larger than numbers. Windows hold at least one pixel of the row.
struct PoolColumns {
  const float* x = nullptr;                                  // `pixel` floats from pixel to pixel
  int64_t columns = 0, pixel = 0, channels = 0;
  int64_t kernel = 1, stride = 1, padding = 0, outputs = 0;
  float* y = nullptr;                                        // (outputs, channels rounded up to a multiple of 16)
};

// The largest numbers of rows; then bias is added, unless it is null, and with `clip` negative numbers become 0.
struct PoolRows {
  const float* const* rows = nullptr;                        // (count), at least one; as PoolColumns has them
  int64_t count = 0, columns = 0, channels = 0;
  const float* bias = nullptr;                               // (channels)
  bool clip = false;
  float* y = nullptr;                                        // (columns, channels)
};

constexpr int64_t kTilePoints = 8, kTileOutputs = 5, kTileTaps = 4;  // of a tile of convolutions by fewer products
constexpr int64_t kBeyond = 16;  // floats that may be read and written beyond a row

// Rows of images, see kernels_images.hpp.
struct ImageKernels {
  void (*tile_product)(const TileProduct& product);
  // x (5 tiles + 3, run) -> out: 8 planes (tiles, run).
  void (*to_points)(const float* x, int64_t run, int64_t tiles, float* out, int64_t plane);
  // sums (8, tiles, width) -> 5 pixels a tile, of `width` channels each, `pixel` floats apart.
  void (*from_points)(const float* sums, int64_t width, int64_t tiles, float* y, int64_t pixel);
  bool (*all_within)(const float* x, int64_t n, float limit);  // whether |x| <= limit everywhere; NaN is not
  void (*pool_columns)(const PoolColumns& pool);
  void (*pool_rows)(const PoolRows& pool);
  void (*means)(const float* x, int64_t rows, int64_t n, float* y);  // of the columns of x (rows, n)
  // y[i][first .. first + count) = those rows of a matrix (rows, k) times x[i] of m, plus bias, unless it is null.
  void (*matrix_rows)(const float* matrix, const float* bias, int64_t rows, int64_t k, int64_t first, int64_t count, const float* x, int64_t m,
                      float* y);
};

// One instruction set's functions. `panel` points to one panel of weights; k is padded_k(k) throughout.
struct Kernels {
  const char* name;
  // Codes of one row of k floats (k: as given, not padded). scratch: padded_k(k) floats. Fills codes up to padded_k(k).
  void (*quantize)(const InputPlan& plan, const float* x, int64_t k, int8_t* codes, float* step, int32_t* sum, float* scratch);
  // x rearranged for `vector`: `prepared` has 2 * k bytes. Depends on the weights' and the inputs' bits only.
  void (*prepare)(const int8_t* x, int64_t k, int bits, int x_bits, int8_t* prepared);
  // acc[64] = codes of the panel times one prepared row.
  void (*vector)(const uint8_t* panel, int bits, int64_t k, const int8_t* prepared, int x_bits, int32_t* acc);
  // acc[m][64] = codes of the panel times m rows of codes. scratch: kMatrixScratch bytes, 64-byte aligned.
  void (*matrix)(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int64_t stride, int64_t m, int32_t* acc, uint8_t* scratch);
  // acc[m][64] = levels of the panel times m rows of floats (zero beyond the true k).
  // levels: 256, repeated every 2**bits; of bytes only the first is read, the others follow it by ones.
  void (*floats)(const uint8_t* panel, int bits, int64_t k, const float* x, int64_t stride, int64_t m, const float* levels, float* acc);
  // y[n] = outputs of the first `count` accumulators of a panel, for one input row; `row` is the panel's first row.
  void (*finish)(const Weights& w, const InputPlan& plan, const int32_t* acc, int64_t row, int64_t count, float step, int32_t sum, float* y);
  // The same for many input rows and one step; each has weights of its own, which differ in `k` and `sums`.
  void (*finish_rows)(const OutputRows& rows, const InputPlan& plan);
  // What a statistic of rotated numbers is computed from (`size_of`): their largest magnitude, or a sum. h: zero beyond k.
  float (*gather)(Statistic statistic, const float* h, int64_t k);
  // Floats of a transformer: all of n elements, deterministic.
  void (*rotate)(const float* x, float* y, int64_t n, int64_t block);
  void (*rms_norm)(const float* x, const float* weight, float epsilon, float* y, int64_t n);
  float (*sum)(const float* x, int64_t n);                                       // n: a multiple of 256; for measuring
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*add_scaled)(float* y, const float* x, float factor, int64_t n);         // y += factor * x
  void (*silu_times)(const float* gate, const float* up, float* y, int64_t n);   // y = gate / (1 + exp(-gate)) * up
  float (*softmax)(float* x, int64_t n);                                         // in place; returns the largest x
  // y[0 .. count) = rows [first, first + count) of a dense (rows, k) matrix times x; type: 0 float32, 1 bfloat16, 2 float16.
  void (*dense)(const void* matrix, int type, int64_t first, int64_t count, int64_t k, const float* x, float* y);
  const ImageKernels* images;
  const TrainingKernels* training;
  const LookupKernels* lookups = nullptr;  // of instruction sets that have them
};

constexpr int64_t kMatrixScratch = 64 * 1024;

}  // namespace bitbell
