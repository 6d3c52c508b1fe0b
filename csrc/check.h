// What the bindings demand of lists of tensors, on every device.
//
// Everything is checked before anything is written. What kernels do not support raises
// NotImplementedError, upon which backend="auto" uses the reference; what no backend could make
// sense of raises RuntimeError. Both name the list, the index and the value.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "stable.h"

namespace sap_fast {

enum class Access { kRead, kWrite };

// A list as an operation got it, or one tensor. Entries may be absent: a parameter without a
// direction.
struct TensorList {
  const char* name;
  Access access;
  std::vector<Tensor> tensors;

  TensorList(const char* called, Access wanted, std::vector<Tensor> given)
      : name(called), access(wanted), tensors(std::move(given)) {}

  TensorList(const char* called, Access wanted, Tensor given) : name(called), access(wanted) {
    tensors.push_back(std::move(given));
  }

  size_t size() const { return tensors.size(); }
  const Tensor& operator[](size_t index) const { return tensors[index]; }
};

inline bool is_supported(int32_t dtype) {
  const Codes& code = codes();
  return dtype == code.float32 || dtype == code.bfloat16 || dtype == code.float16;
}

// Raises for what has no address: sparse tensors, and whatever else PyTorch may have.
inline void check_dense(const TensorList& list) {
  for (size_t index = 0; index < list.size(); ++index) {
    if (!list[index]) continue;
    SAP_FAST_CHECK_SUPPORTED(list[index].layout() == codes().strided, list.name, "[", index,
                             "] has layout ", layout_name(list[index].layout()),
                             "; dense tensors are supported");
  }
}

// Raises unless `list` has as many tensors as `first`, each of the shape, layout and device of its
// counterpart, without gaps. Those of one shape and the same strides are read and written in the
// order in which they lie in memory.
inline void check_layout(const TensorList& first, const TensorList& list) {
  SAP_FAST_CHECK(first.size() == list.size(), first.name, " has ", first.size(), " tensors, ",
                 list.name, " has ", list.size());
  check_dense(list);
  const Tensor& leader = first[0];
  for (size_t index = 0; index < list.size(); ++index) {
    if (!list[index]) continue;
    const Tensor& tensor = list[index];
    const Tensor& counterpart = first[index];
    SAP_FAST_CHECK_SUPPORTED(tensor.device() == leader.device(), list.name, "[", index, "] is on ",
                             tensor.device(), ", ", first.name, "[0] on ", leader.device(),
                             "; give tensors of one device");
    SAP_FAST_CHECK(tensor.sizes() == counterpart.sizes(), list.name, "[", index, "] has shape ",
                   tensor.sizes(), ", ", first.name, "[", index, "] has ", counterpart.sizes());
    if (tensor.is_contiguous() && counterpart.is_contiguous()) continue;
    SAP_FAST_CHECK_SUPPORTED(!tensor.has_gaps() && tensor.strides() == counterpart.strides(),
                             list.name, "[", index, "] of shape ", tensor.sizes(), " has strides ",
                             tensor.strides(), ", ", first.name, "[", index, "] has ",
                             counterpart.strides(), "; equal strides without gaps are supported");
  }
}

inline void check_dtype(const TensorList& list) {
  for (size_t index = 0; index < list.size(); ++index) {
    const int32_t dtype = list[index].dtype();
    SAP_FAST_CHECK_SUPPORTED(is_supported(dtype), list.name, "[", index, "] has dtype ",
                             dtype_name(dtype), "; float32, bfloat16 and float16 are supported");
  }
}

// Raises unless every tensor of `list` has the dtype of its counterpart in `first`.
inline void check_same_dtype(const TensorList& first, const TensorList& list) {
  for (size_t index = 0; index < list.size(); ++index) {
    if (!list[index]) continue;
    const int32_t dtype = list[index].dtype();
    const int32_t expected = first[index].dtype();
    SAP_FAST_CHECK_SUPPORTED(dtype == expected, list.name, "[", index, "] has dtype ",
                             dtype_name(dtype), ", ", first.name, "[", index, "] has ",
                             dtype_name(expected), "; equal dtypes are supported");
  }
}

inline void check_float32(const TensorList& list) {
  for (size_t index = 0; index < list.size(); ++index) {
    const int32_t dtype = list[index].dtype();
    SAP_FAST_CHECK_SUPPORTED(dtype == codes().float32, list.name, "[", index, "] has dtype ",
                             dtype_name(dtype), "; float32 is supported");
  }
}

// Raises if a tensor that is written shares memory with any other tensor.
inline void check_overlap(std::initializer_list<const TensorList*> lists) {
  struct Extent {
    uintptr_t begin;
    uintptr_t end;
    const TensorList* list;
    size_t index;
  };
  const auto by_address = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
  std::vector<Extent> extents;
  size_t count = 0;
  for (const TensorList* list : lists) count += list->size();
  extents.reserve(count);
  for (const TensorList* list : lists) {
    const auto sorted = static_cast<std::ptrdiff_t>(extents.size());
    for (size_t index = 0; index < list->size(); ++index) {
      const Tensor& tensor = (*list)[index];
      if (!tensor || tensor.numel() == 0) continue;
      const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data());
      const auto bytes = static_cast<uintptr_t>(tensor.numel() * tensor.element_size());
      extents.push_back({begin, begin + bytes, list, index});
    }
    // Tensors that were made one after the other mostly lie so: a list is seldom out of order.
    const auto first = extents.begin() + sorted;
    if (!std::is_sorted(first, extents.end(), by_address)) {
      std::sort(first, extents.end(), by_address);
    }
    std::inplace_merge(extents.begin(), first, extents.end(), by_address);
  }
  const Extent* farthest = nullptr;          // of all so far, the one that ends last
  const Extent* farthest_written = nullptr;  // of the written ones
  for (const Extent& extent : extents) {
    const bool written = extent.list->access == Access::kWrite;
    const Extent* const other = written ? farthest : farthest_written;
    SAP_FAST_CHECK(other == nullptr || other->end <= extent.begin, extent.list->name, "[",
                   extent.index, "] shares memory with ", other->list->name, "[", other->index,
                   "]; each tensor may be given once, and one that is written only to itself");
    if (farthest == nullptr || extent.end > farthest->end) farthest = &extent;
    if (written && (farthest_written == nullptr || extent.end > farthest_written->end)) {
      farthest_written = &extent;
    }
  }
}

inline void check_one_dimension(const TensorList& list) {
  for (size_t index = 0; index < list.size(); ++index) {
    SAP_FAST_CHECK(list[index].dim() == 1, list.name, "[", index, "] has shape ",
                   list[index].sizes(), "; one dimension is needed");
  }
}

inline void check_scalar(const char* name, const Tensor& scalar) {
  SAP_FAST_CHECK(scalar.numel() == 1 && scalar.is_floating_point(), name, " has shape ",
                 scalar.sizes(), " and dtype ", dtype_name(scalar.dtype()),
                 "; a floating-point tensor of one element is needed");
}

inline void check_not_empty(const TensorList& list) {
  SAP_FAST_CHECK(list.size() != 0, list.name, " is empty; give at least one tensor");
}

// Raises unless `items` has for each tensor of `list` one of one element, on the same device.
inline void check_one_element_each(const TensorList& items, const TensorList& list) {
  SAP_FAST_CHECK(items.size() == list.size(), list.name, " has ", list.size(), " tensors, ",
                 items.name, " has ", items.size());
  check_dense(items);
  for (size_t index = 0; index < items.size(); ++index) {
    SAP_FAST_CHECK(items[index].numel() == 1, items.name, "[", index, "] has shape ",
                   items[index].sizes(), "; one element is needed");
    SAP_FAST_CHECK_SUPPORTED(items[index].device() == list[index].device(), items.name, "[", index,
                             "] is on ", items[index].device(), ", ", list.name, "[", index,
                             "] on ", list[index].device());
  }
}

// Raises unless `vector` is as long as a row of `matrix`, (…, H); returns the number of rows.
inline int64_t rows_of(const TensorList& vector, const TensorList& matrix) {
  const Integers& row = vector[0].sizes();
  const Integers& all = matrix[0].sizes();
  SAP_FAST_CHECK(row.size == 1 && all.size >= 1 && row.data[0] == all.data[all.size - 1],
                 vector.name, " has shape ", row, ", ", matrix.name, " has ", all,
                 "; one dimension is needed, as long as the last one of ", matrix.name);
  return vector[0].numel() == 0 ? 0 : matrix[0].numel() / vector[0].numel();
}

// Raises unless the one tensor of the list is contiguous.
inline void check_contiguous(const TensorList& list) {
  SAP_FAST_CHECK_SUPPORTED(list[0].is_contiguous(), list.name, " of shape ", list[0].sizes(),
                           " has strides ", list[0].strides(), "; contiguous ones are supported");
}

// ---- the lists of single operations ----

inline void check_pair(const TensorList& params, const TensorList& buffers) {
  check_layout(params, params);
  check_layout(params, buffers);
  check_dtype(params);
  check_same_dtype(params, buffers);
}

// What adamw_blend_ is given, in order.
struct AdamWArguments {
  TensorList params, grads, exp_avgs, exp_avg_sqs, steps;
  TensorList directions;  // absent where there is none, or nothing is blended
  Tensor lr;
  double beta1, beta2, eps, weight_decay;
  bool maximize;
  Tensor blend, gradient_scale;

  explicit AdamWArguments(Arguments arguments)
      : params("params", Access::kWrite, arguments.tensors()),
        grads("grads", Access::kRead, arguments.tensors()),
        exp_avgs("exp_avgs", Access::kWrite, arguments.tensors()),
        exp_avg_sqs("exp_avg_sqs", Access::kWrite, arguments.tensors()),
        steps("steps", Access::kWrite, arguments.tensors()),
        directions("directions", Access::kRead, arguments.optional_tensors()),
        lr(arguments.tensor()),
        beta1(arguments.number()),
        beta2(arguments.number()),
        eps(arguments.number()),
        weight_decay(arguments.number()),
        maximize(arguments.flag()),
        blend(arguments.optional_tensor()),
        gradient_scale(arguments.optional_tensor()) {
    check_not_empty(params);
    if (!blend || directions.size() == 0) {
      directions.tensors.clear();
      directions.tensors.resize(params.size());
    }
    const auto& [p, g, m, v, t, d] =
        std::tie(params, grads, exp_avgs, exp_avg_sqs, steps, directions);
    for (const TensorList* list : {&p, &g, &m, &v, &d}) check_layout(p, *list);
    check_dtype(p);
    check_same_dtype(p, g);
    check_same_dtype(p, d);
    check_float32(m);
    check_float32(v);
    check_float32(t);
    check_one_element_each(t, p);
    check_overlap({&p, &g, &m, &v, &t, &d});
    check_scalar("lr", lr);
    if (blend) check_scalar("blend", blend);
    if (gradient_scale) check_scalar("gradient_scale", gradient_scale);
  }
};

}  // namespace sap_fast
