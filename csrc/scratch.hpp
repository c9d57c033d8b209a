// Memory that a thread keeps from call to call.
#pragma once
#include <cstdint>
#include <vector>

namespace bitbell {

// Memory of one purpose (Tag) and thread; 64-byte aligned, and what a call before left in it.
template <class Tag, class T>
T* scratch_of(int64_t count) {
  thread_local std::vector<char> bytes;
  const size_t wanted = static_cast<size_t>(count) * sizeof(T) + 64;
  if (bytes.size() < wanted) bytes.resize(wanted);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
}

}  // namespace bitbell
