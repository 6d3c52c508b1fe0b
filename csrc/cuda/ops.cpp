// The operations of sap_fast/ops/schema.py on CUDA devices: what is checked, which tensors go into
// one launch. The kernels, in the .cu files, know nothing of PyTorch.
//
// Everything is checked, and every error raised that can be foreseen, before anything is queued.
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "kernels.h"

namespace sap_fast::cuda {
namespace {

// Raises if an operation could not be queued, and leaves no error behind for whoever asks next.
void check_launch(const char* operation, cudaError_t error) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  TORCH_CHECK(false, "sap_fast::", operation, " could not be launched: ", cudaGetErrorName(error),
              ", ", cudaGetErrorString(error));
}

Storage storage_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Storage::kFloat32;
    case at::kBFloat16:
      return Storage::kBFloat16;
    default:
      return Storage::kFloat16;
  }
}

void* address_of(const at::Tensor& tensor, Access access) {
  return access == Access::kWrite ? tensor.mutable_data_ptr()
                                  : const_cast<void*>(tensor.const_data_ptr());
}

// Raises unless the tensor is on `device`. A scalar on the GPU brings tensors of the CPU here.
void check_device(const char* name, const at::Tensor& tensor, const at::Device& device) {
  TORCH_CHECK_NOT_IMPLEMENTED(device.is_cuda() && tensor.device() == device, name, " is on ",
                              tensor.device(), "; one CUDA device for all tensors is supported");
}

// What the kernels read in place of a 0-d tensor: its value if it is on the CPU, else its address.
Scalar scalar_of(const char* name, const at::Tensor& tensor, const at::Device& device) {
  check_scalar(name, tensor);
  if (tensor.is_cpu()) return {nullptr, false, tensor.item<double>()};
  check_device(name, tensor, device);
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
      " has dtype ", tensor.scalar_type(), "; float32 and float64 are supported");
  return {tensor.const_data_ptr(), tensor.scalar_type() == at::kDouble, 0};
}

Scalar scalar_of(const char* name, const std::optional<at::Tensor>& tensor,
                 const at::Device& device, double otherwise) {
  return tensor.has_value() ? scalar_of(name, *tensor, device) : Scalar{nullptr, false, otherwise};
}

// Memory for an operation, back with the allocator at its end: the stream runs in order.
at::Tensor allocate_scratch(int64_t bytes, const at::Device& device) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

// Tensors of one storage type with their counterparts in other lists.
template <int kOperands>
struct Group {
  Storage storage;
  std::vector<int64_t> sizes;
  std::array<std::vector<void*>, kOperands> addresses;

  // The first operands of the group.
  template <int kFirst = kOperands>
  TensorLists<kFirst> lists() const {
    static_assert(kFirst <= kOperands);
    TensorLists<kFirst> result{static_cast<int64_t>(sizes.size()), sizes.data(), {}};
    for (int operand = 0; operand < kFirst; ++operand) {
      result.addresses[operand] = addresses[operand].data();
    }
    return result;
  }
};

// Sorts those of the tensors that `selects(index)` by the storage type of the first list.
template <int kOperands, class Selects>
std::vector<Group<kOperands>> groups_of(const TensorList* const (&lists)[kOperands],
                                        const Selects& selects) {
  std::vector<Group<kOperands>> groups;
  for (const Storage storage : {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16}) {
    Group<kOperands> group{storage, {}, {}};
    for (size_t index = 0; index < lists[0]->tensors.size(); ++index) {
      const at::Tensor& tensor = *lists[0]->tensors[index];
      if (storage_of(tensor) != storage || !selects(index)) continue;
      group.sizes.push_back(tensor.numel());
      for (int operand = 0; operand < kOperands; ++operand) {
        const TensorList& list = *lists[operand];
        group.addresses[operand].push_back(address_of(*list.tensors[index], list.access));
      }
    }
    if (!group.sizes.empty()) groups.push_back(std::move(group));
  }
  return groups;
}

template <int kOperands>
std::vector<Group<kOperands>> groups_of(const TensorList* const (&lists)[kOperands]) {
  return groups_of(lists, [](size_t) { return true; });
}

// The device of a list's first tensor, which is that of all tensors of the operation.
at::Device device_of(const TensorList& list) {
  const at::Device device = list.tensors.front()->device();
  check_device((std::string(list.name) + "[0]").c_str(), *list.tensors.front(), device);
  return device;
}

// ---- reductions ----

// Sums what launch(group, partial sums, stream) writes for each chunk of each group.
template <int kOperands, class Launch>
at::Tensor reduce(const char* operation, const at::Device& device,
                  const std::vector<Group<kOperands>>& groups, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(device);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int64_t chunks = 0;
  for (const auto& group : groups) {
    chunks += count_chunks(static_cast<int64_t>(group.sizes.size()), group.sizes.data());
  }
  const at::Tensor scratch = allocate_scratch(chunks * static_cast<int64_t>(sizeof(float)), device);
  at::Tensor out = at::empty({}, at::TensorOptions().dtype(at::kFloat).device(device));
  auto* const partial_sums = static_cast<float*>(scratch.mutable_data_ptr());
  float* next = partial_sums;
  for (const auto& group : groups) {
    check_launch(operation, launch(group, next, stream));
    next += count_chunks(static_cast<int64_t>(group.sizes.size()), group.sizes.data());
  }
  check_launch(operation, add_up(partial_sums, chunks, out.mutable_data_ptr<float>(), stream));
  return out;
}

at::Tensor sum_squares_op(at::TensorList tensors) {
  check_not_empty("tensors", tensors);
  const TensorList list = list_of("tensors", Access::kRead, tensors);
  check_layout(list, list);
  check_dtype(list);
  const at::Device device = device_of(list);
  return reduce("sum_squares", device, groups_of({&list}),
                [](const Group<1>& group, float* partial_sums, cudaStream_t stream) {
                  return sum_squares(group.storage, group.lists(), partial_sums, stream);
                });
}

at::Tensor dot_op(at::TensorList left, at::TensorList right) {
  check_not_empty("left", left);
  const TensorList a = list_of("left", Access::kRead, left);
  const TensorList b = list_of("right", Access::kRead, right);
  check_pair(a, b);
  const at::Device device = device_of(a);
  return reduce("dot", device, groups_of({&a, &b}),
                [](const Group<2>& group, float* partial_sums, cudaStream_t stream) {
                  return dot(group.storage, group.lists(), partial_sums, stream);
                });
}

// ---- the perturbation ----

// Checks all arguments, marks what is written, and calls launch(storage, lists, scalar, stream) for
// each group. `scalar_on(device)` returns the scalar that the kernels take.
template <class ScalarOn, class Launch>
void update_pair(const char* operation, const TensorList& params, const TensorList& buffers,
                 const ScalarOn& scalar_on, const Launch& launch) {
  check_pair(params, buffers);
  check_overlap({&params, &buffers});
  const at::Device device = device_of(params);
  const Scalar scalar = scalar_on(device);
  const std::vector<Group<2>> groups = groups_of({&params, &buffers});
  const c10::cuda::CUDAGuard guard(device);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  for (const TensorList* list : {&params, &buffers}) {
    if (list->access == Access::kWrite) bump_versions(*list);
  }
  for (const auto& group : groups) {
    check_launch(operation, launch(group.storage, group.lists(), scalar, stream));
  }
}

void perturb_swap_op(at::TensorList params, at::TensorList buffers, const at::Tensor& scale) {
  check_not_empty("params", params);
  update_pair(
      "perturb_swap_", list_of("params", Access::kWrite, params),
      list_of("buffers", Access::kWrite, buffers),
      [&](const at::Device& device) { return scalar_of("scale", scale, device); }, &perturb_swap);
}

void reflect_op(at::TensorList params, at::TensorList buffers) {
  check_not_empty("params", params);
  update_pair(
      "reflect_", list_of("params", Access::kWrite, params),
      list_of("buffers", Access::kRead, buffers), [](const at::Device&) { return Scalar{}; },
      [](Storage storage, const TensorLists<2>& lists, const Scalar&, cudaStream_t stream) {
        return reflect(storage, lists, stream);
      });
}

void restore_swap_op(at::TensorList params, at::TensorList buffers,
                     const at::Tensor& inverse_scale) {
  check_not_empty("params", params);
  update_pair(
      "restore_swap_", list_of("params", Access::kWrite, params),
      list_of("buffers", Access::kWrite, buffers),
      [&](const at::Device& device) { return scalar_of("inverse_scale", inverse_scale, device); },
      &restore_swap);
}

// ---- the update ----

void adamw_blend_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, at::TensorList steps,
                    const c10::List<std::optional<at::Tensor>>& directions, const at::Tensor& lr,
                    double beta1, double beta2, double eps, double weight_decay, bool maximize,
                    const std::optional<at::Tensor>& blend,
                    const std::optional<at::Tensor>& gradient_scale) {
  const AdamWLists lists =
      check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, directions, blend.has_value());
  const auto& [p, g, m, v, t, d, held] = lists;
  const at::Device device = device_of(p);
  const AdamWOptions options{
      scalar_of("lr", lr, device),
      beta1,
      beta2,
      eps,
      weight_decay,
      maximize,
      scalar_of("blend", blend, device, 0),
      scalar_of("gradient_scale", gradient_scale, device, 1),
  };
  // Only tensors that have a direction read one.
  const auto has_direction = [&](size_t index) { return d.tensors[index] != nullptr; };
  const std::vector<Group<6>> blended = groups_of({&p, &g, &m, &v, &d, &t}, has_direction);
  const std::vector<Group<5>> plain =
      groups_of({&p, &g, &m, &v, &t}, [&](size_t index) { return !has_direction(index); });
  const c10::cuda::CUDAGuard guard(device);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor scratch =
      allocate_scratch(adamw_blend_scratch(static_cast<int64_t>(params.size())), device);
  for (const TensorList* list : lists.written()) bump_versions(*list);
  // The groups run one after the other and may share the scratch.
  const auto run = [&](Storage storage, const auto& operands, const std::vector<void*>& counters) {
    check_launch("adamw_blend_", adamw_blend(storage, operands, counters.data(), options,
                                             scratch.mutable_data_ptr(), stream));
  };
  for (const auto& group : plain) run(group.storage, group.lists<4>(), group.addresses[4]);
  for (const auto& group : blended) run(group.storage, group.lists<5>(), group.addresses[5]);
}

// ---- the probe ----

at::Tensor probe_add_op(const at::Tensor& hidden, const at::Tensor& offset) {
  const at::Device device = hidden.device();
  check_device("hidden", hidden, device);
  check_device("offset", offset, device);
  check_dtype({"hidden", Access::kRead, {&hidden}});
  check_float32({"offset", Access::kRead, {&offset}});
  const int64_t rows = rows_of("offset", offset, "hidden", hidden);
  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor from = hidden.contiguous();
  const at::Tensor with = offset.contiguous();
  const at::Tensor sum = at::empty_like(from);
  check_launch("probe_add", probe_add(storage_of(from), sum.mutable_data_ptr(),
                                      from.const_data_ptr(), with.const_data_ptr<float>(), rows,
                                      with.numel(), c10::cuda::getCurrentCUDAStream()));
  // The result is laid out as `hidden` is.
  return hidden.is_contiguous() ? sum : at::empty_like(hidden).copy_(sum);
}

void probe_project_op(const at::Tensor& buffer, const at::Tensor& gradient, double sign) {
  const at::Device device = buffer.device();
  check_device("buffer", buffer, device);
  check_device("gradient", gradient, device);
  const TensorList written{"buffer", Access::kWrite, {&buffer}};
  check_dtype({"gradient", Access::kRead, {&gradient}});
  check_float32(written);
  TORCH_CHECK_NOT_IMPLEMENTED(buffer.is_contiguous(), "buffer of shape ", buffer.sizes(),
                              " has strides ", buffer.strides(), "; contiguous ones are supported");
  const int64_t rows = rows_of("buffer", buffer, "gradient", gradient);
  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor from = gradient.contiguous();
  const TensorList read{"gradient", Access::kRead, {&from}};
  check_overlap({&written, &read});
  const at::Tensor scratch = allocate_scratch(probe_project_scratch(rows, buffer.numel()), device);
  bump_versions(written);
  check_launch("probe_project_",
               probe_project(storage_of(from), buffer.mutable_data_ptr<float>(),
                             from.const_data_ptr(), rows, buffer.numel(), static_cast<float>(sign),
                             scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

Rule rule_of(c10::string_view name) {
  if (name == "gradient") return Rule::kGradient;
  if (name == "normalized") return Rule::kNormalized;
  TORCH_CHECK(name == "adam", "rule=", std::string(name),
              " is not known; choose gradient, normalized or adam");
  return Rule::kAdam;
}

at::Tensor probe_rule_op(at::TensorList buffers, c10::string_view rule_name, double probe_size,
                         const at::Tensor& perturbation_norm, at::TensorList radii) {
  check_not_empty("buffers", buffers);
  const TensorList h = list_of("buffers", Access::kWrite, buffers);
  const TensorList r = list_of("radii", Access::kRead, radii);
  check_one_dimension(h);
  check_layout(h, h);
  check_float32(h);
  check_float32(r);
  const at::Device device = device_of(h);
  check_one_element_each("radii", radii, h);
  check_overlap({&h, &r});
  const Rule rule = rule_of(rule_name);
  const Scalar norm = scalar_of("perturbation_norm", perturbation_norm, device);
  const Group<2> layers = groups_of({&h, &r}).front();
  const c10::cuda::CUDAGuard guard(device);
  const at::Tensor scratch = allocate_scratch(
      probe_rule_scratch(static_cast<int64_t>(layers.sizes.size()), layers.sizes.data()), device);
  at::Tensor finite = at::empty({}, at::TensorOptions().dtype(at::kBool).device(device));
  bump_versions(h);
  check_launch("probe_rule_",
               probe_rule(layers.lists(), rule, static_cast<float>(probe_size), norm,
                          finite.mutable_data_ptr<bool>(), scratch.mutable_data_ptr(),
                          c10::cuda::getCurrentCUDAStream()));
  return finite;
}

}  // namespace

TORCH_LIBRARY_IMPL(sap_fast, CUDA, m) {
  m.impl("sum_squares.native", &sum_squares_op);
  m.impl("dot.native", &dot_op);
  m.impl("perturb_swap_.native", &perturb_swap_op);
  m.impl("reflect_.native", &reflect_op);
  m.impl("restore_swap_.native", &restore_swap_op);
  m.impl("probe_add.native", &probe_add_op);
  m.impl("probe_project_.native", &probe_project_op);
  m.impl("probe_rule_.native", &probe_rule_op);
  m.impl("adamw_blend_.native", &adamw_blend_op);
}

}  // namespace sap_fast::cuda
