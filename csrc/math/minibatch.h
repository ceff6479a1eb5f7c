// Which rows a minibatch holds: part p of P of an order of `count` rows is order[count * p / P : count * (p + 1) / P],
// in integers, so that parts differ by one row at most and each fits ceil(count / P) slots.
#pragma once

#include "scalar.h"

namespace pyppo::math {

struct MinibatchPart {
  int64_t begin, size;
};

// count * part / parts without overflow: `parts` is below 2^31.
PYPPO_FN int64_t part_begin(int64_t count, int64_t part, int64_t parts) {
  return count / parts * part + count % parts * part / parts;
}

PYPPO_FN MinibatchPart minibatch_part(int64_t count, int64_t part, int64_t parts) {
  const int64_t begin = part_begin(count, part, parts);
  return {begin, part_begin(count, part + 1, parts) - begin};
}

// The place in the order of what slot `slot` holds. An unused slot repeats the part's first row, or that of the whole
// order where the part is empty. Nothing may be read at the result where the order is empty.
PYPPO_FN int64_t slot_position(const MinibatchPart& part, int64_t slot) {
  return part.size == 0 ? 0 : part.begin + (slot < part.size ? slot : 0);
}

}  // namespace pyppo::math
