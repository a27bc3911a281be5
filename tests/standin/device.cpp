// Stand-in accelerator made of ordinary memory, for tests on machines without an accelerator. To torch it is a device
// type of its own: its tensors are not CPU tensors. There are several devices, each with its memory, random numbers and
// current-device state, and code that mixes them up fails as on GPUs. Kernels copy to the CPU and run its kernels.
// Nothing is asynchronous, so tests cannot find a wrong order of streams. The device counts operations that would make
// the host wait. While a kernel draws random numbers, a draw on the CPU in another thread may be lost.
//
// Source: PyTorch's notes on out-of-tree devices ("PrivateUse1").

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_set>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr auto kType = DeviceType::PrivateUse1;
constexpr size_t kMost = 8;
constexpr size_t kMemory = size_t(4) << 30;

DeviceIndex count() {
  static const DeviceIndex number = [] {
    const char* text = std::getenv("STANDIN_DEVICES");
    return static_cast<DeviceIndex>(text ? std::clamp(std::atoi(text), 0, static_cast<int>(kMost)) : 2);
  }();
  return number;
}

thread_local DeviceIndex current = 0;
thread_local bool inside_kernel = false;  // copies that a kernel makes here are none that a GPU would make
std::array<std::atomic<size_t>, kMost> taken{};
std::array<std::atomic<size_t>, kMost> most{};
std::atomic<int64_t> waits{0};

DeviceIndex checked(c10::Device device) {
  const auto index = device.has_index() ? device.index() : current;
  TORCH_CHECK(index >= 0 && index < count(), "stand-in: invalid device ordinal ", static_cast<int>(index));
  return index;
}

void wait_for_device() {
  if (!inside_kernel) ++waits;
}

// ---- memory ----

struct Header {
  size_t size;
  DeviceIndex device;
};
constexpr size_t kHeader = 64;

void give_back(void* data) {
  if (!data) return;
  auto* header = reinterpret_cast<Header*>(static_cast<char*>(data) - kHeader);
  taken[header->device] -= header->size;
  std::free(header);
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device device(kType, current);
    if (size == 0) return {nullptr, nullptr, &give_back, device};
    TORCH_CHECK_WITH(
        OutOfMemoryError, taken[current] + size <= kMemory, "stand-in: device ", static_cast<int>(current), " is full");
    auto* raw = static_cast<char*>(std::aligned_alloc(64, (kHeader + size + 63) / 64 * 64));
    *reinterpret_cast<Header*>(raw) = {size, current};
    const size_t now = taken[current] += size;
    size_t before = most[current];
    while (before < now && !most[current].compare_exchange_weak(before, now)) {
    }
    void* data = raw + kHeader;
    return {data, data, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex index) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = taken[index];
    stats.allocated_bytes[0].peak = most[index];
    stats.reserved_bytes[0] = stats.allocated_bytes[0];
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex index) override { most[index] = taken[index].load(); }
};

Memory memory;
REGISTER_ALLOCATOR(kType, &memory);

std::mutex pinned_lock;
std::unordered_set<const void*> pinned_pointers;

struct Pinned final : c10::Allocator {
  static void release(void* data) {
    {
      const std::lock_guard<std::mutex> guard(pinned_lock);
      pinned_pointers.erase(data);
    }
    std::free(data);
  }
  c10::DataPtr allocate(size_t size) override {
    void* data = std::aligned_alloc(64, (std::max<size_t>(size, 1) + 63) / 64 * 64);
    const std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_pointers.insert(data);
    return {data, data, &release, c10::Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

Pinned pinned;

// ---- random numbers: each device has a generator, whose state the CPU's generator takes during a kernel

struct Random final : c10::GeneratorImpl {
  explicit Random(DeviceIndex index)
      : GeneratorImpl(c10::Device(kType, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new Random(device_.index());
    copy->inner = inner.clone();
    return copy;
  }
  mutable at::Generator inner;
};

const at::Generator& generator_of(DeviceIndex index) {
  static const auto all = [] {
    std::array<at::Generator, kMost> made;
    for (size_t i = 0; i < kMost; ++i) made[i] = at::make_generator<Random>(static_cast<DeviceIndex>(i));
    return made;
  }();
  return all[index];
}

// Makes the CPU's default generator the device's during a kernel that draws.
class Lent {
 public:
  explicit Lent(Random* device) : device_(device), default_(at::detail::getDefaultCPUGenerator()) {
    static std::mutex one;
    guard_ = std::unique_lock<std::mutex>(one);
    own_ = default_.get_state();
    default_.set_state(device_->inner.get_state());
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  ~Lent() {
    device_->inner.set_state(default_.get_state());
    default_.set_state(own_);
  }

 private:
  Random* device_;
  at::Generator default_;
  Tensor own_;
  std::unique_lock<std::mutex> guard_;
};

// ---- torch's interface of a device ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before(kType, current);
    current = checked(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device device) const override { current = checked(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return getDefaultStream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kType, checked(device)));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getDefaultStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getDefaultStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return count(); }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    static int mark;
    *event = &mark;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait_for_device(); }
  void synchronizeEvent(void*) const override { wait_for_device(); }
  void synchronizeDevice(const DeviceIndex) const override { wait_for_device(); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count(); }
  void setCurrentDevice(DeviceIndex index) const override { current = checked({kType, index}); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const auto before = current;
    current = checked({kType, index});
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return generator_of(index < 0 ? current : checked({kType, index}));
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Random>(index < 0 ? current : checked({kType, index}));
  }
  at::Device getDeviceFromPtr(void* data) const override {
    return {kType, reinterpret_cast<Header*>(static_cast<char*>(data) - kHeader)->device};
  }
  bool isPinnedPtr(const void* data) const override {
    const std::lock_guard<std::mutex> guard(pinned_lock);
    return pinned_pointers.count(data) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    const c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), size);
  }
};

// ---- operators ----

Tensor empty(
    c10::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::Device(kType, checked(device.value_or(c10::Device(kType)))));
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  const c10::DeviceGuard guard(c10::Device(kType, checked(device.value_or(c10::Device(kType)))));
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// Returns the same bytes as a CPU tensor.
Tensor seen(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  return at::from_blob(
      tensor.storage().mutable_data(),
      tensor.sizes(),
      tensor.strides(),
      tensor.storage_offset(),
      [](void*) {},
      tensor.options().device(at::kCPU),
      at::kCPU);
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  if (target.numel() == 0) return target;
  const bool meets_host = self.device().is_cpu() || target.device().is_cpu();
  const Tensor& host = self.device().is_cpu() ? self : target;
  if (meets_host && !(non_blocking && host.is_pinned())) wait_for_device();
  Tensor to = seen(target);
  Tensor from = seen(self);
  if (self.is_conj() != target.is_conj()) from = from.conj();
  if (self.is_neg() != target.is_neg()) from = at::_neg_view(from);
  to.copy_(from);
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  at::native::resize_(target, self.sizes(), std::nullopt);
  return copy_from(self, target, false);
}

at::Scalar local_scalar_dense(const Tensor& self) {
  wait_for_device();
  return at::_local_scalar_dense(seen(self));
}

Tensor as_strided(
    const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor& set_source_storage(Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.element_size());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {size}, {1});
}

// While this object lives, copies belong to a kernel.
struct Inside {
  bool before = inside_kernel;
  Inside() { inside_kernel = true; }
  ~Inside() { inside_kernel = before; }
};

// A fallback does not reach convolutions: torch has a hook for them.
Tensor convolution(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    c10::IntArrayRef stride,
    c10::IntArrayRef padding,
    c10::IntArrayRef dilation,
    bool transposed,
    c10::IntArrayRef output_padding,
    int64_t groups) {
  const Inside inside;
  const auto host_bias = bias && bias->defined() ? std::optional<Tensor>(seen(*bias)) : std::nullopt;
  return at::convolution(
             seen(input), seen(weight), host_bias, stride, padding, dilation, transposed, output_padding, groups)
      .to(input.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient,
    const Tensor& input,
    const Tensor& weight,
    c10::IntArrayRef stride,
    c10::IntArrayRef padding,
    c10::IntArrayRef dilation,
    bool transposed,
    c10::IntArrayRef output_padding,
    int64_t groups,
    std::array<bool, 3> mask) {
  const Inside inside;
  const auto host = at::convolution_backward(
      seen(gradient), seen(input), seen(weight), at::IntArrayRef{gradient.size(1)}, stride, padding, dilation, transposed,
      output_padding, groups, mask);
  const auto back = [&](const Tensor& tensor) { return tensor.defined() ? tensor.to(input.device()) : tensor; };
  return {back(std::get<0>(host)), back(std::get<1>(host)), back(std::get<2>(host))};
}

// The schema hides that it writes to the running statistics, so a fallback would lose them.
std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& input,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& variance,
    bool training,
    double momentum,
    double epsilon) {
  const Inside inside;
  const auto host = [](const std::optional<Tensor>& tensor) {
    return tensor && tensor->defined() ? std::optional<Tensor>(seen(*tensor)) : std::nullopt;
  };
  const auto [out, saved_mean, saved_scale] = at::native_batch_norm(
      seen(input), host(weight), host(bias), host(mean), host(variance), training, momentum, epsilon);
  return {out.to(input.device()), saved_mean.to(input.device()), saved_scale.to(input.device())};
}

void check_one_device(const c10::OperatorHandle& op, const Tensor& tensor, std::optional<c10::Device>& device) {
  if (!tensor.defined() || (tensor.device().is_cpu() && tensor.dim() == 0)) return;
  if (!device) device = tensor.device();
  const auto& name = op.operator_name().name;
  const bool may_mix = name == "aten::index" || name == "aten::_index_put_impl_" || name == "aten::_foreach_copy_";
  TORCH_CHECK(
      *device == tensor.device() || may_mix,
      "Expected all tensors to be on the same device, but found at least two devices, ",
      *device, " and ", tensor.device(), "! (", name, ")");
}

// All other operators: the CPU's kernel, on copies.
void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto first = stack->size() - arguments.size();
  std::optional<c10::Device> device;
  Random* random = nullptr;
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      check_one_device(op, value.toTensor(), device);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) check_one_device(op, tensor, device);
    } else if (value.isDevice() && !device) {
      device = c10::Device(kType, checked(value.toDevice()));
    } else if (value.isGenerator() && value.toGenerator().device().type() == kType) {
      random = static_cast<Random*>(value.toGenerator().unsafeGetGeneratorImpl());
      value = c10::IValue();  // the kernel draws from the default, which is lent this one's state
    }
  }
  const auto index = device && device->type() == kType ? device->index() : current;
  const c10::DeviceGuard guard(c10::Device(kType, index));
  std::optional<Lent> lent;
  const auto& tags = op.getTags();
  if (random || std::find(tags.begin(), tags.end(), at::Tag::nondeterministic_seeded) != tags.end()) {
    lent.emplace(random ? random : static_cast<Random*>(generator_of(index).unsafeGetGeneratorImpl()));
  }
  const Inside inside;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &at::native::view);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_", &at::native::set_cpu_);
  m.impl("set_.source_Storage", &set_source_storage);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

// A module that moves keeps its Parameter objects, as on a GPU.
bool keeps_its_object(const Tensor&, const Tensor&) {
  return true;
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_has_compatible_shallow_copy_type", &keeps_its_object);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_has_compatible_shallow_copy_type", &keeps_its_object);
}

// ---- autocast of the operators that the tests' models need ----

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
  KERNEL_PRIVATEUSEONE(group_norm, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
}

// ---- functions for the Python side ----

TORCH_LIBRARY(standin, m) {
  m.def("register_hooks", []() { at::RegisterPrivateUse1HooksInterface(new Hooks); });
  m.def("device_count", []() { return static_cast<int64_t>(count()); });
  m.def("current_device", []() { return static_cast<int64_t>(current); });
  m.def("set_device", [](int64_t index) { current = checked({kType, static_cast<DeviceIndex>(index)}); });
  m.def("seed", [](int64_t index, int64_t seed) {
    at::Generator generator = generator_of(static_cast<DeviceIndex>(index));
    generator.set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("get_state", [](int64_t index) { return generator_of(static_cast<DeviceIndex>(index)).get_state(); });
  m.def("set_state", [](int64_t index, const Tensor& state) {
    at::Generator generator = generator_of(static_cast<DeviceIndex>(index));
    generator.set_state(state);
  });
  m.def("waits", []() { return waits.load(); });
}

}  // namespace
