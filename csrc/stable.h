// Tensors, arguments and errors by PyTorch's stable ABI, so that one binary runs with every PyTorch
// from 2.10 on: nothing but C functions, integers and pointers goes from one side to the other.
//
// A list of 2,000 tensors comes as as many handles, and a handle answers one question per call. So
// each is asked once, when the list is read, and a table keeps what it said.
//
// Three things cannot be had from the stable ABI. The version counters of a list of tensors:
// `native.run`, in Python, counts them up, after an error those that `kPartlyWritten` tells it of.
// Errors that are no RuntimeError: `kUnsupported` marks
// those that `native.run` raises as NotImplementedError. Whether a tensor has gaps: `has_gaps`.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sap_fast {

// ---- errors ----

// What the message of an error begins with that is a NotImplementedError.
constexpr const char* kUnsupported = "NotImplementedError: ";

// What the message of an error begins with that came after some tensors had been written. What they
// are stands behind it, up to a space: of each list that the operation writes the indices, with
// commas, and semicolons between the lists.
constexpr const char* kPartlyWritten = "PartlyWritten: ";

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The parts of the message are made only if the condition does not hold.
#define SAP_FAST_CHECK(condition, ...) \
  if (!(condition)) ::sap_fast::fail(__VA_ARGS__)
#define SAP_FAST_CHECK_SUPPORTED(condition, ...) \
  if (!(condition)) ::sap_fast::fail(::sap_fast::kUnsupported, __VA_ARGS__)

// Raises if a function of the stable ABI failed: what it was called for, not why, is all it tells.
inline void ask(AOTITorchError error, const char* what) {
  SAP_FAST_CHECK(error == 0, "PyTorch could not ", what);
}

// ---- values ----

// A shape, or strides: borrowed from a tensor.
struct Integers {
  const int64_t* data;
  int64_t size;

  const int64_t* begin() const { return data; }
  const int64_t* end() const { return data + size; }

  bool operator==(const Integers& other) const {
    return size == other.size && std::equal(begin(), end(), other.begin());
  }

  friend std::ostream& operator<<(std::ostream& stream, const Integers& integers) {
    stream << '[';
    for (int64_t index = 0; index < integers.size; ++index) {
      stream << (index == 0 ? "" : ", ") << integers.data[index];
    }
    return stream << ']';
  }
};

// PyTorch's numbers of dtypes, devices and layouts, which it does not promise to keep.
struct Codes {
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float64 = aoti_torch_dtype_float64();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t boolean = aoti_torch_dtype_bool();
  int32_t uint8 = aoti_torch_dtype_uint8();
  int32_t strided = aoti_torch_layout_strided();
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t cuda = aoti_torch_device_type_cuda();
};

inline const Codes& codes() {
  static const Codes found;
  return found;
}

// As Python names it.
inline std::string dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {codes().float32, "float32"},
      {codes().float64, "float64"},
      {codes().bfloat16, "bfloat16"},
      {codes().float16, "float16"},
      {codes().boolean, "bool"},
      {codes().uint8, "uint8"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
      {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
  };
  for (const auto& [code, name] : names) {
    if (code == dtype) return std::string("torch.") + name;
  }
  return "number " + std::to_string(dtype);
}

// As torch.layout names it.
inline std::string layout_name(int32_t layout) {
  const std::pair<int32_t, const char*> names[] = {
      {codes().strided, "strided"},
      {aoti_torch_layout_sparse_coo(), "sparse_coo"},
      {aoti_torch_layout_sparse_csr(), "sparse_csr"},
      {aoti_torch_layout_sparse_csc(), "sparse_csc"},
      {aoti_torch_layout_sparse_bsr(), "sparse_bsr"},
      {aoti_torch_layout_sparse_bsc(), "sparse_bsc"},
      {aoti_torch_layout__mkldnn(), "_mkldnn"},
      {aoti_torch_layout_jagged(), "jagged"},
  };
  for (const auto& [code, name] : names) {
    if (code == layout) return std::string("torch.") + name;
  }
  return "number " + std::to_string(layout);
}

struct Device {
  int32_t type;
  int32_t index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool is_cpu() const { return type == codes().cpu; }
  bool is_cuda() const { return type == codes().cuda; }

  friend std::ostream& operator<<(std::ostream& stream, const Device& device) {
    if (device.is_cpu()) return stream << "cpu";
    if (device.is_cuda()) {
      stream << "cuda";
    } else if (device.type == aoti_torch_device_type_xpu()) {
      stream << "xpu";
    } else if (device.type == aoti_torch_device_type_mps()) {
      stream << "mps";
    } else if (device.type == aoti_torch_device_type_meta()) {
      return stream << "meta";
    } else {
      stream << "a device of type " << device.type;
    }
    return stream << ':' << device.index;
  }
};

// ---- tensors ----

// A tensor with what the operations ask of it; it holds its handle until it dies.
class Tensor {
 public:
  Tensor() = default;  // none: what an optional argument may be

  // Takes the handle over. What PyTorch cannot describe has no layout, and no check lets it pass.
  explicit Tensor(AtenTensorHandle owned) noexcept : handle_(owned) {
    const Codes& code = codes();
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    int32_t layout = kNoLayout;
    if (aoti_torch_get_layout(owned, &layout) != 0 || aoti_torch_get_dtype(owned, &dtype_) != 0 ||
        aoti_torch_get_device_type(owned, &device_.type) != 0 ||
        aoti_torch_get_dim(owned, &sizes_.size) != 0 || aoti_torch_get_sizes(owned, &sizes) != 0) {
      sizes_.size = 0;
      return;
    }
    sizes_.data = sizes;
    numel_ = 1;
    for (const int64_t size : sizes_) numel_ *= size;
    // The CPU is one device, with and without a number.
    if (device_.type != code.cpu && aoti_torch_get_device_index(owned, &device_.index) != 0) return;
    if (layout != code.strided) {  // it has neither strides nor one address
      layout_ = layout;
      return;
    }
    if (aoti_torch_get_strides(owned, &strides) != 0 ||
        torch_get_const_data_ptr(owned, &data_) != 0) {
      return;
    }
    layout_ = layout;
    strides_ = {strides, sizes_.size};
    contiguous_ = true;
    int64_t step = 1;
    for (int64_t d = sizes_.size - 1; d >= 0 && numel_ != 0; --d) {
      if (sizes_.data[d] == 1) continue;
      contiguous_ = contiguous_ && strides_.data[d] == step;
      step *= sizes_.data[d];
    }
  }

  Tensor(Tensor&& other) noexcept { *this = std::move(other); }

  Tensor& operator=(Tensor&& other) noexcept {
    handle_.swap(other.handle_);
    data_ = other.data_;
    sizes_ = other.sizes_;
    strides_ = other.strides_;
    numel_ = other.numel_;
    dtype_ = other.dtype_;
    layout_ = other.layout_;
    device_ = other.device_;
    contiguous_ = other.contiguous_;
    return *this;
  }

  explicit operator bool() const { return handle_.get() != nullptr; }

  AtenTensorHandle handle() const { return handle_.get(); }
  const Integers& sizes() const { return sizes_; }
  const Integers& strides() const { return strides_; }
  int64_t dim() const { return sizes_.size; }
  int64_t numel() const { return numel_; }
  int32_t dtype() const { return dtype_; }
  int32_t layout() const { return layout_; }
  const Device& device() const { return device_; }
  bool is_contiguous() const { return contiguous_; }

  bool is_floating_point() const {
    const Codes& code = codes();
    return dtype_ == code.float32 || dtype_ == code.bfloat16 || dtype_ == code.float16 ||
           dtype_ == code.float64;
  }

  // Of the dtypes that the kernels take.
  int64_t element_size() const {
    const Codes& code = codes();
    if (dtype_ == code.float32) return 4;
    if (dtype_ == code.bfloat16 || dtype_ == code.float16) return 2;
    return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_));
  }

  const void* const_data() const { return data_; }

  // Asked for when it is written, and not before: the memory may be shared until then.
  void* mutable_data() const {
    void* data = nullptr;
    ask(torch_get_mutable_data_ptr(handle(), &data), "give memory to be written");
    return data;
  }

  // Whether elements lie where the strides of no order of the dimensions, without gaps, would put
  // them, or two elements lie at one address.
  bool has_gaps() const {
    if (contiguous_ || numel_ < 2) return false;
    std::vector<int64_t> order;
    for (int64_t d = 0; d < dim(); ++d) {
      if (sizes_.data[d] != 1) order.push_back(d);
    }
    std::sort(order.begin(), order.end(),
              [this](int64_t a, int64_t b) { return strides_.data[a] < strides_.data[b]; });
    int64_t step = 1;
    for (const int64_t d : order) {
      if (strides_.data[d] != step) return true;
      step *= sizes_.data[d];
    }
    return false;
  }

  double item() const {
    double value = 0;
    ask(aoti_torch_item_float64(handle(), &value), "read a number");
    return value;
  }

  // Hands the handle to PyTorch, which owns it from then on.
  StableIValue release() { return to_value(handle_.release()); }

  // As PyTorch passes it.
  static StableIValue to_value(AtenTensorHandle handle) {
    StableIValue value = 0;
    std::memcpy(&value, &handle, sizeof(handle));
    return value;
  }

  // Another handle of the same tensor, for a function that keeps what it is given.
  StableIValue lend() const {
    AtenTensorHandle copy = nullptr;
    ask(aoti_torch_new_tensor_handle(handle(), &copy), "hold a tensor");
    return to_value(copy);
  }

 private:
  static constexpr int32_t kNoLayout = -1;

  class Owner {
   public:
    Owner() = default;
    explicit Owner(AtenTensorHandle handle) : handle_(handle) {}
    Owner(const Owner&) = delete;
    Owner& operator=(const Owner&) = delete;
    ~Owner() {
      if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
    }
    AtenTensorHandle get() const { return handle_; }
    AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
    void swap(Owner& other) { std::swap(handle_, other.handle_); }

   private:
    AtenTensorHandle handle_ = nullptr;
  };

  Owner handle_;
  const void* data_ = nullptr;
  Integers sizes_{nullptr, 0};
  Integers strides_{nullptr, 0};
  int64_t numel_ = 0;
  int32_t dtype_ = 0;
  int32_t layout_ = kNoLayout;
  Device device_{0, 0};
  bool contiguous_ = false;
};

// A new tensor that is what empty_like makes of another one.
inline Tensor empty_like(const Tensor& like) {
  StableIValue stack[6] = {like.lend(), 0, 0, 0, 0, 0};
  ask(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION), "make a tensor");
  AtenTensorHandle made = nullptr;
  std::memcpy(&made, stack, sizeof(made));
  return Tensor(made);
}

inline Tensor empty(const Integers& sizes, int32_t dtype, const Device& device) {
  std::vector<int64_t> strides(static_cast<size_t>(sizes.size));
  int64_t step = 1;
  for (int64_t d = sizes.size - 1; d >= 0; --d) {
    strides[static_cast<size_t>(d)] = step;
    step *= std::max<int64_t>(1, sizes.data[d]);
  }
  AtenTensorHandle made = nullptr;
  ask(aoti_torch_empty_strided(sizes.size, sizes.data, strides.data(), dtype, device.type,
                               device.index, &made),
      "make a tensor");
  return Tensor(made);
}

inline void copy(const Tensor& to, const Tensor& from) {
  ask(aoti_torch_copy_(to.handle(), from.handle(), 0), "copy a tensor");
}

// Counts the version of one tensor up: a copy onto itself moves nothing, and autograd counts it,
// unless a dispatch mode of Python keeps it away; then native.py counts, as it does for lists.
inline void count_version(const Tensor& written) {
  const bool enabled = aoti_torch_grad_mode_is_enabled();
  aoti_torch_grad_mode_set_enabled(false);
  const AOTITorchError error = aoti_torch_copy_(written.handle(), written.handle(), 0);
  aoti_torch_grad_mode_set_enabled(enabled);
  ask(error, "count the version of a tensor");
}

// The tensor itself if it is contiguous, else a copy that is.
inline Tensor contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    AtenTensorHandle same = nullptr;
    ask(aoti_torch_new_tensor_handle(tensor.handle(), &same), "hold a tensor");
    return Tensor(same);
  }
  Tensor made = empty(tensor.sizes(), tensor.dtype(), tensor.device());
  copy(made, tensor);
  return made;
}

// ---- calls ----

// The arguments of a call as PyTorch passes them; reading one takes it over. All are to be read, in
// order, before anything is checked: what is not read is not freed.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}

  Tensor tensor() { return tensor_of(*next_++); }
  Tensor optional_tensor() { return optional_tensor_of(*next_++); }

  std::vector<Tensor> tensors() { return list(&tensor_of); }
  std::vector<Tensor> optional_tensors() { return list(&optional_tensor_of); }

  double number() { return read<double>(*next_++); }
  bool flag() { return read<bool>(*next_++); }

  std::string text() {
    const auto handle = read<StringHandle>(*next_++);
    size_t length = 0;
    const char* data = nullptr;
    AOTITorchError error = torch_string_length(handle, &length);
    if (error == 0) error = torch_string_c_str(handle, &data);
    std::string result(error == 0 ? data : "", error == 0 ? length : 0);
    torch_delete_string(handle);
    ask(error, "read a string");
    return result;
  }

 private:
  template <class Value>
  static Value read(StableIValue from) {
    static_assert(sizeof(Value) <= sizeof(from) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    Value value;
    std::memcpy(&value, &from, sizeof(value));
    return value;
  }

  static Tensor tensor_of(StableIValue value) { return Tensor(read<AtenTensorHandle>(value)); }

  static Tensor optional_tensor_of(StableIValue value) {
    const auto* const inner = read<StableIValue*>(value);
    if (inner == nullptr) return {};
    const StableIValue content = *inner;
    delete inner;
    return tensor_of(content);
  }

  template <class ReadOne>
  std::vector<Tensor> list(const ReadOne& read_one) {
    const auto handle = read<StableListHandle>(*next_++);
    size_t size = 0;
    const AOTITorchError error = torch_list_size(handle, &size);
    std::vector<Tensor> result;
    result.reserve(size);
    for (size_t index = 0; index < size; ++index) {
      StableIValue item = 0;
      if (torch_list_get_item(handle, index, &item) == 0) result.push_back(read_one(item));
    }
    torch_delete_list(handle);
    SAP_FAST_CHECK(error == 0 && result.size() == size, "PyTorch could not read a list");
    return result;
  }

  const StableIValue* next_;
};

// ---- threads ----

inline int64_t thread_count() {
  uint32_t count = 1;
  ask(torch_get_num_threads(&count), "count its threads");
  return count;
}

// Calls body(first, last) on PyTorch's threads, for parts of [0, size) of at least `grain`.
template <class Body>
void parallel_for(int64_t size, int64_t grain, const Body& body) {
  const auto run = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Body*>(context))(first, last);
  };
  ask(torch_parallel_for(0, size, grain, run, const_cast<Body*>(&body)), "run its threads");
}

}  // namespace sap_fast
