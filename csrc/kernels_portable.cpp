// Products in plain C++ that any compiler vectorises: two codes at a time in 16-bit lanes. Runs everywhere.
#include "kernels_images.hpp"
#include "kernels_training.hpp"

namespace bitbell {
namespace {

// 16 bytes, which every 64-bit machine has registers for: 4 rows x 2 of 4 consecutive k.
using S8 = int16_t __attribute__((vector_size(16)));
using W8 = uint16_t __attribute__((vector_size(16)));
using I4 = int32_t __attribute__((vector_size(16)));
constexpr int kPieces = 16;  // of 4 rows in a panel

void prepare(const int8_t* x, int64_t k, int, int, int8_t* prepared) { std::memcpy(prepared, x, static_cast<size_t>(k)); }

// The codes of k-group `j` of a chunk, for 4 rows: even k in `even`, odd k in `odd`.
template <int kBits>
INLINE void take_field(const uint8_t* chunk, int piece, int j, S8& even, S8& odd) {
  constexpr int kPerByte = kBits == 3 ? 4 : 8 / kBits, kLow = kBits == 3 ? 2 : kBits;
  W8 v;
  std::memcpy(&v, chunk + j / kPerByte * 256 + piece * 16, sizeof v);
  const uint16_t mask = (1u << kLow) - 1;
  const int shift = kLow * (j % kPerByte);
  W8 low = (v >> shift) & mask, high = (v >> (shift + 8)) & mask;
  if (kBits == 3) {
    std::memcpy(&v, chunk + 512 + piece * 16, sizeof v);
    low |= ((v >> j) & 1) << 2;
    high |= ((v >> (j + 8)) & 1) << 2;
  }
  std::memcpy(&even, &low, sizeof even);
  std::memcpy(&odd, &high, sizeof odd);
}

// Two inputs in every 32-bit lane.
INLINE S8 repeat_pair(int8_t first, int8_t second) {
  const I4 lanes = I4{} + static_cast<int32_t>(static_cast<uint16_t>(first) | static_cast<uint32_t>(static_cast<uint16_t>(second)) << 16);
  S8 pairs;
  std::memcpy(&pairs, &lanes, sizeof pairs);
  return pairs;
}

INLINE I4 add_pairs(I4 acc, S8 v) {
  I4 pairs;
  std::memcpy(&pairs, &v, sizeof pairs);
  return acc + ((pairs << 16) >> 16) + (pairs >> 16);
}

template <int kBits>
void one_row(const uint8_t* panel, int64_t k, const int8_t* x, int32_t* acc) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits;          // k-groups in a chunk
  constexpr int kBytes = kGroups * 4 * 64 * kBits / 8;          // of a chunk
  constexpr int kSums = kBits == 8 ? 1 : 32767 / (2 * 15 * 128);  // additions that 16 bits hold
  I4 total[kPieces] = {};
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes, x += 4 * kGroups)
    for (int i = 0; i < kPieces; i++) {
      S8 sum = {};
#pragma GCC unroll 8
      for (int j = 0; j < kGroups; j++) {
        const int8_t* q = x + 4 * j;
        S8 even, odd;
        take_field<kBits>(panel, i, j, even, odd);
        even *= repeat_pair(q[0], q[2]);
        odd *= repeat_pair(q[1], q[3]);
        if (kBits == 8) {
          total[i] = add_pairs(add_pairs(total[i], even), odd);
          continue;
        }
        sum += even + odd;
        if (j % kSums == kSums - 1 || j == kGroups - 1) {
          total[i] = add_pairs(total[i], sum);
          sum = S8{};
        }
      }
    }
  std::memcpy(acc, total, sizeof total);
}

void vector(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int, int32_t* acc) {
  for_width(bits, [&](auto width) { one_row<decltype(width)::value>(panel, k, x, acc); });
}

void matrix(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int64_t stride, int64_t m, int32_t* acc, uint8_t*) {
  for (int64_t i = 0; i < m; i++) vector(panel, bits, k, x + i * stride, 8, acc + i * kPanelRows);
}

// Levels of k columns: 64 rows for each k.
template <int kBits>
void unpack_levels(const uint8_t* panel, int64_t k, const float* levels, float* out) {
  constexpr int kGroups = kBits == 3 ? 8 : 8 / kBits, kBytes = kGroups * 4 * 64 * kBits / 8;
  for (int64_t c = 0; c < k / 4 / kGroups; c++, panel += kBytes)
    for (int j = 0; j < kGroups; j++, out += 256)
      for (int i = 0; i < kPieces; i++) {
        S8 even, odd;
        take_field<kBits>(panel, i, j, even, odd);
        for (int r = 0; r < 4; r++) {
          float* to = out + 4 * i + r;
          to[0] = levels[even[2 * r]], to[64] = levels[odd[2 * r]];
          to[128] = levels[even[2 * r + 1]], to[192] = levels[odd[2 * r + 1]];
        }
      }
}

template <int kBits>
void float_rows(const uint8_t* panel, int64_t k, const float* x, int64_t stride, int64_t m, const float* levels, float* acc) {
  float_tiles(k, x, stride, m, acc, [=](int64_t k0, int64_t count, float* out) {
    unpack_levels<kBits>(panel + k0 * kPanelRows * kBits / 8, count, levels, out);
  });
}

void floats(const uint8_t* panel, int bits, int64_t k, const float* x, int64_t stride, int64_t m, const float* levels, float* acc) {
  for_width(bits, [&](auto width) { float_rows<decltype(width)::value>(panel, k, x, stride, m, levels, acc); });
}

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable = {"portable", quantize, prepare, vector, matrix, floats, finish, finish_rows, gather, rotate,
                           rms_norm, sum, dot,      add_scaled, silu_times, softmax, dense, &kImages, &kTraining};

}  // namespace bitbell
