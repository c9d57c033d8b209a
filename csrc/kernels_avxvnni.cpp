#define BITBELL_VNNI
#include "kernels_256.hpp"

namespace bitbell {
extern const Kernels kAvxVnni;
const Kernels kAvxVnni = {"avxvnni", quantize, prepare,    vector,     matrix,  floats, finish, finish_rows, gather, rotate,
                          rms_norm, sum, dot,      add_scaled, silu_times, softmax, dense, &kImages, &kTraining};
}  // namespace bitbell
