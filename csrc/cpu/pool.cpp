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
constexpr int max_threads = 256;
// How long a thread watches for the next region, or for a region's last task, before it parks: about what a wake costs,
// so that calls in close succession pay for none and a core is never held for longer than one would have taken.
constexpr auto watch_time = std::chrono::microseconds(50);

template <class F>
void watch_for(F&& happened) {
  const auto end = std::chrono::steady_clock::now() + watch_time;
  do {
    for (int i = 0; i < 16; ++i) {
      if (happened()) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
}

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

  void run(Job& job) {
    bool parked;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      ++generation_;
      parked = parked_ > 0;
    }
    if (parked) wake_.notify_all();
    job.work();
    // A worker that never woke holds no reference to the job; one that did is counted until it lets go.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    if (active_ > 0) {
      lock.unlock();
      watch_for([this] { return active_ == 0; });
      lock.lock();
    }
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      lock.unlock();
      watch_for([&] { return closing_ || generation_ != seen; });
      lock.lock();
      ++parked_;
      wake_.wait(lock, [&] { return closing_ || (job_ != nullptr && generation_ != seen); });
      --parked_;
      if (closing_) return;
      seen = generation_;
      Job* job = job_;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  const int wanted_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int parked_ = 0;
  // Written under the mutex, watched without it.
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  std::atomic<bool> closing_{false};
};

// All that must be new in a forked child: the parent's workers do not exist there, and its locks may be held.
struct State {
  std::mutex mutex;
  Pool* pool = nullptr;
};

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

void run_tasks(int64_t count, double microseconds, Task task, void* context) {
  const int threads = count > 1 && microseconds > worthwhile_microseconds ? get_num_threads() : 1;
  if (threads > 1) {
    State& shared = current_state();
    std::unique_lock<std::mutex> lock(shared.mutex, std::try_to_lock);
    // Another Python thread is inside a kernel: the cores are busy, so this one runs alone.
    if (lock.owns_lock()) {
      if (shared.pool == nullptr || shared.pool->wanted() != threads) {
        delete std::exchange(shared.pool, nullptr);
        shared.pool = new Pool(threads);
      }
      Job job{task, context, count};
      shared.pool->run(job);
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
