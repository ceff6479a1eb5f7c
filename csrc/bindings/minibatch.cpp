// gather_minibatch: check, then launch.
#include <vector>

#include "module.h"

namespace pyppo::bindings {

namespace {

// "columns[3]" and the like: a borrowed tensor keeps a pointer to its name.
const char* item_name(bool output, Py_ssize_t i) {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const char* of : {"columns[", "out["})
      for (int k = 0; k < max_gather_columns; ++k) all.push_back(of + std::to_string(k) + "]");
    return all;
  }();
  return names[size_t(i) + (output ? max_gather_columns : 0)].c_str();
}

// The tensors of a list or tuple, which the tuple keeps alive whatever becomes of the list.
struct Borrowed {
  py::object items;
  std::vector<Borrow> tensors;
};

Borrowed borrow_all(py::handle sequence, bool output) {
  const char* name = output ? "out" : "columns";
  if (!PyList_Check(sequence.ptr()) && !PyTuple_Check(sequence.ptr()))
    detail::fail_type(name, "has type " + detail::type_name(sequence.ptr()), "be a list or tuple of tensors");
  Borrowed all{py::reinterpret_steal<py::object>(PySequence_Tuple(sequence.ptr())), {}};
  if (!all.items) throw PythonError();
  const Py_ssize_t count = PyTuple_GET_SIZE(all.items.ptr());
  if (count < 1 || count > max_gather_columns)
    detail::fail(name, "has " + std::to_string(count) + " tensors", "have 1 to " + std::to_string(max_gather_columns));
  all.tensors.reserve(size_t(count));
  for (Py_ssize_t i = 0; i < count; ++i)
    all.tensors.emplace_back(PyTuple_GET_ITEM(all.items.ptr(), i), item_name(output, i),
                             output ? Access::write : Access::read);
  return all;
}

void require_column(const Tensor& column, const Tensor& out, int64_t slots) {
  if (column.ndim < 1) detail::fail_rank(column, "[R, ...]");
  if (column.dtype.bits % 8 != 0) detail::fail_type(column.name, "has parts of a byte", "have whole ones");
  require_same_dtype(out, column);
  bool same = out.ndim == column.ndim && out.shape[0] == slots;
  for (int i = 1; same && i < out.ndim; ++i) same = out.shape[i] == column.shape[i];
  if (!same)
    detail::fail(out.name, "has shape " + detail::describe(out.shape, out.ndim),
                 "have " + std::to_string(slots) + " rows like those of " + column.name + ", " +
                     detail::describe(column.shape, column.ndim));
  if (slots > 0 && column.shape[0] == 0) detail::fail(column.name, "has no rows", "have one at least");
}

// Which of two tensors holds the index that a slot could not use.
[[noreturn, gnu::cold]] void fail_index(const GatherArgs& a, int64_t slot, const Tensor& rows, const Tensor& order) {
  for (int64_t i = 0; i < *a.count; ++i)
    if (a.order[i] < 0 || a.order[i] >= *a.count)
      detail::fail(order.name, "has " + std::to_string(a.order[i]) + " at " + std::to_string(i),
                   "be a permutation of [0, " + std::to_string(*a.count) + "), which is count");
  int64_t least = a.columns[0].rows;
  for (int c = 1; c < a.num_columns; ++c) least = std::min(least, a.columns[c].rows);
  detail::fail(rows.name, "has an index outside [0, " + std::to_string(least) + ") for slot " + std::to_string(slot),
               "have rows that every column has");
}

void gather_minibatch(py::handle columns_, py::handle rows_, py::handle order_, py::handle count_, py::handle part_,
                      py::handle num_parts_, py::handle out_, py::handle weights_, py::handle errors) {
  const int64_t num_parts = int64_t(integer_of(num_parts_, "num_parts", INT32_MAX));
  if (num_parts == 0) detail::fail("num_parts", "is 0", "be at least 1");
  const Borrow rows(rows_.ptr(), "rows"), order(order_.ptr(), "order"), count(count_.ptr(), "count"),
      part(part_.ptr(), "part"), weights(weights_.ptr(), "weights", Access::write);
  for (const Borrow* t : {&rows, &order, &count, &part}) require_dtype(*t, {kInt64});
  require_rank(rows, 1, "[capacity]");
  require_same_shape(order, rows);
  for (const Borrow* t : {&count, &part})
    if ((*t)->numel() != 1) require_shape(*t, {1}, "one element");
  const int64_t capacity = rows->size(0), slots = (capacity + num_parts - 1) / num_parts;
  require_dtype(weights, {kFloat32});
  require_shape(weights, {slots}, "[ceil(capacity / num_parts)]");
  const Borrowed borrowed_columns = borrow_all(columns_, false), borrowed_out = borrow_all(out_, true);
  const std::vector<Borrow>&columns = borrowed_columns.tensors, &out = borrowed_out.tensors;
  if (out.size() != columns.size())
    detail::fail("out", "has " + std::to_string(out.size()) + " tensors",
                 "have as many as columns, " + std::to_string(columns.size()));
  const Tensor& like = columns[0];
  for (const Borrow* t : {&rows, &order, &count, &part, &weights}) require_same_device(*t, like);
  GatherColumn described[max_gather_columns];
  int64_t bytes = 0;
  for (size_t c = 0; c < columns.size(); ++c) {
    require_column(columns[c], out[c], slots);
    require_same_device(columns[c], like);
    require_same_device(out[c], like);
    const int64_t row_bytes = slots > 0 ? out[c]->nbytes() / slots : 0;
    described[c] = {columns[c]->data, out[c]->data, columns[c]->size(0), row_bytes};
    bytes += out[c]->nbytes();
  }
  for (size_t c = 0; c <= out.size(); ++c) {
    const Tensor& written = c < out.size() ? *out[c] : *weights;
    for (const Borrow& column : columns) require_disjoint(written, column);
    for (const Borrow* t : {&rows, &order, &count, &part}) require_disjoint(written, *t);
    for (size_t other = 0; other < c; ++other) require_disjoint(written, out[other]);
  }
  const GatherArgs args{described,
                        int(columns.size()),
                        capacity,
                        rows->as<int64_t>(),
                        order->as<int64_t>(),
                        count->as<int64_t>(),
                        part->as<int64_t>(),
                        num_parts,
                        weights->as<float>()};
  const DeviceGuard guard(like);
  if (like.is_cuda()) return cuda::gather_minibatch(args, error_flags(errors, like), like.stream());
  if (*args.count < 0 || *args.count > capacity)
    detail::fail("count", "is " + std::to_string(*args.count),
                 "be in [0, " + std::to_string(capacity) + "], which is the capacity");
  if (*args.part < 0 || *args.part >= num_parts)
    detail::fail("part", "is " + std::to_string(*args.part), "be in [0, num_parts)");
  const RowErrors found = run_cpu(bytes / 4, [&] { return cpu::gather_minibatch(args); });
  if (found.index >= 0) fail_index(args, found.index, rows, order);
}

}  // namespace

void bind_minibatch(py::module_& m) {
  define<gather_minibatch>(m, "gather_minibatch", "columns, rows, order, count, part, num_parts, out, weights, errors");
}

}  // namespace pyppo::bindings
