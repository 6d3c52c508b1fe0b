// The operations of sap_fast/ops/schema.py on CUDA devices: what is checked, which tensors go into
// one launch. The kernels, in the .cu files, know nothing of PyTorch.
//
// Everything is checked, and every error raised that can be foreseen, before anything is queued. A
// launch may fail all the same, after others: then the error tells which tensors are written.
#include <algorithm>
#include <array>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "kernels.h"

namespace sap_fast::cuda {
namespace {

// Which tensors of each list that an operation writes are queued to be written so far.
class Written {
 public:
  explicit Written(size_t lists) : indices_(lists) {}

  // The first `count` of the tensors at `indices` of one list, which its number names.
  void add(size_t list, const std::vector<size_t>& indices, int64_t count) {
    indices_[list].insert(indices_[list].end(), indices.begin(), indices.begin() + count);
  }

  bool empty() const {
    return std::all_of(indices_.begin(), indices_.end(),
                       [](const auto& indices) { return indices.empty(); });
  }

  friend std::ostream& operator<<(std::ostream& stream, const Written& written) {
    for (size_t list = 0; list < written.indices_.size(); ++list) {
      if (list != 0) stream << ';';
      const char* before = "";
      for (const size_t index : written.indices_[list]) {
        stream << std::exchange(before, ",") << index;
      }
    }
    return stream;
  }

 private:
  std::vector<std::vector<size_t>> indices_;
};

// Raises if an operation could not be queued, and leaves no error behind for whoever asks next.
void check_launch(const char* operation, cudaError_t error, const Written& written = Written(0)) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  std::ostringstream before;
  if (!written.empty()) before << kPartlyWritten << written << ' ';
  fail(before.str(), "sap_fast::", operation, " could not be launched: ", cudaGetErrorName(error),
       ", ", cudaGetErrorString(error));
}

Storage storage_of(const Tensor& tensor) {
  const int32_t dtype = tensor.dtype();
  return dtype == codes().float32    ? Storage::kFloat32
         : dtype == codes().bfloat16 ? Storage::kBFloat16
                                     : Storage::kFloat16;
}

void* address_of(const Tensor& tensor, Access access) {
  return access == Access::kWrite ? tensor.mutable_data() : const_cast<void*>(tensor.const_data());
}

// Raises unless the tensor is on `device`. A scalar on the GPU brings tensors of the CPU here.
void check_device(const std::string& name, const Tensor& tensor, const Device& device) {
  SAP_FAST_CHECK_SUPPORTED(device.is_cuda() && tensor.device() == device, name, " is on ",
                           tensor.device(), "; one CUDA device for all tensors is supported");
}

// What the kernels read in place of a 0-d tensor: its value if it is on the CPU, else its address.
Scalar scalar_of(const char* name, const Tensor& tensor, const Device& device) {
  check_scalar(name, tensor);
  if (tensor.device().is_cpu()) return {nullptr, false, tensor.item()};
  check_device(name, tensor, device);
  SAP_FAST_CHECK_SUPPORTED(tensor.dtype() == codes().float32 || tensor.dtype() == codes().float64,
                           name, " has dtype ", dtype_name(tensor.dtype()),
                           "; float32 and float64 are supported");
  return {tensor.const_data(), tensor.dtype() == codes().float64, 0};
}

Scalar scalar_or(const char* name, const Tensor& tensor, const Device& device, double otherwise) {
  return tensor ? scalar_of(name, tensor, device) : Scalar{nullptr, false, otherwise};
}

// Makes a device the current one for as long as it lives, and names the stream of work there.
class Guard {
 public:
  explicit Guard(const Device& device) {
    ask(aoti_torch_create_cuda_guard(device.index, &guard_), "make a device the current one");
    void* stream = nullptr;
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(device.index, &stream);
    if (error != 0) aoti_torch_delete_cuda_guard(guard_);
    ask(error, "name the current stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  ~Guard() { aoti_torch_delete_cuda_guard(guard_); }

  cudaStream_t stream() const { return stream_; }

 private:
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

Tensor empty_scalar(int32_t dtype, const Device& device) {
  return empty(Integers{nullptr, 0}, dtype, device);
}

// Memory for an operation, back with the allocator at its end: the stream runs in order.
Tensor allocate_scratch(int64_t bytes, const Device& device) {
  return empty(Integers{&bytes, 1}, codes().uint8, device);
}

// Tensors of one storage type with their counterparts in other lists.
template <int kOperands>
struct Group {
  Storage storage;
  std::vector<size_t> indices;  // in the lists
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
    Group<kOperands> group{storage, {}, {}, {}};
    for (size_t index = 0; index < lists[0]->size(); ++index) {
      const Tensor& tensor = (*lists[0])[index];
      if (storage_of(tensor) != storage || !selects(index)) continue;
      group.indices.push_back(index);
      group.sizes.push_back(tensor.numel());
      for (int operand = 0; operand < kOperands; ++operand) {
        const TensorList& list = *lists[operand];
        group.addresses[operand].push_back(address_of(list[index], list.access));
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
Device device_of(const TensorList& list) {
  const Device device = list[0].device();
  check_device(std::string(list.name) + "[0]", list[0], device);
  return device;
}

// ---- reductions ----

// Sums what launch(group, partial sums, stream) writes for each chunk of each group.
template <int kOperands, class Launch>
StableIValue reduce(const char* operation, const Device& device,
                    const std::vector<Group<kOperands>>& groups, const Launch& launch) {
  const Guard guard(device);
  int64_t chunks = 0;
  for (const auto& group : groups) {
    chunks += count_chunks(static_cast<int64_t>(group.sizes.size()), group.sizes.data());
  }
  const Tensor scratch = allocate_scratch(chunks * static_cast<int64_t>(sizeof(float)), device);
  Tensor out = empty_scalar(codes().float32, device);
  auto* const partial_sums = static_cast<float*>(scratch.mutable_data());
  float* next = partial_sums;
  for (const auto& group : groups) {
    check_launch(operation, launch(group, next, guard.stream()));
    next += count_chunks(static_cast<int64_t>(group.sizes.size()), group.sizes.data());
  }
  auto* const sum = static_cast<float*>(out.mutable_data());
  check_launch(operation, add_up(partial_sums, chunks, sum, guard.stream()));
  return out.release();
}

void sum_squares_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList list("tensors", Access::kRead, arguments.tensors());
  check_not_empty(list);
  check_layout(list, list);
  check_dtype(list);
  const Device device = device_of(list);
  stack[0] = reduce("sum_squares", device, groups_of({&list}),
                    [](const Group<1>& group, float* partial_sums, cudaStream_t stream) {
                      return sum_squares(group.storage, group.lists(), partial_sums, stream);
                    });
}

void dot_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList a("left", Access::kRead, arguments.tensors());
  const TensorList b("right", Access::kRead, arguments.tensors());
  check_not_empty(a);
  check_pair(a, b);
  const Device device = device_of(a);
  stack[0] = reduce("dot", device, groups_of({&a, &b}),
                    [](const Group<2>& group, float* partial_sums, cudaStream_t stream) {
                      return dot(group.storage, group.lists(), partial_sums, stream);
                    });
}

// ---- the perturbation ----

// Checks all arguments, and calls launch(storage, lists, scalar, stream, written) for each group.
// `scalar_on(device)` returns the scalar that the kernels take.
template <class ScalarOn, class Launch>
void update_pair(const char* operation, const TensorList& params, const TensorList& buffers,
                 const ScalarOn& scalar_on, const Launch& launch) {
  check_not_empty(params);
  check_pair(params, buffers);
  check_overlap({&params, &buffers});
  const Device device = device_of(params);
  const Scalar scalar = scalar_on(device);
  const std::vector<Group<2>> groups = groups_of({&params, &buffers});
  const Guard guard(device);
  const size_t written_lists = buffers.access == Access::kWrite ? 2 : 1;
  Written written(written_lists);
  for (const auto& group : groups) {
    int64_t count = 0;
    const cudaError_t error = launch(group.storage, group.lists(), scalar, guard.stream(), &count);
    for (size_t list = 0; list < written_lists; ++list) written.add(list, group.indices, count);
    check_launch(operation, error, written);
  }
}

void perturb_swap_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList params("params", Access::kWrite, arguments.tensors());
  const TensorList buffers("buffers", Access::kWrite, arguments.tensors());
  const Tensor scale = arguments.tensor();
  update_pair(
      "perturb_swap_", params, buffers,
      [&](const Device& device) { return scalar_of("scale", scale, device); }, &perturb_swap);
}

void reflect_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList params("params", Access::kWrite, arguments.tensors());
  const TensorList buffers("buffers", Access::kRead, arguments.tensors());
  update_pair(
      "reflect_", params, buffers, [](const Device&) { return Scalar{}; },
      [](Storage storage, const TensorLists<2>& lists, const Scalar&, cudaStream_t stream,
         int64_t* written) { return reflect(storage, lists, stream, written); });
}

void restore_swap_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList params("params", Access::kWrite, arguments.tensors());
  const TensorList buffers("buffers", Access::kWrite, arguments.tensors());
  const Tensor inverse_scale = arguments.tensor();
  update_pair(
      "restore_swap_", params, buffers,
      [&](const Device& device) { return scalar_of("inverse_scale", inverse_scale, device); },
      &restore_swap);
}

// ---- the update ----

void adamw_blend_op(StableIValue* stack, uint64_t, uint64_t) {
  const AdamWArguments given{Arguments(stack)};
  const TensorList &p = given.params, &g = given.grads, &m = given.exp_avgs;
  const TensorList &v = given.exp_avg_sqs, &t = given.steps, &d = given.directions;
  const Device device = device_of(p);
  const AdamWOptions options{
      scalar_of("lr", given.lr, device),
      given.beta1,
      given.beta2,
      given.eps,
      given.weight_decay,
      given.maximize,
      scalar_or("blend", given.blend, device, 0),
      scalar_or("gradient_scale", given.gradient_scale, device, 1),
  };
  // Only tensors that have a direction read one.
  const auto has_direction = [&](size_t index) { return static_cast<bool>(d[index]); };
  const std::vector<Group<6>> blended = groups_of({&p, &g, &m, &v, &d, &t}, has_direction);
  const std::vector<Group<5>> plain =
      groups_of({&p, &g, &m, &v, &t}, [&](size_t index) { return !has_direction(index); });
  const Guard guard(device);
  const Tensor scratch =
      allocate_scratch(adamw_blend_scratch(static_cast<int64_t>(p.size())), device);
  // Of params, exp_avgs, exp_avg_sqs and steps.
  Written written(4);
  // The groups run one after the other and may share the scratch.
  const auto run = [&](const auto& group, const auto& operands,
                       const std::vector<void*>& counters) {
    AdamWWritten count{0, 0};
    const cudaError_t error = adamw_blend(group.storage, operands, counters.data(), options,
                                          scratch.mutable_data(), guard.stream(), &count);
    for (size_t list = 0; list < 3; ++list) written.add(list, group.indices, count.params);
    written.add(3, group.indices, count.steps);
    check_launch("adamw_blend_", error, written);
  };
  for (const auto& group : plain) run(group, group.template lists<4>(), group.addresses[4]);
  for (const auto& group : blended) run(group, group.template lists<5>(), group.addresses[5]);
}

// ---- the probe ----

void probe_add_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList hidden("hidden", Access::kRead, arguments.tensor());
  const TensorList offset("offset", Access::kRead, arguments.tensor());
  const Device device = hidden[0].device();
  check_device("hidden", hidden[0], device);
  check_device("offset", offset[0], device);
  check_dense(hidden);
  check_dense(offset);
  check_dtype(hidden);
  check_float32(offset);
  const int64_t rows = rows_of(offset, hidden);
  const Guard guard(device);
  const Tensor from = contiguous(hidden[0]);
  const Tensor with = contiguous(offset[0]);
  Tensor sum = empty_like(from);
  check_launch("probe_add", probe_add(storage_of(from), sum.mutable_data(), from.const_data(),
                                      static_cast<const float*>(with.const_data()), rows,
                                      with.numel(), guard.stream()));
  if (hidden[0].is_contiguous()) {
    stack[0] = sum.release();
    return;
  }
  // The result is laid out as `hidden` is.
  Tensor out = empty_like(hidden[0]);
  copy(out, sum);
  stack[0] = out.release();
}

void probe_project_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList written("buffer", Access::kWrite, arguments.tensor());
  const TensorList gradient("gradient", Access::kRead, arguments.tensor());
  const auto sign = static_cast<float>(arguments.number());
  const Tensor& buffer = written[0];
  const Device device = buffer.device();
  check_device("buffer", buffer, device);
  check_device("gradient", gradient[0], device);
  check_dense(written);
  check_dense(gradient);
  check_dtype(gradient);
  check_float32(written);
  check_contiguous(written);
  const int64_t rows = rows_of(written, gradient);
  const Guard guard(device);
  const TensorList read("gradient", Access::kRead, contiguous(gradient[0]));
  const Tensor& from = read[0];
  check_overlap({&written, &read});
  const Tensor scratch = allocate_scratch(probe_project_scratch(rows, buffer.numel()), device);
  check_launch(
      "probe_project_",
      probe_project(storage_of(from), static_cast<float*>(buffer.mutable_data()), from.const_data(),
                    rows, buffer.numel(), sign, scratch.mutable_data(), guard.stream()));
  count_version(buffer);
}

Rule rule_of(const std::string& name) {
  if (name == "gradient") return Rule::kGradient;
  if (name == "normalized") return Rule::kNormalized;
  SAP_FAST_CHECK(name == "adam", "rule=", name,
                 " is not known; choose gradient, normalized or adam");
  return Rule::kAdam;
}

void probe_rule_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList h("buffers", Access::kWrite, arguments.tensors());
  const std::string rule_name = arguments.text();
  const auto probe_size = static_cast<float>(arguments.number());
  const Tensor perturbation_norm = arguments.tensor();
  const TensorList r("radii", Access::kRead, arguments.tensors());
  check_not_empty(h);
  check_one_dimension(h);
  check_layout(h, h);
  check_float32(h);
  check_float32(r);
  const Device device = device_of(h);
  check_one_element_each(r, h);
  check_overlap({&h, &r});
  const Rule rule = rule_of(rule_name);
  const Scalar norm = scalar_of("perturbation_norm", perturbation_norm, device);
  const Group<2> layers = groups_of({&h, &r}).front();
  const Guard guard(device);
  const Tensor scratch = allocate_scratch(
      probe_rule_scratch(static_cast<int64_t>(layers.sizes.size()), layers.sizes.data()), device);
  Tensor finite = empty_scalar(codes().boolean, device);
  int64_t count = 0;
  const cudaError_t error =
      probe_rule(layers.lists(), rule, probe_size, norm, static_cast<bool*>(finite.mutable_data()),
                 scratch.mutable_data(), guard.stream(), &count);
  Written written(1);
  written.add(0, layers.indices, count);
  check_launch("probe_rule_", error, written);
  stack[0] = finite.release();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sap_fast, CUDA, m) {
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
