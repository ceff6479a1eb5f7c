#include "pool.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace pyppo::cpu {
namespace {

constexpr double worthwhile_microseconds = 100;
constexpr double worthwhile_when_busy = 3;
constexpr int max_threads = 256;
// How long a worker watches for the next region before it parks: about what a wake costs, so that calls in close
// succession pay for none and a core is never held for longer than one would have taken.
constexpr auto watch_time = std::chrono::microseconds(50);

int default_threads() {
  if (const char* text = std::getenv("PYPPO_NUM_THREADS")) {
    const int count = std::atoi(text);
    if (count >= 1) return count < max_threads ? count : max_threads;
  }
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const int count = int(std::thread::hardware_concurrency());
  return count > 0 ? count : 1;
}

// Waits a moment; after some, lets others have the core, since there may be more threads than cores.
class Spin {
 public:
  void operator()() {
    if (++count_ > before_yield) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

 private:
  static constexpr int before_yield = 2048;
  int count_ = 0;
};

// One parallel region after another. A region is published as one number, its generation and how many of its tasks are
// left: whoever lowers it owns a task, and a worker that comes late finds a number that no longer fits. So a region
// waits for the workers that took part, never for one that the system has put aside.
class Regions {
 public:
  void publish(int64_t count, Task task, void* context) {
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    left_.store((uint64_t(++generation_) << 32) | uint64_t(count), std::memory_order_release);
  }

  bool any_left() const { return uint32_t(left_.load(std::memory_order_acquire)) != 0; }

  // Does what is left to do, beside the others.
  void work() {
    uint64_t left = left_.load(std::memory_order_acquire);
    while (uint32_t(left) != 0) {
      if (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
      do_task(int64_t(uint32_t(left)) - 1);
      left = left_.load(std::memory_order_acquire);
    }
  }

  // Waits for the last task, and throws what one of them threw.
  void finish(int64_t count) {
    for (Spin spin; done_.load(std::memory_order_acquire) != count;) spin();
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void do_task(int64_t index) {
    try {
      task_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), index);
    } catch (...) {
      // Kept for the caller: an exception that leaves a worker would end the process.
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
  }

  alignas(64) std::atomic<uint64_t> left_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_ = nullptr;
  uint32_t generation_ = 0;
};

class Pool {
 public:
  // Where the system grants fewer threads, fewer serve: the results are the same.
  explicit Pool(int threads) : wanted_(threads) {
    workers_.reserve(size_t(threads));
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
    }
  }

  ~Pool() {
    closing_.store(true);
    wake();
    for (std::thread& worker : workers_) worker.join();
  }

  int wanted() const { return wanted_; }

  void run(int64_t count, Task task, void* context) {
    regions_.publish(count, task, context);
    wake();
    regions_.work();
    regions_.finish(count);
  }

  // While busy, no worker parks.
  void set_busy(bool busy) {
    busy_.store(busy);
    if (busy) wake();
  }

 private:
  // After what they look for has been stored. Either this sees a parked worker, or the worker, which counts itself
  // before it looks once more, sees what was stored.
  void wake() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (parked_.load() == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }

  void serve() {
    while (!closing_.load(std::memory_order_relaxed)) {
      regions_.work();
      if (!watch()) park();
    }
  }

  // Whether a region came before the time was up.
  bool watch() const {
    const auto end = std::chrono::steady_clock::now() + watch_time;
    Spin spin;
    for (int i = 0; !regions_.any_left(); ++i) {
      if (closing_.load(std::memory_order_relaxed)) return true;
      if (i % 16 == 0 && !busy_.load(std::memory_order_relaxed) && std::chrono::steady_clock::now() > end) return false;
      spin();
    }
    return true;
  }

  void park() {
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    wake_.wait(lock, [this] { return closing_.load() || busy_.load() || regions_.any_left(); });
    parked_.fetch_sub(1);
  }

  const int wanted_;
  std::vector<std::thread> workers_;
  Regions regions_;
  std::atomic<bool> closing_{false}, busy_{false};
  std::atomic<int> parked_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// All that must be new in a forked child: the parent's workers do not exist there, and its locks may be held.
struct State {
  std::mutex mutex;
  Pool* pool = nullptr;
};

// This thread's pool while it is in a busy section.
thread_local Pool* busy_pool = nullptr;
thread_local bool in_busy_section = false;
// Whether this thread leaves the others alone.
thread_local bool alone = false;

std::atomic<int> wanted_threads{0};
std::atomic<State*> state{nullptr};

State& current_state() {
  State* existing = state.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { state.store(nullptr); });
  (void)registered;
  State* fresh = new State;
  if (state.compare_exchange_strong(existing, fresh)) return *fresh;
  delete fresh;
  return *existing;
}

// The pool, of as many threads as are wanted now. The caller holds the lock.
Pool* pool_of(State& shared, int threads) {
  if (shared.pool == nullptr || shared.pool->wanted() != threads) {
    delete std::exchange(shared.pool, nullptr);
    shared.pool = new Pool(threads);
  }
  return shared.pool;
}

}  // namespace

int get_num_threads() {
  int count = wanted_threads.load(std::memory_order_relaxed);
  if (count == 0) {
    count = default_threads();
    wanted_threads.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_num_threads(int count) { wanted_threads.store(count < max_threads ? count : max_threads); }

void set_alone(bool on) { alone = on; }

BusySection::BusySection() : entered_(!in_busy_section) {
  const int threads = alone ? 1 : get_num_threads();
  if (!entered_ || threads == 1) return;
  State& shared = current_state();
  std::unique_lock<std::mutex> lock(shared.mutex, std::try_to_lock);
  if (lock.owns_lock()) {  // else another Python thread has the pool: this one runs alone
    busy_pool = pool_of(shared, threads);
    busy_pool->set_busy(true);
    lock.release();  // until the section ends
  }
  in_busy_section = true;
}

BusySection::~BusySection() {
  if (!entered_) return;
  in_busy_section = false;
  if (busy_pool == nullptr) return;
  busy_pool->set_busy(false);
  busy_pool = nullptr;
  current_state().mutex.unlock();
}

void run_tasks(int64_t count, double microseconds, Task task, void* context) {
  if (in_busy_section) {
    if (busy_pool != nullptr && count > 1 && microseconds > worthwhile_when_busy)
      return busy_pool->run(count, task, context);
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  const int threads = count > 1 && microseconds > worthwhile_microseconds && !alone ? get_num_threads() : 1;
  if (threads > 1) {
    State& shared = current_state();
    std::unique_lock<std::mutex> lock(shared.mutex, std::try_to_lock);
    // Another Python thread is inside a kernel: the cores are busy, so this one runs alone.
    if (lock.owns_lock()) return pool_of(shared, threads)->run(count, task, context);
  }
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

void* allocate_scratch(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace pyppo::cpu
