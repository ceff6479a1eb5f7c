// One minibatch's rows out of a rollout's tensors.
#include "../math/minibatch.h"

#include "isa.h"
#include "memory.h"
#include "pool.h"

namespace pyppo::cpu::PYPPO_ISA {
namespace {

constexpr int64_t task_bytes = 1 << 16;  // of one column that a task copies

// The rows that the slots hold, into `found`; the first slot without one, or -1.
int64_t find_rows(const GatherArgs& a, int64_t slots, int64_t least_rows, int64_t* found) {
  const int64_t count = *a.count;
  const math::MinibatchPart part = math::minibatch_part(count, *a.part, a.num_parts);
  for (int64_t slot = 0; slot < slots; ++slot) {
    a.weights[slot] = slot < part.size ? 1.0f : 0.0f;
    found[slot] = 0;
    if (count == 0) continue;
    const int64_t position = a.order[math::slot_position(part, slot)];
    if (position < 0 || position >= count) return slot;
    const int64_t row = a.rows[position];
    if (row < 0 || row >= least_rows) return slot;
    found[slot] = row;
  }
  return -1;
}

// Rows of a fixed size are moved in registers; memcpy of a size that is not known is a call for each.
template <int64_t bytes>
void copy_rows_of(const GatherColumn& column, const int64_t* rows, int64_t begin, int64_t end) {
  const char* from = static_cast<const char*>(column.from);
  char* to = static_cast<char*>(column.to);
  for (int64_t slot = begin; slot < end; ++slot) memcpy(to + slot * bytes, from + rows[slot] * bytes, bytes);
}

void copy_rows(const GatherColumn& column, const int64_t* rows, int64_t begin, int64_t end) {
  const char* from = static_cast<const char*>(column.from);
  char* to = static_cast<char*>(column.to);
  const int64_t bytes = column.row_bytes;
  switch (bytes) {
    case 0:  // nothing to copy, and maybe null pointers, which memcpy may not be given
      return;
    case 1:
      return copy_rows_of<1>(column, rows, begin, end);
    case 4:
      return copy_rows_of<4>(column, rows, begin, end);
    case 8:
      return copy_rows_of<8>(column, rows, begin, end);
    case 16:
      return copy_rows_of<16>(column, rows, begin, end);
  }
  for (int64_t slot = begin; slot < end; ++slot) memcpy(to + slot * bytes, from + rows[slot] * bytes, size_t(bytes));
}

}  // namespace

RowErrors gather_minibatch(const GatherArgs& a) {
  RowErrors errors;
  const int64_t slots = (a.capacity + a.num_parts - 1) / a.num_parts;
  if (slots == 0) return errors;
  int64_t least_rows = a.columns[0].rows, tasks = 0, bytes = 0;
  int64_t first_task[max_gather_columns + 1], task_rows[max_gather_columns];
  for (int c = 0; c < a.num_columns; ++c) {
    const GatherColumn& column = a.columns[c];
    least_rows = column.rows < least_rows ? column.rows : least_rows;
    const int64_t rows = column.row_bytes == 0 ? slots : task_bytes / column.row_bytes;
    task_rows[c] = rows > 0 ? rows : 1;
    first_task[c] = tasks;
    tasks += (slots + task_rows[c] - 1) / task_rows[c];
    bytes += slots * column.row_bytes;
  }
  first_task[a.num_columns] = tasks;
  const Scratch<int64_t> rows{size_t(slots)};
  errors.index = find_rows(a, slots, least_rows, rows.get());
  if (errors.index >= 0) return errors;
  const double microseconds = double(bytes) * 2e-4 + double(slots * a.num_columns) * 3e-3;
  parallel_for(tasks, microseconds, [&](int64_t task) {
    int c = 0;
    while (task >= first_task[c + 1]) ++c;
    const int64_t begin = (task - first_task[c]) * task_rows[c], end = begin + task_rows[c];
    copy_rows(a.columns[c], rows.get(), begin, end < slots ? end : slots);
  });
  return errors;
}

}  // namespace pyppo::cpu::PYPPO_ISA
