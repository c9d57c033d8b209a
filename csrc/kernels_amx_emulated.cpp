#define BITBELL_EMULATE_AMX
#include "kernels_amx.cpp"
