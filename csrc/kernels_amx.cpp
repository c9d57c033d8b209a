// Many rows on AMX's 16 x 64-byte tiles; everything else is the AVX-512 level's. Unpacked codes are tiles as they lie:
// 16 k-groups, 256 bytes apart, of 16 rows x 4 k. BITBELL_EMULATE_AMX replaces the eight tiles by arrays, for machines
// that have none: the level "amx-emulated" shows that the bookkeeping is right, and is never chosen by itself.
#include "kernels_512.hpp"

namespace bitbell {
namespace {

constexpr int kTileRows = 16;

#ifdef BITBELL_EMULATE_AMX
thread_local int8_t tiles_of_bytes[8][kTileRows][64];

INLINE void configure() { std::memset(tiles_of_bytes, 0, sizeof tiles_of_bytes); }
INLINE void release() {}
#define TILE_LOAD(t, p, stride)                                                                          \
  for (int tile_row = 0; tile_row < kTileRows; tile_row++)                                               \
  std::memcpy(tiles_of_bytes[t][tile_row], reinterpret_cast<const char*>(p) + tile_row * (stride), 64)
#define TILE_STORE(t, p, stride)                                                                         \
  for (int tile_row = 0; tile_row < kTileRows; tile_row++)                                               \
  std::memcpy(reinterpret_cast<char*>(p) + tile_row * (stride), tiles_of_bytes[t][tile_row], 64)
void emulated_dot(int to, int a, int b) {
  for (int m = 0; m < kTileRows; m++)
    for (int n = 0; n < 16; n++) {
      int32_t sum;
      std::memcpy(&sum, &tiles_of_bytes[to][m][4 * n], 4);
      for (int g = 0; g < 16; g++)
        for (int i = 0; i < 4; i++)
          sum += tiles_of_bytes[a][m][4 * g + i] * static_cast<uint8_t>(tiles_of_bytes[b][g][4 * n + i]);
      std::memcpy(&tiles_of_bytes[to][m][4 * n], &sum, 4);
    }
}
#define TILE_DOT(to, a, b) emulated_dot(to, a, b)
#else
// Tiles are a thread's own state, and other libraries configure them too: set on entry, released on exit.
INLINE void configure() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" : : "r"(&config) : "memory");  // the intrinsic of some compilers names only 8 of the 64 bytes
  _tile_loadconfig(&config);
}
INLINE void release() { _tile_release(); }
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT(to, a, b) _tile_dpbsud(to, a, b)
#endif

// kRows input rows, 16 or 32, times 32 rows of weights (sums in tiles 0-3), over k columns.
template <int kRows>
void tile_rows(const uint8_t* w, int64_t k, const int8_t* x, int64_t stride, int32_t* acc) {
  constexpr int64_t kRow = kPanelRows * 4;
  constexpr bool kTwo = kRows == 2 * kTileRows;
  int32_t* lower = acc + kTileRows * kPanelRows;
  TILE_LOAD(0, acc, kRow);
  TILE_LOAD(1, acc + 16, kRow);
  if constexpr (kTwo) {
    TILE_LOAD(2, lower, kRow);
    TILE_LOAD(3, lower + 16, kRow);
  }
  for (int64_t k0 = 0; k0 < k; k0 += 64, w += 16 * 256) {
    TILE_LOAD(4, x + k0, stride);
    TILE_LOAD(6, w, 256);
    TILE_LOAD(7, w + 64, 256);
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    if constexpr (kTwo) {
      TILE_LOAD(5, x + kTileRows * stride + k0, stride);
      TILE_DOT(2, 5, 6);
      TILE_DOT(3, 5, 7);
    }
  }
  TILE_STORE(0, acc, kRow);
  TILE_STORE(1, acc + 16, kRow);
  if constexpr (kTwo) {
    TILE_STORE(2, lower, kRow);
    TILE_STORE(3, lower + 16, kRow);
  }
}

template <int kRows>
void both_halves(const uint8_t* w, int64_t k, const int8_t* x, int64_t stride, int32_t* acc) {
  for (int half = 0; half < 2; half++) tile_rows<kRows>(w + 128 * half, k, x, stride, acc + 32 * half);
}

void matrix(const uint8_t* panel, int bits, int64_t k, const int8_t* x, int64_t stride, int64_t m, int32_t* acc, uint8_t* scratch) {
  if (m < kTileRows) return vnni_matrix(panel, bits, k, x, stride, m, acc, scratch);
  std::memset(acc, 0, static_cast<size_t>(m * kPanelRows) * 4);
  configure();
  for (int64_t k0 = 0; k0 < k; k0 += kBlock) {
    const int64_t block = k - k0 < kBlock ? k - k0 : kBlock;
    unpack(panel + k0 * kPanelRows * bits / 8, bits, block, scratch);
    int64_t i = 0;
    for (; i + 32 <= m; i += 32) both_halves<32>(scratch, block, x + i * stride + k0, stride, acc + i * kPanelRows);
    if (i + kTileRows <= m) {
      both_halves<kTileRows>(scratch, block, x + i * stride + k0, stride, acc + i * kPanelRows);
      i += kTileRows;
    }
    if (i < m) tiles(scratch, block, x + i * stride + k0, stride, m - i, acc + i * kPanelRows);
  }
  release();
}

}  // namespace

#ifdef BITBELL_EMULATE_AMX
#define BITBELL_TABLE kAmxEmulated
#define BITBELL_TABLE_NAME "amx-emulated"
#else
#define BITBELL_TABLE kAmx
#define BITBELL_TABLE_NAME "amx"
#endif
extern const Kernels BITBELL_TABLE;
const Kernels BITBELL_TABLE = {BITBELL_TABLE_NAME, quantize, prepare,    vector,     matrix,  floats, finish, finish_rows, gather, rotate,
                               rms_norm, sum, dot,      add_scaled, silu_times, softmax, dense, &kImages, &kTraining};
}  // namespace bitbell
