#include "levels.hpp"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bitbell {

extern const Kernels kPortable;
#if defined(BITBELL_X86_LEVELS)
extern const Kernels kAvx2, kAvxVnni, kAvx512, kAvx512Vbmi, kAmx, kAmxEmulated;
#endif

namespace {

#if defined(BITBELL_X86_LEVELS)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r;
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(unsigned value, int place) { return value >> place & 1; }

// The registers that the operating system saves for a thread.
uint64_t saved_state() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

std::string missing_avx2() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  if ((saved_state() & 0x6) != 0x6) return "the system does not save AVX registers";
  return bit(one.c, 12) && bit(seven.b, 5) ? "" : "the CPU has no AVX2 and FMA";
}

std::string missing_avx_vnni() {
  const std::string why = missing_avx2();
  if (!why.empty()) return why;
  return bit(cpuid(7, 1).a, 4) ? "" : "the CPU has no AVX-VNNI";
}

std::string missing_avx512() {
  const std::string why = missing_avx2();
  if (!why.empty()) return why;
  if ((saved_state() & 0xe6) != 0xe6) return "the system does not save AVX-512 registers";
  const Registers seven = cpuid(7, 0);
  const bool has = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
  return has ? "" : "the CPU has no AVX-512 (F, BW, DQ, VL) with VNNI";
}

std::string missing_vbmi() {
  const std::string why = missing_avx512();
  if (!why.empty()) return why;
  return bit(cpuid(7, 0).c, 1) ? "" : "the CPU has no AVX-512 VBMI";
}

std::string missing_amx() {
  const std::string why = missing_avx512();
  if (!why.empty()) return why;
  const Registers seven = cpuid(7, 0);
  if (!bit(seven.d, 24) || !bit(seven.d, 25)) return "the CPU has no AMX int8";
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the kernel refused the use of AMX";
  return (saved_state() & 0x60000) == 0x60000 ? "" : "the system does not save AMX tiles";
#else
  return "AMX is asked for on Linux only";
#endif
}

Level level(const Kernels& kernels, const std::string& missing) { return {kernels.name, &kernels, missing.empty(), missing}; }
#endif

std::vector<Level> find_levels() {
  std::vector<Level> found = {{kPortable.name, &kPortable, true, ""}};
#if defined(BITBELL_X86_LEVELS)
  found.push_back(level(kAvx2, missing_avx2()));
  found.push_back(level(kAvxVnni, missing_avx_vnni()));
  found.push_back(level(kAmxEmulated, missing_avx512()));
  found.push_back(level(kAvx512, missing_avx512()));
  found.push_back(level(kAvx512Vbmi, missing_vbmi()));
  found.push_back(level(kAmx, missing_amx()));
#endif
  return found;
}

}  // namespace

const std::vector<Level>& levels() {
  static const std::vector<Level> found = find_levels();
  return found;
}

const Kernels* kernels_named(const std::string& name) {
  const Kernels* best = nullptr;
  for (const Level& level : levels()) {
    if (level.usable && name == level.name) return level.kernels;
    if (level.usable && name == "auto" && std::string(level.name) != "amx-emulated") best = level.kernels;
  }
  return best;
}

const Kernels& kernels_of(const std::string& level) {
  const Kernels* kernels = kernels_named(level);
  if (kernels) return *kernels;
  std::string known = "auto";
  for (const Level& each : levels()) {
    if (each.usable) known += std::string(", ") + each.name;
  }
  throw std::invalid_argument("level = " + level + ", must be one of " + known);
}

}  // namespace bitbell
