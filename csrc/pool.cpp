#include "pool.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace bitbell {
namespace {

constexpr int kSpins = 200, kEagerSpins = 4000;  // some microseconds; some tens, longer than a gap within a step
std::atomic<int> eager{0};

int patience() { return eager.load(std::memory_order_relaxed) > 0 ? kEagerSpins : kSpins; }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Region {
  Task task;
  void* context;
  int64_t count, grain;
  int threads;
  std::atomic<int> left;

  // noexcept: a task that fails on the caller must not unwind the region that workers still read.
  void run(int thread) noexcept {
    const int64_t blocks = (count + grain - 1) / grain;
    const int64_t begin = blocks * thread / threads * grain, end = blocks * (thread + 1) / threads * grain;
    if (begin < count && begin < end) task(context, begin, end < count ? end : count, thread);
  }
};

// A thread with a letter box. `work` is written by one caller at a time.
class Worker {
 public:
  explicit Worker(int number) : number_(number), thread_([this] { loop(); }) { thread_.detach(); }

  void post(Region* region) {
    work_.store(region, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_one();
    }
  }

 private:
  void loop() {
    for (;;) {
      Region* region = nullptr;
      for (int i = 0; i < patience() && !(region = work_.load(std::memory_order_acquire)); i++) relax();
      if (!region) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.store(true, std::memory_order_seq_cst);
        wake_.wait(lock, [this, &region] { return (region = work_.load(std::memory_order_seq_cst)) != nullptr; });
        asleep_.store(false, std::memory_order_seq_cst);
      }
      work_.store(nullptr, std::memory_order_relaxed);
      region->run(number_);
      region->left.fetch_sub(1, std::memory_order_release);
    }
  }

  int number_;
  std::atomic<Region*> work_{nullptr};
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;  // last: its loop uses all of the above
};

struct Pool {
  std::mutex busy;
  std::vector<std::unique_ptr<Worker>> workers;

  Pool() { workers.reserve(kMaxThreads); }

  // As many workers as wanted, or as the system grants.
  int grow(int wanted) {
    try {
      while (static_cast<int>(workers.size()) < wanted)
        workers.push_back(std::make_unique<Worker>(static_cast<int>(workers.size()) + 1));
    } catch (const std::system_error&) {
    }
    return static_cast<int>(workers.size()) < wanted ? static_cast<int>(workers.size()) : wanted;
  }
};

thread_local bool inside = false;  // a region: what it calls runs alone

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and starts anew.
Pool* pool = nullptr;
std::once_flag made;

void make_pool() {
  pool = new Pool;
  pthread_atfork(nullptr, nullptr, [] {
    pool = new Pool;
    eager = 0;
  });
}

}  // namespace

Eager::Eager() { eager.fetch_add(1, std::memory_order_relaxed); }
Eager::~Eager() { eager.fetch_sub(1, std::memory_order_relaxed); }

void parallel(int threads, int64_t count, int64_t grain, Task task, void* context) {
  if (count <= 0) return;
  const int64_t blocks = (count + grain - 1) / grain;
  if (threads > blocks) threads = static_cast<int>(blocks);
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads > 1 && !inside) {
    std::call_once(made, make_pool);
    std::unique_lock<std::mutex> lock(pool->busy, std::try_to_lock);
    if (lock) {
      threads = pool->grow(threads - 1) + 1;
      Region region{task, context, count, grain, threads, {threads - 1}};
      inside = true;
      for (int i = 0; i < threads - 1; i++) pool->workers[static_cast<size_t>(i)]->post(&region);
      region.run(0);
      for (int spins = 0; region.left.load(std::memory_order_acquire) > 0; spins++) {
        if (spins < kEagerSpins) relax();
        else std::this_thread::yield();
      }
      inside = false;
      return;
    }
  }
  task(context, 0, count, 0);
}

}  // namespace bitbell
