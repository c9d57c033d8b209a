// A pool of threads that wait by spinning, then sleep. One parallel region at a time; a second caller, from
// another thread or from inside a region, runs its work alone instead of waiting.
#pragma once
#include <cstdint>
#include <type_traits>

namespace bitbell {

using Task = void (*)(void* context, int64_t begin, int64_t end, int thread);

// Run task over [0, count), cut into ranges in multiples of `grain`, on up to `threads` threads and the caller's first of all.
// What belongs to which thread is roughly the same from call to call, so that its cache may hold it, but not certain.
void parallel(int threads, int64_t count, int64_t grain, Task task, void* context);

template <class F>
void parallel_for(int threads, int64_t count, int64_t grain, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel(
      threads, count, grain,
      [](void* context, int64_t begin, int64_t end, int thread) { (*static_cast<Body*>(context))(begin, end, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// While one of these lives, threads spin long between regions: for a step that follows itself at once. Otherwise they spin
// only some microseconds, since whoever calls a single region has threads of its own that want the cores in between.
struct Eager {
  Eager();
  ~Eager();
  Eager(const Eager&) = delete;
  Eager& operator=(const Eager&) = delete;
};

constexpr int kMaxThreads = 256;

}  // namespace bitbell
