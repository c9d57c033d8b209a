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

constexpr int64_t kPieces = 4;  // of a share

// Every thread has a share of the work, takes it in pieces, and then what is left of the others': one that was not woken
// in time, or lost its core, holds nobody up for long.
struct Region {
  struct alignas(64) Share {  // in blocks of `grain`
    std::atomic<int64_t> next;
    int64_t end, piece;
  };

  Task task;
  void* context;
  int64_t count, grain;
  int threads;
  std::atomic<int> left;  // workers that have not finished
  Share shares[kMaxThreads];

  Region(Task what, void* with, int64_t items, int64_t of_block, int on)
      : task(what), context(with), count(items), grain(of_block), threads(on), left(on - 1) {
    const int64_t blocks = (count + grain - 1) / grain;
    for (int i = 0; i < threads; i++) {
      const int64_t begin = blocks * i / threads, end = blocks * (i + 1) / threads;
      shares[i].next.store(begin, std::memory_order_relaxed);
      shares[i].end = end;
      shares[i].piece = (end - begin + kPieces - 1) / kPieces;
    }
  }

  // noexcept: a task that fails on the caller must not unwind the region that workers still read.
  void run(int thread) noexcept {
    for (int i = 0; i < threads; i++) {
      Share& share = shares[(thread + i) % threads];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t begin = share.next.fetch_add(share.piece, std::memory_order_relaxed);
        if (begin >= share.end) break;
        const int64_t end = begin + share.piece < share.end ? begin + share.piece : share.end;
        task(context, begin * grain, end * grain < count ? end * grain : count, thread);
      }
    }
  }
};

// A thread with a letter box, into which one caller at a time puts a region.
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

  // Whether the region was still in the box; the worker will not see it then.
  bool take_back(Region* region) { return work_.compare_exchange_strong(region, nullptr, std::memory_order_seq_cst); }

 private:
  void loop() {
    for (;;) {
      for (int i = 0; i < patience() && !work_.load(std::memory_order_relaxed); i++) relax();
      if (!work_.load(std::memory_order_relaxed)) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.store(true, std::memory_order_seq_cst);
        wake_.wait(lock, [this] { return work_.load(std::memory_order_seq_cst) != nullptr; });
        asleep_.store(false, std::memory_order_seq_cst);
      }
      Region* region = work_.exchange(nullptr, std::memory_order_acquire);
      if (!region) continue;  // taken back
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
      Region region(task, context, count, grain, threads);
      inside = true;
      for (int i = 0; i < threads - 1; i++) pool->workers[static_cast<size_t>(i)]->post(&region);
      region.run(0);
      for (int i = 0; i < threads - 1; i++)
        if (pool->workers[static_cast<size_t>(i)]->take_back(&region)) region.left.fetch_sub(1, std::memory_order_relaxed);
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
