#include "kernels_512.hpp"

namespace bitbell {
extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", quantize, prepare,    vector,     vnni_matrix, floats, finish, finish_rows, gather, rotate,
                         rms_norm, sum, dot,      add_scaled, silu_times, softmax,     dense, &kImages, &kTraining};
}  // namespace bitbell
