// A device that is not the CPU, on a machine without a GPU. Its memory is the host's and its operations are the CPU's,
// but torch takes it for a device of its own: an operation on tensors of both devices is refused. Two counters say how
// often a program would wait for a GPU: `reads` from the device, and blocking `uploads` of tensors to it; on request
// both are refused, so that a traceback shows where they are.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>
#include <utility>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;
using std::optional;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
int64_t reads = 0, uploads = 0;
bool counted = true, reads_refused = false, uploads_refused = false;

void note_read() {
  TORCH_CHECK(!counted || !reads_refused, "the program waits for the device: it reads from it");
  reads += counted;
}

void note_upload() {
  TORCH_CHECK(!counted || !uploads_refused, "the program waits for the device: it copies a tensor to it");
  uploads += counted;
}

struct Uncounted {  // while one of these lives, copies are the device's own
  bool before = std::exchange(counted, false);
  ~Uncounted() { counted = before; }
};

// ---- what torch asks of a device -----------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = std::malloc(std::max<size_t>(bytes, 1));
    return {pointer, pointer, &std::free, c10::Device(KIND, 0)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {  // one device, one stream
  c10::DeviceType type() const override { return KIND; }
  c10::Device getDevice() const override { return c10::Device(KIND, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(getDevice()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Numbers final : at::CPUGeneratorImpl {  // random numbers are the CPU's
  Numbers() {
    device_ = c10::Device(KIND, 0);
    key_set_ = KEYS;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Numbers>(); }
};

// ---- tensors: made, copied, read, seen in another shape ------------------------------------------------------------

Tensor on_host(const Tensor& tensor) {  // the same memory, as a tensor of the CPU
  if (!tensor.defined() || tensor.device().type() != KIND) return tensor;
  auto options = tensor.options().device(at::kCPU);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options, at::kCPU);
}

Tensor on_device(const Tensor& tensor) {
  Uncounted here;
  return tensor.defined() ? tensor.to(c10::Device(KIND, 0)) : tensor;
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (!non_blocking && to.device().type() != KIND) note_read();
  if (!non_blocking && from.device().type() != KIND && from.dim() > 0) note_upload();
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar number(const Tensor& tensor) {
  note_read();
  return on_host(tensor).item();
}

const Tensor& resize(const Tensor& tensor, SymIntArrayRef symbols, optional<at::MemoryFormat>) {
  auto size = C10_AS_INTARRAYREF_SLOW(symbols);
  auto storage = tensor.storage();
  size_t bytes = (c10::multiply_integers(size) + tensor.storage_offset()) * tensor.dtype().itemsize();
  if (bytes > storage.nbytes()) {
    auto larger = memory.allocate(bytes);
    std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return tensor;
}

Tensor view(const Tensor& x, SymIntArrayRef size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor as_strided(const Tensor& x, SymIntArrayRef size, SymIntArrayRef stride, optional<c10::SymInt> offset) {
  auto start = offset ? optional<int64_t>(offset->expect_int()) : std::nullopt;
  auto shape = C10_AS_INTARRAYREF_SLOW(size);
  return at::native::as_strided_tensorimpl(x, shape, C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor reshape_alias(const Tensor& x, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& x, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  at::native::checkSetStorage(x, source, offset, size, stride);
  x.unsafeGetTensorImpl()->set_storage_offset(offset);
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return x;
}

Tensor& set_whole_storage(Tensor& x, at::Storage source) {
  return set_storage(x, source, 0, {static_cast<int64_t>(source.nbytes() / x.dtype().itemsize())}, {1});
}

// ---- operations: convolutions by themselves, which torch does not pass to a fallback; all others by the CPU's -------

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef out_padding,
                   c10::SymInt groups) {
  auto shift = bias ? optional<Tensor>(on_host(*bias)) : std::nullopt;
  return on_device(at::convolution_symint(on_host(x), on_host(weight), shift, stride, padding, dilation, transposed,
                                          out_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        SymIntArrayRef stride, SymIntArrayRef padding,
                                                        SymIntArrayRef dilation, bool transposed,
                                                        SymIntArrayRef out_padding, c10::SymInt groups,
                                                        std::array<bool, 3> wanted) {
  auto [of_x, of_weight, of_bias] = at::convolution_backward_symint(
      on_host(gradient), on_host(x), on_host(weight), SymIntArrayRef({weight.sym_size(0)}), stride, padding, dilation,
      transposed, out_padding, groups, wanted);
  return {on_device(of_x), on_device(of_weight), on_device(of_bias)};
}

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double, bool,
                        optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

// Operations whose result has a shape that numbers on the device decide: a GPU is waited for.
const std::set<std::string> WAITING = {"aten::nonzero", "aten::masked_select",      "aten::equal",
                                       "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};

void by_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& name = operation.schema().name();
  Tensor on_cpu;
  bool on_this = false;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == KIND) on_this = true;
    else if (tensor.dim() > 0) on_cpu = tensor;  // a number may be on the CPU
  };
  for (const auto& value : torch::jit::last(*stack, operation.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) look(tensor);
    if (value.isOptionalTensorList())  // places in a tensor: these may be on the CPU, and are then uploaded
      for (const auto& tensor : value.toOptionalTensorVector())
        if (tensor && tensor->defined()) {
          if (tensor->device().type() != KIND) note_upload();
          if (tensor->scalar_type() == at::kBool) note_read();
        }
  }
  TORCH_CHECK(!on_this || !on_cpu.defined(), "Expected all tensors to be on the same device, but ", name,
              " got one of shape ", on_cpu.sizes(), " on the CPU");
  if (WAITING.count(name)) note_read();
  Uncounted here;
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &number);
  m.impl("resize_", &resize);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY(second_device, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("reads", [] { return reads; });
  m.def("uploads", [] { return uploads; });
  m.def("refuse", [](bool any_read, bool any_upload) {
    reads_refused = any_read;
    uploads_refused = any_upload;
  });
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &plain_attention);
}
