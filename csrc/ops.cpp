// The operations of sap_fast/ops/schema.py on the CPU: what is checked, how work is shared among
// threads, which kernel runs. The arithmetic is in math.h, the loops in cpu/kernels_impl.h.
//
// Nothing can interrupt an operation between its first and its last write: what a pass restores
// after an error relies on it.
#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "cpu/kernels.h"
#include "multi_tensor.h"

namespace sap_fast {
namespace {

// 64 KB of fp32: several tensors' chunks lie in the cache of a core together, and a thread has
// hundreds of them before it has a millisecond of work.
constexpr int32_t kChunkSize = 16384;

const Kernels& kernels() {
  const char* problem = nullptr;
  const Kernels* const found = cpu_kernels(&problem);
  SAP_FAST_CHECK(found != nullptr, "SAP_FAST_CPU_CAPABILITY=", getenv("SAP_FAST_CPU_CAPABILITY"),
                 " ", problem);
  return *found;
}

Storage storage_of(const Tensor& tensor) {
  const int32_t dtype = tensor.dtype();
  return dtype == codes().float32 ? kFloat32 : dtype == codes().bfloat16 ? kBFloat16 : kFloat16;
}

// The addresses of a list's tensors, to be offset by chunks.
class Addresses {
 public:
  explicit Addresses(const TensorList& list) {
    data_.reserve(list.size());
    width_.reserve(list.size());
    for (const Tensor& tensor : list.tensors) {
      if (!tensor) {
        data_.push_back(nullptr);
        width_.push_back(0);
        continue;
      }
      data_.push_back(static_cast<char*>(list.access == Access::kWrite
                                             ? tensor.mutable_data()
                                             : const_cast<void*>(tensor.const_data())));
      width_.push_back(tensor.element_size());
    }
  }

  // Asks for the first elements of a chunk, which the loop over it will not have asked for.
  void prefetch(const Chunk& chunk) const {
    const char* const start = static_cast<const char*>((*this)[chunk]);
    const int64_t bytes = chunk.size * width_[chunk.tensor];
    for (int64_t at = 0; at < std::min(bytes, kPrefetchDistance); at += 64) {
      __builtin_prefetch(start + at);
    }
  }

  void* operator[](const Chunk& chunk) const {
    char* const data = data_[chunk.tensor];
    return data == nullptr ? nullptr : data + chunk.offset * width_[chunk.tensor];
  }

 private:
  std::vector<char*> data_;
  std::vector<int64_t> width_;
};

// A list of tensors cut into chunks, shared out among threads.
class Work {
 public:
  explicit Work(const TensorList& list) {
    std::vector<int64_t> sizes;
    sizes.reserve(list.size());
    storages_.reserve(list.size());
    int64_t elements = 0;
    for (const Tensor& tensor : list.tensors) {
      sizes.push_back(tensor.numel());
      storages_.push_back(storage_of(tensor));
      elements += tensor.numel();
    }
    chunks_ = plan_chunks(sizes.data(), static_cast<int64_t>(sizes.size()), kChunkSize);
    workers_ = std::min<int64_t>(thread_count(), 1 + elements / (2 * kChunkSize));
    starts_ = share_chunks(chunks_, workers_);
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }

  // Calls body(chunk index, chunk, storage) for every chunk, from all threads. `operands` are what
  // it reads.
  template <class Body>
  void run(std::initializer_list<const Addresses*> operands, const Body& body) const {
    parallel_for(workers_, 1, [&](int64_t first, int64_t last) {
      for (int64_t index = starts_[first]; index < starts_[last]; ++index) {
        const Chunk& chunk = chunks_[index];
        if (index + 1 < starts_[last] && chunks_[index + 1].tensor != chunk.tensor) {
          for (const Addresses* operand : operands) operand->prefetch(chunks_[index + 1]);
        }
        body(index, chunk, storages_[chunk.tensor]);
      }
    });
  }

 private:
  std::vector<Chunk> chunks_;
  std::vector<Storage> storages_;
  std::vector<int64_t> starts_;
  int64_t workers_;
};

double value_of(const Tensor& scalar, double otherwise) {
  return scalar ? scalar.item() : otherwise;
}

// ---- reductions ----

float sum_of_products(const TensorList& a, const TensorList& b) {
  check_not_empty(a);
  check_pair(a, b);
  const Kernels& kernel = kernels();
  const Work work(a);
  const Addresses from(a), with(b);
  // One partial sum per chunk, then the sum of those in order: whichever thread made them.
  std::vector<double> partial_sums(work.chunks().size());
  work.run({&from, &with}, [&](int64_t index, const Chunk& chunk, Storage storage) {
    partial_sums[index] = kernel.dot[storage](from[chunk], with[chunk], chunk.size);
  });
  double sum = 0;
  for (const double partial_sum : partial_sums) sum += partial_sum;
  return static_cast<float>(sum);
}

StableIValue scalar_tensor(float value) {
  AtenTensorHandle made = nullptr;
  ask(aoti_torch_scalar_to_tensor_float32(value, &made), "make a tensor");
  return Tensor::to_value(made);
}

void dot(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList a("left", Access::kRead, arguments.tensors());
  const TensorList b("right", Access::kRead, arguments.tensors());
  stack[0] = scalar_tensor(sum_of_products(a, b));
}

void sum_squares(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList list("tensors", Access::kRead, arguments.tensors());
  stack[0] = scalar_tensor(sum_of_products(list, list));
}

// ---- the perturbation ----

using PairKernel = void (*)(void* params, void* buffers, int64_t size, float factor);

void update_pair(const TensorList& params, const TensorList& buffers, const char* scalar_name,
                 const Tensor& scalar, PairKernel const (&kernel)[kStorages]) {
  check_not_empty(params);
  check_pair(params, buffers);
  check_overlap({&params, &buffers});
  check_scalar(scalar_name, scalar);
  const auto factor = static_cast<float>(scalar.item());
  const Work work(params);
  const Addresses to(params), with(buffers);
  work.run({&to, &with}, [&](int64_t, const Chunk& chunk, Storage storage) {
    kernel[storage](to[chunk], with[chunk], chunk.size, factor);
  });
}

void perturb_swap_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList params("params", Access::kWrite, arguments.tensors());
  const TensorList buffers("buffers", Access::kWrite, arguments.tensors());
  const Tensor scale = arguments.tensor();
  update_pair(params, buffers, "scale", scale, kernels().perturb_swap);
}

void restore_swap_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList params("params", Access::kWrite, arguments.tensors());
  const TensorList buffers("buffers", Access::kWrite, arguments.tensors());
  const Tensor inverse_scale = arguments.tensor();
  update_pair(params, buffers, "inverse_scale", inverse_scale, kernels().restore_swap);
}

void reflect_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList params("params", Access::kWrite, arguments.tensors());
  const TensorList buffers("buffers", Access::kRead, arguments.tensors());
  check_not_empty(params);
  check_pair(params, buffers);
  check_overlap({&params, &buffers});
  const Kernels& kernel = kernels();
  const Work work(params);
  const Addresses to(params), from(buffers);
  work.run({&to, &from}, [&](int64_t, const Chunk& chunk, Storage storage) {
    kernel.reflect[storage](to[chunk], from[chunk], chunk.size);
  });
}

// ---- the update ----

void adamw_blend_(StableIValue* stack, uint64_t, uint64_t) {
  const AdamWArguments given{Arguments(stack)};
  const Kernels& kernel = kernels();
  const GradientCoefficients gradient{
      given.maximize ? -1.0f : 1.0f,
      static_cast<float>(value_of(given.blend, 0)),
      static_cast<float>(value_of(given.gradient_scale, 1)),
  };
  const double rate = given.lr.item();
  const Work work(given.params);
  const Addresses to(given.params), from(given.grads), blended(given.directions);
  const Addresses first_moments(given.exp_avgs), second_moments(given.exp_avg_sqs);
  std::vector<float*> counters;
  counters.reserve(given.steps.size());
  std::vector<AdamWCoefficients> coefficients;
  coefficients.reserve(given.steps.size());
  float last_step = -1;
  for (const Tensor& counter : given.steps.tensors) {
    counters.push_back(static_cast<float*>(counter.mutable_data()));
    const float step = *counters.back() + 1;
    if (step == last_step) {
      coefficients.push_back(coefficients.back());
      continue;
    }
    last_step = step;
    const double times = step;
    coefficients.push_back({
        static_cast<float>(1 - rate * given.weight_decay),
        static_cast<float>(1 - given.beta1),
        static_cast<float>(given.beta2),
        static_cast<float>(1 - given.beta2),
        static_cast<float>(-(rate / (1 - std::pow(given.beta1, times)))),
        static_cast<float>(std::sqrt(1 - std::pow(given.beta2, times))),
        static_cast<float>(given.eps),
    });
  }
  // Nothing below can fail.
  for (float* const counter : counters) *counter += 1;
  work.run({&to, &from, &first_moments, &second_moments, &blended}, [&](int64_t, const Chunk& chunk,
                                                                        Storage storage) {
    kernel.adamw_blend[storage](to[chunk], from[chunk], static_cast<float*>(first_moments[chunk]),
                                static_cast<float*>(second_moments[chunk]), blended[chunk],
                                chunk.size, gradient, coefficients[chunk.tensor]);
  });
}

// ---- the probe ----

void probe_add(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList hidden("hidden", Access::kRead, arguments.tensor());
  const TensorList offset("offset", Access::kRead, arguments.tensor());
  check_dense(hidden);
  check_dense(offset);
  check_dtype(hidden);
  check_float32(offset);
  const int64_t rows = rows_of(offset, hidden);
  const Tensor from = contiguous(hidden[0]);
  const Tensor with = contiguous(offset[0]);
  const int64_t width = with.numel();
  // Of the strides that `hidden` has, as the fake promises.
  Tensor out = empty_like(hidden[0]);
  const bool direct = out.is_contiguous();
  const Tensor dense = direct ? Tensor() : empty_like(from);
  const Kernels& kernel = kernels();
  const Storage storage = storage_of(from);
  const int64_t bytes = from.element_size();
  const auto* const source = static_cast<const char*>(from.const_data());
  auto* const target = static_cast<char*>((direct ? out : dense).mutable_data());
  const auto* const offsets = static_cast<const float*>(with.const_data());
  parallel_for(rows, 1 + kChunkSize / std::max<int64_t>(1, width),
               [&](int64_t first, int64_t last) {
                 for (int64_t row = first; row < last; ++row) {
                   const int64_t start = row * width * bytes;
                   kernel.probe_add[storage](target + start, source + start, offsets, width);
                 }
               });
  if (!direct) copy(out, dense);
  stack[0] = out.release();
}

void probe_project_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList written("buffer", Access::kWrite, arguments.tensor());
  const TensorList gradient("gradient", Access::kRead, arguments.tensor());
  const auto sign = static_cast<float>(arguments.number());
  check_dense(written);
  check_dense(gradient);
  check_dtype(gradient);
  check_float32(written);
  check_contiguous(written);
  const int64_t rows = rows_of(written, gradient);
  const TensorList read("gradient", Access::kRead, contiguous(gradient[0]));
  check_overlap({&written, &read});
  const Tensor& from = read[0];
  const int64_t width = written[0].numel();
  const Kernels& kernel = kernels();
  const Storage storage = storage_of(from);
  const int64_t bytes = from.element_size();
  const auto* const source = static_cast<const char*>(from.const_data());
  auto* const target = static_cast<float*>(written[0].mutable_data());
  count_version(written[0]);
  // Threads share out columns, a cache line of them at a time, so that no sum is split.
  constexpr int64_t kColumns = 64;
  const int64_t tiles = (width + kColumns - 1) / kColumns;
  const int64_t grain = 1 + kChunkSize / std::max<int64_t>(1, rows * kColumns);
  parallel_for(tiles, grain, [&](int64_t first, int64_t last) {
    const int64_t start = first * kColumns;
    const int64_t columns = std::min(last * kColumns, width) - start;
    kernel.probe_project[storage](target + start, source + start * bytes, rows, width, columns,
                                  sign);
  });
}

void probe_rule_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorList h("buffers", Access::kWrite, arguments.tensors());
  const std::string name = arguments.text();
  const auto probe_size = static_cast<float>(arguments.number());
  const Tensor perturbation_norm = arguments.tensor();
  const TensorList radii("radii", Access::kRead, arguments.tensors());
  check_not_empty(h);
  check_one_dimension(h);
  check_layout(h, h);
  check_float32(h);
  check_overlap({&h});
  check_scalar("perturbation_norm", perturbation_norm);
  SAP_FAST_CHECK(radii.size() == h.size(), "buffers has ", h.size(), " tensors, radii has ",
                 radii.size());
  for (const Tensor& radius : radii.tensors) check_scalar("radii", radius);
  SAP_FAST_CHECK(name == "gradient" || name == "normalized" || name == "adam", "rule=", name,
                 " is not known; choose gradient, normalized or adam");
  const Rule rule = name == "gradient" ? kGradient : name == "normalized" ? kNormalized : kAdam;

  const Kernels& kernel = kernels();
  const Work work(h);
  const Addresses to(h);
  const auto norm = static_cast<float>(perturbation_norm.item());

  bool finite = true;
  std::vector<RuleCoefficients> coefficients;
  for (const Tensor& radius : radii.tensors) {
    const auto value = static_cast<float>(radius.item());
    if (!std::isfinite(value)) finite = false;
    coefficients.push_back({rule, probe_size, norm, 0, 0, value});
  }
  const size_t count = work.chunks().size();
  std::vector<float> largest(count);
  std::vector<uint8_t> chunk_finite(count);
  work.run({&to}, [&](int64_t index, const Chunk& chunk, Storage) {
    bool all_finite = true;
    const auto* const piece = static_cast<const float*>(to[chunk]);
    largest[index] = kernel.largest(piece, chunk.size, &all_finite);
    chunk_finite[index] = all_finite ? 1 : 0;
  });
  for (size_t index = 0; index < count; ++index) {
    RuleCoefficients& layer = coefficients[work.chunks()[index].tensor];
    layer.largest = std::max(layer.largest, largest[index]);
    if (chunk_finite[index] == 0) finite = false;
  }
  if (finite && rule == kNormalized) {
    std::vector<double> squares(count), totals(h.size());
    work.run({&to}, [&](int64_t index, const Chunk& chunk, Storage) {
      const float unit = coefficients[chunk.tensor].largest;
      if (unit > 0) {
        const auto* const piece = static_cast<const float*>(to[chunk]);
        squares[index] = kernel.sum_unit_squares(piece, chunk.size, unit);
      }
    });
    for (size_t index = 0; index < count; ++index) {
      totals[work.chunks()[index].tensor] += squares[index];
    }
    for (size_t layer = 0; layer < totals.size(); ++layer) {
      coefficients[layer].norm = static_cast<float>(std::sqrt(totals[layer]));
    }
  }
  work.run({&to}, [&](int64_t, const Chunk& chunk, Storage) {
    auto* const piece = static_cast<float*>(to[chunk]);
    const RuleCoefficients& layer = coefficients[chunk.tensor];
    // Without a size there is nothing to normalize: 0 / 0.
    if (finite && (rule != kNormalized || layer.norm > 0)) {
      kernel.probe_rule(piece, chunk.size, layer);
    } else {
      std::fill_n(piece, chunk.size, 0.0f);
    }
  });
  AtenTensorHandle result = nullptr;
  ask(aoti_torch_scalar_to_tensor_bool(finite, &result), "make a tensor");
  stack[0] = Tensor::to_value(result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sap_fast, CPU, m) {
  m.impl("sum_squares.native", &sum_squares);
  m.impl("dot.native", &dot);
  m.impl("perturb_swap_.native", &perturb_swap_);
  m.impl("reflect_.native", &reflect_);
  m.impl("restore_swap_.native", &restore_swap_);
  m.impl("probe_add.native", &probe_add);
  m.impl("probe_project_.native", &probe_project_);
  m.impl("probe_rule_.native", &probe_rule_);
  m.impl("adamw_blend_.native", &adamw_blend_);
}

}  // namespace sap_fast
