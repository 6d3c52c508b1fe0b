// The operations of sap_fast/ops/schema.py on the CPU: what is checked, how work is shared among
// threads, which kernel runs. The arithmetic is in math.h, the loops in cpu/kernels_impl.h.
//
// Nothing can interrupt an operation between its first and its last write: what a pass restores
// after an error relies on it.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

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
  TORCH_CHECK(found != nullptr, "SAP_FAST_CPU_CAPABILITY=", getenv("SAP_FAST_CPU_CAPABILITY"), " ",
              problem);
  return *found;
}

Storage storage_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    default:
      return kFloat16;
  }
}

// The addresses of a list's tensors, to be offset by chunks.
class Addresses {
 public:
  explicit Addresses(const TensorList& list) {
    data_.reserve(list.tensors.size());
    for (const at::Tensor* tensor : list.tensors) {
      if (tensor == nullptr) {
        data_.push_back(nullptr);
        width_.push_back(0);
        continue;
      }
      data_.push_back(list.access == Access::kWrite
                          ? static_cast<char*>(tensor->mutable_data_ptr())
                          : static_cast<char*>(const_cast<void*>(tensor->const_data_ptr())));
      width_.push_back(static_cast<int64_t>(tensor->element_size()));
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
    sizes.reserve(list.tensors.size());
    storages_.reserve(list.tensors.size());
    int64_t elements = 0;
    for (const at::Tensor* tensor : list.tensors) {
      sizes.push_back(tensor->numel());
      storages_.push_back(storage_of(*tensor));
      elements += tensor->numel();
    }
    chunks_ = plan_chunks(sizes.data(), static_cast<int64_t>(sizes.size()), kChunkSize);
    workers_ = std::min<int64_t>(at::get_num_threads(), 1 + elements / (2 * kChunkSize));
    starts_ = share_chunks(chunks_, workers_);
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }

  // Calls body(chunk index, chunk, storage) for every chunk, from all threads. `operands` are what
  // it reads.
  template <class Body>
  void run(std::initializer_list<const Addresses*> operands, const Body& body) const {
    at::parallel_for(0, workers_, 1, [&](int64_t first, int64_t last) {
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

double value_of(const at::Tensor& scalar) { return scalar.item<double>(); }

double value_of(const std::optional<at::Tensor>& scalar, double otherwise) {
  return scalar.has_value() ? value_of(*scalar) : otherwise;
}

// ---- reductions ----

at::Tensor dot(at::TensorList left, at::TensorList right) {
  check_not_empty("left", left);
  const TensorList a = list_of("left", Access::kRead, left);
  const TensorList b = list_of("right", Access::kRead, right);
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
  return at::scalar_tensor(sum, at::TensorOptions().dtype(at::kFloat));
}

at::Tensor sum_squares(at::TensorList tensors) { return dot(tensors, tensors); }

// ---- the perturbation ----

void perturb_swap_(at::TensorList params, at::TensorList buffers, const at::Tensor& scale) {
  check_not_empty("params", params);
  const TensorList p = list_of("params", Access::kWrite, params);
  const TensorList b = list_of("buffers", Access::kWrite, buffers);
  check_pair(p, b);
  check_overlap({&p, &b});
  check_scalar("scale", scale);
  const Kernels& kernel = kernels();
  const auto factor = static_cast<float>(value_of(scale));
  const Work work(p);
  const Addresses to(p), with(b);
  bump_versions(p);
  bump_versions(b);
  work.run({&to, &with}, [&](int64_t, const Chunk& chunk, Storage storage) {
    kernel.perturb_swap[storage](to[chunk], with[chunk], chunk.size, factor);
  });
}

void reflect_(at::TensorList params, at::TensorList buffers) {
  check_not_empty("params", params);
  const TensorList p = list_of("params", Access::kWrite, params);
  const TensorList b = list_of("buffers", Access::kRead, buffers);
  check_pair(p, b);
  check_overlap({&p, &b});
  const Kernels& kernel = kernels();
  const Work work(p);
  const Addresses to(p), from(b);
  bump_versions(p);
  work.run({&to, &from}, [&](int64_t, const Chunk& chunk, Storage storage) {
    kernel.reflect[storage](to[chunk], from[chunk], chunk.size);
  });
}

void restore_swap_(at::TensorList params, at::TensorList buffers, const at::Tensor& inverse_scale) {
  check_not_empty("params", params);
  const TensorList p = list_of("params", Access::kWrite, params);
  const TensorList b = list_of("buffers", Access::kWrite, buffers);
  check_pair(p, b);
  check_overlap({&p, &b});
  check_scalar("inverse_scale", inverse_scale);
  const Kernels& kernel = kernels();
  const auto factor = static_cast<float>(value_of(inverse_scale));
  const Work work(p);
  const Addresses to(p), with(b);
  bump_versions(p);
  bump_versions(b);
  work.run({&to, &with}, [&](int64_t, const Chunk& chunk, Storage storage) {
    kernel.restore_swap[storage](to[chunk], with[chunk], chunk.size, factor);
  });
}

// ---- the update ----

void adamw_blend_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                  at::TensorList exp_avg_sqs, at::TensorList steps,
                  const c10::List<std::optional<at::Tensor>>& directions, const at::Tensor& lr,
                  double beta1, double beta2, double eps, double weight_decay, bool maximize,
                  const std::optional<at::Tensor>& blend,
                  const std::optional<at::Tensor>& gradient_scale) {
  const AdamWLists lists =
      check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, directions, blend.has_value());
  check_scalar("lr", lr);
  if (blend.has_value()) check_scalar("blend", *blend);
  if (gradient_scale.has_value()) check_scalar("gradient_scale", *gradient_scale);
  const Kernels& kernel = kernels();
  const GradientCoefficients gradient{
      maximize ? -1.0f : 1.0f,
      static_cast<float>(value_of(blend, 0)),
      static_cast<float>(value_of(gradient_scale, 1)),
  };
  const double rate = value_of(lr);
  const Work work(lists.params);
  const Addresses to(lists.params), from(lists.grads), blended(lists.directions);
  const Addresses first_moments(lists.exp_avgs), second_moments(lists.exp_avg_sqs);
  std::vector<AdamWCoefficients> coefficients;
  coefficients.reserve(params.size());
  float last_step = -1;
  for (const at::Tensor& counter : steps) {
    const float step = *counter.const_data_ptr<float>() + 1;
    if (step == last_step) {
      coefficients.push_back(coefficients.back());
      continue;
    }
    last_step = step;
    coefficients.push_back({
        static_cast<float>(1 - rate * weight_decay),
        static_cast<float>(1 - beta1),
        static_cast<float>(beta2),
        static_cast<float>(1 - beta2),
        static_cast<float>(-(rate / (1 - std::pow(beta1, static_cast<double>(step))))),
        static_cast<float>(std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
        static_cast<float>(eps),
    });
  }
  // Nothing below can fail.
  for (const TensorList* list : lists.written()) bump_versions(*list);
  for (const at::Tensor& counter : steps) *counter.mutable_data_ptr<float>() += 1;
  work.run({&to, &from, &first_moments, &second_moments, &blended}, [&](int64_t, const Chunk& chunk,
                                                                        Storage storage) {
    kernel.adamw_blend[storage](to[chunk], from[chunk], static_cast<float*>(first_moments[chunk]),
                                static_cast<float*>(second_moments[chunk]), blended[chunk],
                                chunk.size, gradient, coefficients[chunk.tensor]);
  });
}

// ---- the probe ----

at::Tensor probe_add(const at::Tensor& hidden, const at::Tensor& offset) {
  check_dtype({"hidden", Access::kRead, {&hidden}});
  check_float32({"offset", Access::kRead, {&offset}});
  const int64_t width = offset.numel();
  const int64_t rows = rows_of("offset", offset, "hidden", hidden);
  const at::Tensor from = hidden.contiguous();
  const at::Tensor with = offset.contiguous();
  // Of the strides that `hidden` has, as the fake promises.
  const at::Tensor out = at::empty_like(hidden);
  const at::Tensor dense = out.is_contiguous() ? out : at::empty_like(from);
  const Kernels& kernel = kernels();
  const Storage storage = storage_of(from);
  const auto bytes = static_cast<int64_t>(from.element_size());
  const auto* const source = static_cast<const char*>(from.const_data_ptr());
  auto* const target = static_cast<char*>(dense.mutable_data_ptr());
  const auto* const offsets = with.const_data_ptr<float>();
  at::parallel_for(0, rows, 1 + kChunkSize / std::max<int64_t>(1, width),
                   [&](int64_t first, int64_t last) {
                     for (int64_t row = first; row < last; ++row) {
                       const int64_t start = row * width * bytes;
                       kernel.probe_add[storage](target + start, source + start, offsets, width);
                     }
                   });
  if (!out.is_same(dense)) out.copy_(dense);
  return out;
}

void probe_project_(const at::Tensor& buffer, const at::Tensor& gradient, double sign) {
  const TensorList written{"buffer", Access::kWrite, {&buffer}};
  check_dtype({"gradient", Access::kRead, {&gradient}});
  check_float32(written);
  TORCH_CHECK_NOT_IMPLEMENTED(buffer.is_contiguous(), "buffer of shape ", buffer.sizes(),
                              " has strides ", buffer.strides(), "; contiguous ones are supported");
  const int64_t width = buffer.numel();
  const int64_t rows = rows_of("buffer", buffer, "gradient", gradient);
  const at::Tensor from = gradient.contiguous();
  const TensorList read{"gradient", Access::kRead, {&from}};
  check_overlap({&written, &read});
  const Kernels& kernel = kernels();
  const Storage storage = storage_of(from);
  const auto bytes = static_cast<int64_t>(from.element_size());
  const auto* const source = static_cast<const char*>(from.const_data_ptr());
  bump_versions(written);
  auto* const target = buffer.mutable_data_ptr<float>();
  // Threads share out columns, a cache line of them at a time, so that no sum is split.
  constexpr int64_t kColumns = 64;
  const int64_t tiles = (width + kColumns - 1) / kColumns;
  const int64_t grain = 1 + kChunkSize / std::max<int64_t>(1, rows * kColumns);
  at::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
    const int64_t start = first * kColumns;
    const int64_t columns = std::min(last * kColumns, width) - start;
    kernel.probe_project[storage](target + start, source + start * bytes, rows, width, columns,
                                  static_cast<float>(sign));
  });
}

at::Tensor probe_rule_(at::TensorList buffers, c10::string_view rule_name, double probe_size,
                       const at::Tensor& perturbation_norm, at::TensorList radii) {
  check_not_empty("buffers", buffers);
  const TensorList h = list_of("buffers", Access::kWrite, buffers);
  check_one_dimension(h);
  check_layout(h, h);
  check_float32(h);
  check_overlap({&h});
  check_scalar("perturbation_norm", perturbation_norm);
  TORCH_CHECK(radii.size() == buffers.size(), "buffers has ", buffers.size(),
              " tensors, radii has ", radii.size());
  for (const at::Tensor& radius : radii) check_scalar("radii", radius);
  const std::string name(rule_name);
  TORCH_CHECK(name == "gradient" || name == "normalized" || name == "adam", "rule=", name,
              " is not known; choose gradient, normalized or adam");
  const Rule rule = name == "gradient" ? kGradient : name == "normalized" ? kNormalized : kAdam;

  const Kernels& kernel = kernels();
  const Work work(h);
  const Addresses to(h);
  const auto norm = static_cast<float>(value_of(perturbation_norm));
  bump_versions(h);

  bool finite = true;
  std::vector<RuleCoefficients> coefficients;
  for (const at::Tensor& radius : radii) {
    const auto value = static_cast<float>(value_of(radius));
    if (!std::isfinite(value)) finite = false;
    coefficients.push_back({rule, static_cast<float>(probe_size), norm, 0, 0, value});
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
    std::vector<double> squares(count), totals(buffers.size());
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
  return at::scalar_tensor(finite, at::TensorOptions().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_IMPL(sap_fast, CPU, m) {
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
