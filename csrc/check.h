// What the bindings demand of lists of tensors, on every device.
//
// Everything is checked before anything is written. What kernels do not support raises
// NotImplementedError, upon which backend="auto" uses the reference; what no backend could make
// sense of raises RuntimeError. Both name the list, the index and the value.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace sap_fast {

enum class Access { kRead, kWrite };

// A list as an operation got it. Entries that are absent (a parameter without a direction) are
// null.
struct TensorList {
  const char* name;
  Access access;
  std::vector<const at::Tensor*> tensors;
};

inline TensorList list_of(const char* name, Access access, at::TensorList tensors) {
  TensorList list{name, access, {}};
  list.tensors.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) list.tensors.push_back(&tensor);
  return list;
}

inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// As Python names it: torch.float64, not Double.
inline std::string name_of(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}

// Raises unless `list` has as many tensors as `first`, each of the shape, layout and device of its
// counterpart, without gaps. Those of one shape and the same strides are read and written in the
// order in which they lie in memory.
inline void check_layout(const TensorList& first, const TensorList& list) {
  TORCH_CHECK(first.tensors.size() == list.tensors.size(), first.name, " has ",
              first.tensors.size(), " tensors, ", list.name, " has ", list.tensors.size());
  const at::Tensor& leader = *first.tensors.front();
  for (size_t index = 0; index < list.tensors.size(); ++index) {
    if (list.tensors[index] == nullptr) continue;
    const at::Tensor& tensor = *list.tensors[index];
    const at::Tensor& counterpart = *first.tensors[index];
    TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, list.name, "[", index,
                                "] has layout ", tensor.layout(), "; dense tensors are supported");
    TORCH_CHECK_NOT_IMPLEMENTED(tensor.device() == leader.device(), list.name, "[", index,
                                "] is on ", tensor.device(), ", ", first.name, "[0] on ",
                                leader.device(), "; give tensors of one device");
    TORCH_CHECK(tensor.sizes() == counterpart.sizes(), list.name, "[", index, "] has shape ",
                tensor.sizes(), ", ", first.name, "[", index, "] has ", counterpart.sizes());
    if (tensor.is_contiguous() && counterpart.is_contiguous()) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(
        tensor.is_non_overlapping_and_dense() && tensor.strides() == counterpart.strides(),
        list.name, "[", index, "] of shape ", tensor.sizes(), " has strides ", tensor.strides(),
        ", ", first.name, "[", index, "] has ", counterpart.strides(),
        "; equal strides without gaps are supported");
  }
}

inline void check_dtype(const TensorList& first) {
  for (size_t index = 0; index < first.tensors.size(); ++index) {
    const at::ScalarType dtype = first.tensors[index]->scalar_type();
    TORCH_CHECK_NOT_IMPLEMENTED(is_supported(dtype), first.name, "[", index, "] has dtype ",
                                name_of(dtype), "; float32, bfloat16 and float16 are supported");
  }
}

// Raises unless every tensor of `list` has the dtype of its counterpart in `first`.
inline void check_same_dtype(const TensorList& first, const TensorList& list) {
  for (size_t index = 0; index < list.tensors.size(); ++index) {
    if (list.tensors[index] == nullptr) continue;
    const at::ScalarType dtype = list.tensors[index]->scalar_type();
    const at::ScalarType expected = first.tensors[index]->scalar_type();
    TORCH_CHECK_NOT_IMPLEMENTED(dtype == expected, list.name, "[", index, "] has dtype ",
                                name_of(dtype), ", ", first.name, "[", index, "] has ",
                                name_of(expected), "; equal dtypes are supported");
  }
}

inline void check_float32(const TensorList& list) {
  for (size_t index = 0; index < list.tensors.size(); ++index) {
    const at::ScalarType dtype = list.tensors[index]->scalar_type();
    TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat, list.name, "[", index, "] has dtype ",
                                name_of(dtype), "; float32 is supported");
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
  for (const TensorList* list : lists) count += list->tensors.size();
  extents.reserve(count);
  for (const TensorList* list : lists) {
    const auto sorted = static_cast<std::ptrdiff_t>(extents.size());
    for (size_t index = 0; index < list->tensors.size(); ++index) {
      const at::Tensor* const tensor = list->tensors[index];
      if (tensor == nullptr || tensor->numel() == 0) continue;
      const auto begin = reinterpret_cast<uintptr_t>(tensor->const_data_ptr());
      extents.push_back({begin, begin + tensor->nbytes(), list, index});
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
    TORCH_CHECK(other == nullptr || other->end <= extent.begin, extent.list->name, "[",
                extent.index, "] shares memory with ", other->list->name, "[", other->index,
                "]; each tensor may be given once, and one that is written only to itself");
    if (farthest == nullptr || extent.end > farthest->end) farthest = &extent;
    if (written && (farthest_written == nullptr || extent.end > farthest_written->end)) {
      farthest_written = &extent;
    }
  }
}

inline void check_one_dimension(const TensorList& list) {
  for (size_t index = 0; index < list.tensors.size(); ++index) {
    TORCH_CHECK(list.tensors[index]->dim() == 1, list.name, "[", index, "] has shape ",
                list.tensors[index]->sizes(), "; one dimension is needed");
  }
}

inline void check_scalar(const char* name, const at::Tensor& scalar) {
  TORCH_CHECK(scalar.numel() == 1 && scalar.is_floating_point(), name, " has shape ",
              scalar.sizes(), " and dtype ", name_of(scalar.scalar_type()),
              "; a floating-point tensor of one element is needed");
}

inline void check_not_empty(const char* name, at::TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), name, " is empty; give at least one tensor");
}

// Raises unless `items` has for each tensor of `list` one of one element, on the same device.
inline void check_one_element_each(const char* name, at::TensorList items, const TensorList& list) {
  TORCH_CHECK(items.size() == list.tensors.size(), list.name, " has ", list.tensors.size(),
              " tensors, ", name, " has ", items.size());
  for (size_t index = 0; index < items.size(); ++index) {
    const at::Tensor& tensor = *list.tensors[index];
    TORCH_CHECK(items[index].numel() == 1, name, "[", index, "] has shape ", items[index].sizes(),
                "; one element is needed");
    TORCH_CHECK_NOT_IMPLEMENTED(items[index].device() == tensor.device(), name, "[", index,
                                "] is on ", items[index].device(), ", ", list.name, "[", index,
                                "] on ", tensor.device());
  }
}

// Raises unless `vector` is as long as a row of `matrix`, (…, H); returns the number of rows.
inline int64_t rows_of(const char* vector_name, const at::Tensor& vector, const char* matrix_name,
                       const at::Tensor& matrix) {
  TORCH_CHECK(vector.dim() == 1 && matrix.dim() >= 1 && vector.size(0) == matrix.size(-1),
              vector_name, " has shape ", vector.sizes(), ", ", matrix_name, " has ",
              matrix.sizes(), "; one dimension is needed, as long as the last one of ",
              matrix_name);
  return vector.numel() == 0 ? 0 : matrix.numel() / vector.numel();
}

// ---- the lists of single operations ----

inline void check_pair(const TensorList& params, const TensorList& buffers) {
  check_layout(params, params);
  check_layout(params, buffers);
  check_dtype(params);
  check_same_dtype(params, buffers);
}

struct AdamWLists {
  TensorList params, grads, exp_avgs, exp_avg_sqs, steps;
  TensorList directions;                        // null where there is none, or nothing is blended
  std::vector<std::optional<at::Tensor>> held;  // what `directions` points to

  std::array<const TensorList*, 4> written() const {
    return {&params, &exp_avgs, &exp_avg_sqs, &steps};
  }
};

inline AdamWLists check_adamw(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                              at::TensorList exp_avg_sqs, at::TensorList steps,
                              const c10::List<std::optional<at::Tensor>>& directions, bool blends) {
  check_not_empty("params", params);
  AdamWLists lists{list_of("params", Access::kWrite, params),
                   list_of("grads", Access::kRead, grads),
                   list_of("exp_avgs", Access::kWrite, exp_avgs),
                   list_of("exp_avg_sqs", Access::kWrite, exp_avg_sqs),
                   list_of("steps", Access::kWrite, steps),
                   {"directions", Access::kRead, {}},
                   {directions.begin(), directions.end()}};
  auto& [p, g, m, v, t, d, held] = lists;
  if (blends && !held.empty()) {
    for (const auto& item : held) d.tensors.push_back(item.has_value() ? &*item : nullptr);
  } else {
    d.tensors.resize(params.size(), nullptr);
  }
  for (const TensorList* list : {&p, &g, &m, &v, &d}) check_layout(p, *list);
  check_dtype(p);
  check_same_dtype(p, g);
  check_same_dtype(p, d);
  check_float32(m);
  check_float32(v);
  check_float32(t);
  check_one_element_each("steps", steps, p);
  check_overlap({&p, &g, &m, &v, &t, &d});
  return lists;
}

// ---- what is written ----

// Lets autograd see that tensors were written.
inline void bump_versions(const TensorList& list) {
  for (const at::Tensor* tensor : list.tensors) {
    if (!tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace sap_fast
