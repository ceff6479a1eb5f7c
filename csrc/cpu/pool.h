// The kernels' threads. Not OpenMP: its workers spin for milliseconds after a region, on the core that the
// environments need, where these spin for 50 us; and a forked child hangs on workers that it does not have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pyppo::cpu {

using Task = void (*)(void* context, int64_t index);

// Calls task(context, i) once for each i in [0, count), in any order and on any thread, and returns when all are done.
// `microseconds` estimates the work: waking a parked thread costs some 40 us, so small work stays on the caller's.
void run_tasks(int64_t count, double microseconds, Task task, void* context);

template <class F>
static inline void parallel_for(int64_t count, double microseconds, F&& body) {
  using Body = typename std::remove_reference<F>::type;
  run_tasks(count, microseconds, [](void* context, int64_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

// For as long as one lives, the pool's threads do not park between the caller's regions, which then cost a microsecond
// each and not the 40 of a wake-up: for an update's thousands of short ones. One within another does nothing.
class BusySection {
 public:
  BusySection();
  ~BusySection();
  BusySection(const BusySection&) = delete;
  BusySection& operator=(const BusySection&) = delete;

 private:
  bool entered_;
};

// 64-byte aligned, to be freed with std::free; throws std::bad_alloc. Here and not in the kernels' files, which may not
// instantiate exceptions' inline members once per instruction set.
void* allocate_scratch(size_t bytes);

}  // namespace pyppo::cpu
