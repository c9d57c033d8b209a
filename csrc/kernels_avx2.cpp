#include "kernels_256.hpp"

namespace bitbell {
extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2",   quantize, prepare,    vector,     matrix,  floats, finish, finish_rows, gather, rotate,
                       rms_norm, sum, dot,      add_scaled, silu_times, softmax, dense, &kImages, &kTraining};
}  // namespace bitbell
