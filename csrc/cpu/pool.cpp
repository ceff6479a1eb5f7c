#include "pool.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
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
constexpr int spins_before_yield = 4096;
constexpr int max_threads = 256;

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

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Spins, and after a while lets others have the core: there may be more threads than cores.
class Spin {
 public:
  void operator()() {
    if (++count_ < spins_before_yield)
      pause();
    else
      std::this_thread::yield();
  }

 private:
  int count_ = 0;
};

// What threads that stay on their cores share. A region is published as one number, its generation and how many of its
// tasks are left: whoever lowers it owns that task, and a thread that comes late finds a number that no longer fits.
class BusyJob {
 public:
  void run(int64_t count, Task task, void* context) {
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ++generation_;
    left_.store((uint64_t(generation_) << 32) | uint64_t(count), std::memory_order_release);
    while (work()) {
    }
    Spin spin;
    while (done_.load(std::memory_order_acquire) != count) spin();
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Does a task, if one is left.
  bool work() {
    uint64_t left = left_.load(std::memory_order_acquire);
    if (uint32_t(left) == 0) return false;
    if (!left_.compare_exchange_strong(left, left - 1, std::memory_order_acq_rel)) return true;
    try {
      task_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), int64_t(uint32_t(left)) - 1);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

 private:
  alignas(64) std::atomic<uint64_t> left_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  uint32_t generation_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_ = nullptr;
};

struct Job {
  Task task;
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};

  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;

  void work() {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
    } catch (...) {
      // Kept for the caller: an exception that leaves a worker would end the process.
      if (!failed.exchange(true)) error = std::current_exception();
      next.store(count);
    }
  }
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
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int wanted() const { return wanted_; }

  void begin_busy() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      busy_.store(true, std::memory_order_relaxed);
    }
    wake_.notify_all();
  }

  void end_busy() { busy_.store(false, std::memory_order_relaxed); }

  void run_busy(int64_t count, Task task, void* context) { busy_job_.run(count, task, context); }

  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    // A worker that never woke holds no reference to the job; one that did is counted until it lets go.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return closing_ || is_busy() || (job_ != nullptr && generation_ != seen); });
      if (closing_) return;
      if (is_busy()) {
        lock.unlock();
        stay_busy();
        lock.lock();
        continue;
      }
      seen = generation_;
      Job* job = job_;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  bool is_busy() const { return busy_.load(std::memory_order_relaxed); }

  void stay_busy() {
    Spin spin;
    while (is_busy()) {
      if (busy_job_.work())
        spin = Spin();
      else
        spin();
    }
  }

  const int wanted_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int active_ = 0;
  bool closing_ = false;
  std::atomic<bool> busy_{false};
  BusyJob busy_job_;
};

// All that must be new in a forked child: the parent's workers do not exist there, and its locks may be held.
struct State {
  std::mutex mutex;
  Pool* pool = nullptr;
};

// This thread's pool while it is in a busy section.
thread_local Pool* busy_pool = nullptr;
thread_local bool in_busy_section = false;

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

BusySection::BusySection() : entered_(!in_busy_section) {
  const int threads = get_num_threads();
  if (!entered_ || threads == 1) return;
  in_busy_section = true;
  State& shared = current_state();
  if (!shared.mutex.try_lock()) return;  // another Python thread has the pool: this one runs alone
  busy_pool = pool_of(shared, threads);
  busy_pool->begin_busy();
}

BusySection::~BusySection() {
  if (!entered_) return;
  in_busy_section = false;
  if (busy_pool == nullptr) return;
  busy_pool->end_busy();
  busy_pool = nullptr;
  current_state().mutex.unlock();
}

void run_tasks(int64_t count, double microseconds, Task task, void* context) {
  if (in_busy_section) {
    if (busy_pool != nullptr && count > 1 && microseconds > worthwhile_when_busy)
      return busy_pool->run_busy(count, task, context);
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  const int threads = count > 1 && microseconds > worthwhile_microseconds ? get_num_threads() : 1;
  if (threads > 1) {
    State& shared = current_state();
    std::unique_lock<std::mutex> lock(shared.mutex, std::try_to_lock);
    // Another Python thread is inside a kernel: the cores are busy, so this one runs alone.
    if (lock.owns_lock()) {
      Job job{task, context, count};
      pool_of(shared, threads)->run(job);
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

void* allocate_scratch(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace pyppo::cpu
