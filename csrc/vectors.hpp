// Vectors of 16 lanes, in parts as wide as the registers of the including file's instruction set: compilers take longer
// vectors of their own apart lane by lane. What is computed is the same whatever the parts are.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace bitbell {
namespace {

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kPartLanes = 16;
#elif defined(__AVX2__)
constexpr int kPartLanes = 8;
#else
constexpr int kPartLanes = 4;  // every 64-bit machine has registers of 16 bytes
#endif
constexpr int kParts = 16 / kPartLanes;

template <class T>
struct PartOf;
#define PART_OF(T)                                                          \
  template <>                                                               \
  struct PartOf<T> {                                                        \
    typedef T type __attribute__((vector_size(kPartLanes * sizeof(T))));    \
  }
PART_OF(float);
PART_OF(int32_t);
PART_OF(uint32_t);
PART_OF(uint16_t);
PART_OF(int8_t);
#undef PART_OF

template <class T>
struct Lanes {
  using Lane = T;
  using Part = typename PartOf<T>::type;
  Part part[kParts];
};
using F16 = Lanes<float>;
using I16 = Lanes<int32_t>;
using U16 = Lanes<uint32_t>;

// Of an operand that may be a plain number, which then stands in every lane.
template <class T>
using LaneOf = typename Lanes<T>::Lane;

#define EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < kParts; i++)

#define OPERATOR(OP)                                          \
  template <class T>                                          \
  INLINE Lanes<T> operator OP(Lanes<T> a, Lanes<T> b) {       \
    EACH_PART a.part[i] = a.part[i] OP b.part[i];             \
    return a;                                                 \
  }                                                           \
  template <class T>                                          \
  INLINE Lanes<T> operator OP(Lanes<T> a, LaneOf<T> b) {      \
    EACH_PART a.part[i] = a.part[i] OP b;                     \
    return a;                                                 \
  }                                                           \
  template <class T>                                          \
  INLINE Lanes<T> operator OP(LaneOf<T> a, Lanes<T> b) {      \
    EACH_PART b.part[i] = a OP b.part[i];                     \
    return b;                                                 \
  }                                                           \
  template <class T>                                          \
  INLINE Lanes<T>& operator OP##=(Lanes<T>& a, Lanes<T> b) {  \
    return a = a OP b;                                        \
  }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(&)
OPERATOR(|)
OPERATOR(^)
#undef OPERATOR

template <class T>
INLINE Lanes<T> operator<<(Lanes<T> a, int places) {
  EACH_PART a.part[i] = a.part[i] << places;
  return a;
}

INLINE F16 operator-(F16 a) {
  EACH_PART a.part[i] = -a.part[i];
  return a;
}

// -1 in lanes where it holds, else 0.
#define COMPARISON(OP)                              \
  INLINE I16 operator OP(F16 a, F16 b) {            \
    I16 r;                                          \
    EACH_PART r.part[i] = a.part[i] OP b.part[i];   \
    return r;                                       \
  }
COMPARISON(>=)
COMPARISON(>)
COMPARISON(<)
COMPARISON(==)
#undef COMPARISON

INLINE F16 select(I16 mask, F16 yes, F16 no) {
  EACH_PART yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return yes;
}

INLINE F16 all(float x) {
  return x - F16{};  // the very x, -0 too, without an instruction
}

// a * b + c, rounded once where there is an instruction for it.
INLINE F16 multiply_add(F16 a, F16 b, F16 c) {
#if defined(__AVX512F__)
  c.part[0] = _mm512_fmadd_ps(a.part[0], b.part[0], c.part[0]);
#elif defined(__AVX2__)
  EACH_PART c.part[i] = _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]);
#else
  c = a * b + c;
#endif
  return c;
}

template <class To, class T>
INLINE Lanes<To> convert(Lanes<T> v) {
  Lanes<To> r;
  EACH_PART r.part[i] = __builtin_convertvector(v.part[i], typename Lanes<To>::Part);
  return r;
}

template <class To, class T>
INLINE Lanes<To> same_bits(Lanes<T> v) {
  static_assert(sizeof(To) == sizeof(T), "lanes of one size");
  Lanes<To> r;
  EACH_PART r.part[i] = reinterpret_cast<typename Lanes<To>::Part>(v.part[i]);
  return r;
}

template <class T>
INLINE Lanes<T> load_lanes(const T* p) {
  Lanes<T> v;  // part by part, so that none of it need be in memory
  EACH_PART std::memcpy(&v.part[i], p + i * kPartLanes, sizeof v.part[i]);
  return v;
}
template <class T>
INLINE void store(T* p, Lanes<T> v) {
  EACH_PART std::memcpy(p + i * kPartLanes, &v.part[i], sizeof v.part[i]);
}

// v[lane ^ s] in every lane.
template <int s>
INLINE F16 partners(F16 v) {
  F16 r;
  EACH_PART {
    const F16::Part a = v.part[i ^ s / kPartLanes];
    constexpr int t = s % kPartLanes;
#if defined(__AVX512F__)
    r.part[i] = __builtin_shufflevector(a, a, 0 ^ t, 1 ^ t, 2 ^ t, 3 ^ t, 4 ^ t, 5 ^ t, 6 ^ t, 7 ^ t, 8 ^ t, 9 ^ t, 10 ^ t, 11 ^ t,
                                        12 ^ t, 13 ^ t, 14 ^ t, 15 ^ t);
#elif defined(__AVX2__)
    r.part[i] = __builtin_shufflevector(a, a, 0 ^ t, 1 ^ t, 2 ^ t, 3 ^ t, 4 ^ t, 5 ^ t, 6 ^ t, 7 ^ t);
#else
    r.part[i] = __builtin_shufflevector(a, a, 0 ^ t, 1 ^ t, 2 ^ t, 3 ^ t);
#endif
  }
  return r;
}

#undef EACH_PART

}  // namespace
}  // namespace bitbell
