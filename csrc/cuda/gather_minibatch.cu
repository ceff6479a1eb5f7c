// One minibatch's rows out of a rollout's tensors, all in one launch.
//
// A block belongs to one column: it copies a few short rows, or a stretch of one long row, in words as wide as the
// column's addresses and rows allow. The last blocks write the weights. Which part of which order, each thread reads
// from the device, so a captured graph can be replayed as they change.
#include "../math/minibatch.h"
#include "device.cuh"

namespace pyppo::cuda {
namespace {

constexpr int threads = 256;
constexpr int words_per_thread = 4;
constexpr int words_per_block = threads * words_per_thread;

struct Column {
  const unsigned char* from;
  unsigned char* to;
  int64_t rows, words;   // words of a row
  int64_t end_block;     // of the grid; the next column's blocks follow
  int word_bytes;        // 1, 2, 4, 8 or 16
  int slots_per_block;   // short rows: how many rows a block copies
  int64_t blocks_a_row;  // long rows: how many blocks copy a row; else 1
};

struct GatherKernelArgs {
  Column columns[max_gather_columns];
  int num_columns;
  int64_t capacity, num_parts, slots;
  const int64_t *rows, *order, *count, *part;
  float* weights;
  ErrorFlags errors;
};

// A number that the device says, within its bounds.
__device__ int64_t clamped(int64_t x, int64_t end) { return x < 0 ? 0 : (x < end ? x : end - 1); }

struct Minibatch {
  int64_t count;
  math::MinibatchPart part;
};

__device__ Minibatch read_minibatch(const GatherKernelArgs& a) {
  const int64_t count = clamped(*a.count, a.capacity + 1);
  return {count, math::minibatch_part(count, clamped(*a.part, a.num_parts), a.num_parts)};
}

// The row of `column` that a slot holds; noted where there is none, and row 0 then.
__device__ int64_t row_of(const GatherKernelArgs& a, const Minibatch& batch, const Column& column, int64_t slot) {
  if (batch.count == 0) return 0;
  const int64_t position = a.order[math::slot_position(batch.part, slot)];
  const bool in_order = position >= 0 && position < batch.count;
  const int64_t row = in_order ? a.rows[position] : -1;
  if (row >= 0 && row < column.rows) return row;
  a.errors.index(slot);
  return 0;
}

// A thread loads all its words before it stores any, so that it waits for memory once.
template <class Word>
__device__ void copy_words(const GatherKernelArgs& a, const Column& column, int64_t block) {
  const Minibatch batch = read_minibatch(a);
  const Word* from = reinterpret_cast<const Word*>(column.from);
  Word* to = reinterpret_cast<Word*>(column.to);
  const int64_t first_slot = block / column.blocks_a_row * column.slots_per_block;
  const int64_t first_word = block % column.blocks_a_row * words_per_block;
  const int slots = int(smaller<int64_t>(column.slots_per_block, a.slots - first_slot));
  const int row_words = int(smaller<int64_t>(column.words - first_word, words_per_block));
  const int count = slots * row_words;
  Word word[words_per_thread];
#pragma unroll
  for (int k = 0; k < words_per_thread; ++k) {
    const int i = int(threadIdx.x) + k * threads;
    if (i >= count) break;
    const int64_t row = row_of(a, batch, column, first_slot + i / row_words);
    word[k] = from[row * column.words + first_word + i % row_words];
  }
#pragma unroll
  for (int k = 0; k < words_per_thread; ++k) {
    const int i = int(threadIdx.x) + k * threads;
    if (i >= count) break;
    to[(first_slot + i / row_words) * column.words + first_word + i % row_words] = word[k];
  }
}

__device__ void write_weights(const GatherKernelArgs& a, int64_t block) {
  const Minibatch batch = read_minibatch(a);
  if (block == 0 && threadIdx.x == 0 && (*a.count != batch.count || *a.part != clamped(*a.part, a.num_parts)))
    a.errors.index(0);
#pragma unroll
  for (int k = 0; k < words_per_thread; ++k) {
    const int64_t slot = block * words_per_block + k * threads + threadIdx.x;
    if (slot < a.slots) a.weights[slot] = slot < batch.part.size ? 1.0f : 0.0f;
  }
}

__global__ __launch_bounds__(threads) void gather_kernel(const __grid_constant__ GatherKernelArgs a) {
  int c = 0;
  int64_t first_block = 0;
  while (c < a.num_columns && int64_t(blockIdx.x) >= a.columns[c].end_block) first_block = a.columns[c++].end_block;
  const int64_t block = int64_t(blockIdx.x) - first_block;
  if (c == a.num_columns) return write_weights(a, block);
  const Column& column = a.columns[c];
  switch (column.word_bytes) {
    case 16:
      return copy_words<uint4>(a, column, block);
    case 8:
      return copy_words<uint2>(a, column, block);
    case 4:
      return copy_words<uint32_t>(a, column, block);
    case 2:
      return copy_words<uint16_t>(a, column, block);
    default:
      return copy_words<uint8_t>(a, column, block);
  }
}

// The widest word that divides a column's addresses and the size of its rows.
int word_bytes_of(const GatherColumn& column) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(column.from) | reinterpret_cast<uintptr_t>(column.to) |
                        uintptr_t(column.row_bytes) | 16;
  return int(all & (~all + 1));
}

// The column as the kernel has it, and how many blocks copy it.
int64_t plan(const GatherColumn& column, int64_t slots, Column& out) {
  out.from = static_cast<const unsigned char*>(column.from);
  out.to = static_cast<unsigned char*>(column.to);
  out.rows = column.rows;
  out.word_bytes = word_bytes_of(column);
  out.words = column.row_bytes / out.word_bytes;
  if (out.words == 0) return 0;
  out.blocks_a_row = ceil_div(out.words, words_per_block);
  out.slots_per_block = out.blocks_a_row > 1 ? 1 : int(words_per_block / out.words);
  return ceil_div(slots, out.slots_per_block) * out.blocks_a_row;
}

}  // namespace

void gather_minibatch(const GatherArgs& args, int64_t* errors, Stream stream) {
  const int64_t slots = ceil_div(args.capacity, args.num_parts);
  if (slots == 0) return;
  GatherKernelArgs a = {};
  a.num_columns = args.num_columns;
  a.capacity = args.capacity;
  a.num_parts = args.num_parts;
  a.slots = slots;
  a.rows = args.rows;
  a.order = args.order;
  a.count = args.count;
  a.part = args.part;
  a.weights = args.weights;
  a.errors = {errors};
  int64_t blocks = 0;
  for (int c = 0; c < args.num_columns; ++c) {
    blocks += plan(args.columns[c], slots, a.columns[c]);
    a.columns[c].end_block = blocks;
  }
  launch("gather_minibatch", gather_kernel, blocks + ceil_div(slots, words_per_block), threads, 0, stream, a);
}

}  // namespace pyppo::cuda
