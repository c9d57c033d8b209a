// Structs of the kernels from Python dicts. Memory is borrowed: dicts hold addresses (tensor.data_ptr()), 0 for null,
// and whoever calls keeps the tensors alive.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace bitbell {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// dict[key] as a T; a missing key is a KeyError, a value of another type a TypeError that names the key.
template <class T>
T entry(const nanobind::dict& from, const char* key) {
  nanobind::object value = nanobind::steal(PyObject_GetItem(from.ptr(), nanobind::str(key).ptr()));
  if (!value.is_valid()) nanobind::raise_python_error();
  T out;
  if (!nanobind::try_cast(value, out)) {
    nanobind::str shown(nanobind::repr(value));
    throw nanobind::type_error((std::string(key) + " = " + shown.c_str() + " is not a number that fits").c_str());
  }
  return out;
}

template <class T>
const T* address(const nanobind::dict& from, const char* key) {
  return reinterpret_cast<const T*>(entry<uintptr_t>(from, key));
}

inline void require_entry(bool holds, const char* key, int64_t value, const char* allowed) {
  if (!holds) throw std::invalid_argument(std::string(key) + " = " + std::to_string(value) + ", must be " + allowed);
}

inline Weights weights_from(nanobind::dict from) {
  Weights w;
  w.data = address<uint8_t>(from, "data");
  w.bits = entry<int>(from, "bits");
  w.rows = entry<int64_t>(from, "rows");
  w.k = entry<int64_t>(from, "k");
  w.sums = address<int32_t>(from, "sums");
  w.scale = address<float>(from, "scale");
  w.zero_point = entry<double>(from, "zero_point");
  w.offset = address<float>(from, "offset");
  w.bias = address<float>(from, "bias");
  w.table = address<float>(from, "table");
  require_entry(w.bits >= 1 && w.bits <= 8, "bits", w.bits, "1 to 8");
  require_entry(w.rows >= 1, "rows", w.rows, "1 or more");
  require_entry(w.k >= 1, "k", w.k, "1 or more");
  require_entry(w.data && reinterpret_cast<uintptr_t>(w.data) % 64 == 0, "data", reinterpret_cast<intptr_t>(w.data),
                "the address of 64-byte aligned panels");
  require_entry(w.sums, "sums", 0, "an address");
  require_entry(!w.table || w.bits <= 4, "bits", w.bits, "1 to 4 with a table");
  require_entry(w.scale, "scale", 0, "an address");
  return w;
}

inline InputPlan plan_from(nanobind::dict from) {
  InputPlan plan;
  plan.bits = entry<int>(from, "bits");
  plan.rotation = entry<int64_t>(from, "rotation");
  const int statistic = entry<int>(from, "statistic");
  plan.smallest = entry<float>(from, "smallest");
  plan.divisor = entry<float>(from, "divisor");
  plan.divisor_plus = entry<float>(from, "divisor_plus");
  plan.step_factor = entry<float>(from, "step_factor");
  plan.step_plus = entry<float>(from, "step_plus");
  plan.thresholds = address<float>(from, "thresholds");
  plan.zero_point = entry<double>(from, "zero_point");
  plan.offset = entry<float>(from, "offset");
  require_entry(plan.bits >= 1 && plan.bits <= 8, "bits", plan.bits, "1 to 8");
  require_entry(plan.rotation >= 1 && (plan.rotation & (plan.rotation - 1)) == 0, "rotation", plan.rotation, "a power of two");
  require_entry(statistic >= 0 && statistic <= 3, "statistic", statistic, "0 (none), 1 (rms), 2 (absmax) or 3 (absmean)");
  plan.statistic = static_cast<Statistic>(statistic);
  return plan;
}

}  // namespace bitbell
