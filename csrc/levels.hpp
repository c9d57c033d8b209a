// Instruction sets: which are compiled in, which this machine has, which one is in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace bitbell {

struct Level {
  const char* name;
  const Kernels* kernels;  // null: not compiled into this library
  bool usable;             // compiled in, and this machine runs it
  std::string why;         // what is missing, where it is not usable
};

// From the slowest ("portable") to the fastest.
const std::vector<Level>& levels();

// The kernels of a level by name; "auto": the fastest usable one. Null where there is no such usable level.
const Kernels* kernels_named(const std::string& name);

// The same, or std::invalid_argument that says which levels there are.
const Kernels& kernels_of(const std::string& level);

}  // namespace bitbell
